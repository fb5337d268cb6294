"""What is in a picture? A small convolutional network that names thing, color, texture, size, place and background.

It judges the drawing model: its captions say what should be there. With two things in a picture there are two of some
answers, the left thing's first.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from demo.drawing.course import Course
from demo.drawing.vae import to_pixels
from demo.pictures.scene import BACKGROUNDS, COLOR_NAMES, POSITIONS, SHAPE_NAMES, SIZES, TEXTURES, Scene

NOTHING = "nothing"
QUESTIONS: dict[str, tuple[str, ...]] = {
    "shape": SHAPE_NAMES,
    "color": COLOR_NAMES,
    "texture": TEXTURES,
    "size": tuple(SIZES),
    "position": tuple(POSITIONS),
    "background": BACKGROUNDS,
    "second shape": (*SHAPE_NAMES, NOTHING),
    "second color": (*COLOR_NAMES, NOTHING),
    "second texture": (*TEXTURES, NOTHING),
}
WIDTHS = (24, 40, 64, 80)
HIDDEN = 64
SIDE = 128
PEAK_RATE = 2e-3
BATCH = 256
FILE = "classifier.safetensors"


class Classifier(nn.Module):
    """Pixels of pictures to logits [B, all answers]; sizes other than SIDE are resized first."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for number, width in enumerate(WIDTHS):
            kernel = 3 if number else 5
            layers += [
                nn.Conv2d(before, width, kernel, stride=2, padding=kernel // 2),
                nn.GroupNorm(8, width),
                nn.ReLU(),
            ]
            before = width
        layers += [nn.Conv2d(before, before, 3, stride=2, padding=1), nn.GroupNorm(8, before), nn.ReLU()]
        self.features = nn.Sequential(*layers)  # [B, 80, 4, 4]
        self.hidden = nn.Linear(before * 16, HIDDEN)
        self.answers = nn.Linear(HIDDEN, sum(map(len, QUESTIONS.values())))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels [B, 3, 128, 128] in −1 … 1."""
        if pixels.shape[-1] != SIDE:
            pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear")
        return self.answers(F.relu(self.hidden(self.features(pixels).flatten(1))))


def right_answers(scenes: list[Scene]) -> torch.Tensor:
    """Index of the right answer to each question, int64 [N, questions]."""
    rows = []
    for scene in scenes:
        first = scene.things[0]
        second = scene.things[1] if len(scene.things) == 2 else None
        told = [first.shape, first.color, first.texture, first.size, first.position, scene.background]
        told += [second.shape, second.color, second.texture] if second else [NOTHING] * 3
        rows.append([choices.index(answer) for choices, answer in zip(QUESTIONS.values(), told, strict=True)])
    return torch.tensor(rows)


def split_questions(logits: torch.Tensor) -> list[torch.Tensor]:
    """The logits question by question."""
    return list(logits.split([len(choices) for choices in QUESTIONS.values()], dim=1))


def worn(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """uint8 [B, H, W, 3] → pixels, shifted by up to 2, some a little blurred, all a little noisy, as drawn by a model.

    `generator` lies on the pictures' device.
    """
    pixels = to_pixels(pictures)
    device, size = pixels.device, pixels.shape[-1]
    down, right = torch.randint(0, 5, (2,), generator=generator, device=device).tolist()
    pixels = F.pad(pixels, (2, 2, 2, 2), mode="replicate")[:, :, down : down + size, right : right + size]
    blurred = torch.rand(len(pixels), generator=generator, device=device) < 0.3
    pixels = torch.where(blurred[:, None, None, None], F.avg_pool2d(pixels, 3, 1, 1), pixels)
    return pixels + torch.randn(pixels.shape, generator=generator, device=device) * 0.04


def learn(pictures: torch.Tensor, scenes: list[Scene], course: Course, batch: int, seed: int) -> Classifier:
    """A classifier that learned from uint8 pictures [N, H, W, 3] on their device."""
    device = pictures.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier().to(device)
    answers = right_answers(scenes).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.01)
    for rate in course.rates(PEAK_RATE):
        index = torch.randint(len(pictures), (batch,), generator=generator, device=device)
        logits = split_questions(model(worn(pictures[index], generator)))
        wanted = answers[index]
        loss = torch.stack([F.cross_entropy(part, wanted[:, i]) for i, part in enumerate(logits)]).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if course.is_due():
            course.tell(loss=loss.item())
    return model.eval()


@torch.no_grad()
def score(model: Classifier, pictures: np.ndarray, scenes: list[Scene]) -> dict[str, float]:
    """Share of right answers by question; `mean` of all, and `all`: the share of pictures in which every answer is right.

    The second thing's color and texture count only where there is a second thing.
    """
    device = next(model.parameters()).device
    wanted = right_answers(scenes)
    found = []
    for part in torch.from_numpy(pictures).split(256):
        pixels = to_pixels(part.to(device))
        found.append(torch.stack([logits.argmax(1) for logits in split_questions(model(pixels))], 1).cpu())
    right = torch.cat(found) == wanted
    two = torch.tensor([len(scene.things) == 2 for scene in scenes])
    counts = torch.ones_like(right)
    counts[:, -2:] = two[:, None]
    shares = {
        name: (right[:, i][counts[:, i]]).float().mean().item()
        for i, name in enumerate(QUESTIONS)
        if counts[:, i].any()
    }
    shares["mean"] = right[counts].float().mean().item()
    shares["all"] = (right | ~counts).all(1).float().mean().item()
    return shares


def save(model: Classifier, file: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.half().cpu().contiguous() for name, tensor in model.state_dict().items()}, file)


def load(file: Path, device: torch.device | str = "cpu") -> Classifier:
    """Raises FileNotFoundError for a model folder without a classifier."""
    from safetensors.torch import load_file

    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: demo/train_drawing_model.py writes it beside the model")
    model = Classifier()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})
    return model.eval().to(device)
