"""Train the tiny model that can draw, from scratch: pictures, VAE, text encoder and transformer, classifier, score.

    python demo/train_drawing_model.py --output_path drawing_model --minutes 4
    python demo/train_drawing_model.py --output_path drawing_model --pictures 48000 --vae_steps 2000 --steps 8000

The script draws captioned pictures of things in ten colors, three textures, three sizes and nine places on twelve backgrounds.
What learns from them is of Qwen-Image's own classes. `--minutes` is shared out among all of it, on whatever machine;
given numbers of steps make it repeatable instead. One pair of thing and color in ten is never drawn: on captions of these
the model is judged, by a classifier that learned from pictures of all pairs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from demo.drawing.classifier import Classifier
    from demo.drawing.model_folder import Parts
    from demo.pictures.picture_set import PictureSet

# Shares of the time at which each part must have ended.
DRAWN, VAE_LEARNED, LEARNED, JUDGE_LEARNED = 0.08, 0.32, 0.90, 0.96
MOST_PICTURES = 50_000
CAPTIONS_EACH = 3
TEST_SEED = 10**9  # scenes of the test pictures; those for training count up from 0
TEST_PICTURES = 1024


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        return train(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_path", type=Path, required=True, help="folder for the model; must not exist or be empty"
    )
    parser.add_argument("--minutes", type=float, default=4.0, help="for everything, from the start of the process (4)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and noise (0)")
    parser.add_argument(
        "--side", type=int, default=128, help="of the square pictures in pixels, a multiple of 16 (128)"
    )
    parser.add_argument("--pictures", type=int, help="how many are drawn (not given: as many as the time allows)")
    parser.add_argument("--vae_steps", type=int, help="steps of the VAE (not given: by time)")
    parser.add_argument("--steps", type=int, help="steps of the transformer (not given: by time)")
    parser.add_argument("--judge_steps", type=int, help="steps of the classifier (not given: by time)")
    parser.add_argument(
        "--batch", type=int, help="pictures a step of the transformer (512; the VAE's is an eighth of it)"
    )
    parser.add_argument("--score_pictures", type=int, default=512, help="drawn by the model to judge it (512)")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    return parser


def train(arguments: argparse.Namespace) -> int:
    """All parts one after the other; returns the exit code."""
    start = time.perf_counter()
    output, side = arguments.output_path, arguments.side
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty: choose another --output_path")
    if side < 32 or side % 16:
        raise ValueError(f"--side must be a multiple of 16 and at least 32, got {side}")
    if arguments.minutes <= 0:
        raise ValueError(f"--minutes must be above 0, got {arguments.minutes}")
    import torch

    from demo.drawing import classifier, denoiser, vae
    from demo.drawing.course import Course
    from demo.drawing.model_folder import Parts, bytes_of, round_to_saved
    from demo.pictures.picture_set import captions, draw_set

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    batch = arguments.batch or denoiser.BATCH
    seconds = 60 * arguments.minutes

    def left(share: float) -> float:
        """Seconds until the part that ends at `share` of the time."""
        return start + share * seconds - time.perf_counter()

    # ── Pictures and their captions ───────────────────────────────────────────────────────────────────────────────────
    drawn = draw_set(arguments.pictures or MOST_PICTURES, side, seconds=None if arguments.pictures else left(DRAWN))
    texts = captions([scene for scene, seen in zip(drawn.scenes, drawn.seen, strict=True) if seen], CAPTIONS_EACH)
    parts = Parts([text for each in texts for text in each], arguments.seed, device)
    told = denoiser.Captions(parts.text_encoder, texts, device)
    everything = torch.from_numpy(drawn.pictures).to(device)
    pictures = everything[torch.from_numpy(drawn.seen).to(device)]
    say(start, f"{len(drawn)} pictures drawn, {len(pictures)} to learn from; e.g. “{texts[0][0]}”, “{texts[1][0]}”")

    # ── VAE, then latents ─────────────────────────────────────────────────────────────────────────────────────────────
    course = Course("VAE", left(VAE_LEARNED), arguments.vae_steps)
    vae.learn(parts.vae, pictures, course, max(4, batch // 8), arguments.seed)
    round_to_saved(parts.vae)
    latents = vae.latents_of(parts.vae, pictures)
    facts: dict[str, Any] = {"vae_steps": course.done}
    say(start, f"VAE {course.done} steps; latents {list(latents.shape)}, deviation {latents.std().item():.3f}")

    # ── Text encoder and transformer ──────────────────────────────────────────────────────────────────────────────────
    course = Course("transformer", left(LEARNED), arguments.steps, warm_up=200)
    denoiser.learn(parts.transformer, parts.text_encoder, latents, told, course, batch, arguments.seed)
    parts.write(output)
    facts |= {"steps": course.done, "batch": batch, "pictures": len(drawn), "side": side, "seed": arguments.seed}
    say(start, f"transformer {course.done} steps of {batch}; {bytes_of(output) / 1e6:.2f} MB in {output}")

    # ── Classifier and score ──────────────────────────────────────────────────────────────────────────────────────────
    course = Course("classifier", left(JUDGE_LEARNED), arguments.judge_steps)
    judge = classifier.learn(everything, drawn.scenes, course, min(classifier.BATCH, batch), arguments.seed)
    classifier.save(judge, output / classifier.FILE)
    return report(arguments, facts, parts, judge, device, start)


def report(
    arguments: argparse.Namespace,
    facts: dict[str, Any],
    parts: Parts,
    judge: Classifier,
    device: torch.device,
    start: float,
) -> int:
    """Measure the written model, and write card.json, the card and a preview beside it."""
    import torch

    from demo.drawing import vae
    from demo.drawing.card import write_card
    from demo.drawing.classifier import score
    from demo.drawing.model_folder import bytes_of
    from demo.drawing.scoring import score_model

    output: Path = arguments.output_path
    test = test_pictures(arguments.side)
    facts["classifier_on_drawn"] = score(judge, test.pictures, test.scenes)
    facts["vae_error"] = vae.mean_error(parts.vae, test.pictures[:256])
    say(start, f"classifier on drawn pictures: {told_score(facts['classifier_on_drawn'])}")
    say(start, f"VAE: mean error {facts['vae_error']:.2f} of 255 levels")
    facts |= score_model(output, judge, arguments.score_pictures, arguments.side, device, output / "preview.jpg")
    facts["seconds"] = round(time.perf_counter() - start)
    facts["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    facts["bytes"] = bytes_of(output)
    write_card(output, facts)
    for name in ("held_out", "seen"):
        say(start, f"score, {name.replace('_', ' ')} pairs: {told_score(facts[name])}")
    say(start, f"{facts['bytes'] / 1e6:.2f} MB in {output}")
    return 0


def test_pictures(side: int) -> PictureSet:
    """TEST_PICTURES that nothing learned from, half of them of held-out pairs."""
    import numpy as np

    from demo.pictures.painting import paint
    from demo.pictures.picture_set import PictureSet
    from demo.pictures.random_scenes import random_scene

    scenes = [random_scene(TEST_SEED + i, wanted_held_out=i % 2 == 1) for i in range(TEST_PICTURES)]
    seen = np.arange(TEST_PICTURES) % 2 == 0
    return PictureSet(np.stack([paint(scene, side) for scene in scenes]), scenes, seen)


def told_score(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


def say(start: float, line: str) -> None:
    print(f"[{time.perf_counter() - start:5.0f} s] {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
