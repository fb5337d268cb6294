"""Text encoder and transformer learn to draw together: flow matching on the VAE's latents, by the project's own functions."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from demo.drawing.course import Course
from qwen_image.encoders.text_encoder import TextEncoder
from qwen_image.model.conditioning import Prompt, pack_latents
from qwen_image.model.sizes import TransformerConfig
from qwen_image.model.transformer import QwenImageTransformer
from qwen_image.noise_schedule import SigmaSchedule, shift_sigma
from qwen_image.pipeline import DEFAULT_NEGATIVE_PROMPT, predict_velocity
from train.flow.objective import add_noise, flow_matching_loss, velocity_target

LAYERS, HEADS, HEAD_DIM = 5, 4, 32
TEXT_LAYERS, TEXT_DIM = 2, 64
BATCH = 512
PEAK_RATE = 1.5e-3
CAPTION_DROPOUT = 0.1  # half of it the empty caption, half sampling's negative prompt
LOGIT_STD = 1.25  # a little wider than 1: nearly pure noise, where a picture's layout is decided, is seen more often
EMA_DECAY = 0.999
WARM_UP = 20  # steps before the CUDA graph is captured: compilers and cuBLAS make themselves ready
# Of PyTorch's attention kernels those that take a mask at any head size.
MASKED_ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def fresh_transformer(config: TransformerConfig, device: torch.device, seed: int = 0) -> QwenImageTransformer:
    """Initialized for learning: blocks begin as the identity (adaLN-Zero, Peebles & Xie 2022), all others 1 / fan-in."""
    with torch.device(device):
        transformer = QwenImageTransformer(config)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif any(part in name for part in ("img_mod", "txt_mod", "norm_out", "proj_out")):
                parameter.zero_()
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    return transformer


class Captions:
    """Token ids of several captions a picture, [N, each, L] on the device, and of the two empty ones, [2, L]."""

    def __init__(self, encoder: TextEncoder, captions: list[list[str]], device: torch.device):
        each = len(captions[0])
        empty = ["", DEFAULT_NEGATIVE_PROMPT]
        flat = [text for texts in captions for text in texts]
        ids, mask = encoder.tokenize(flat + empty)
        self.padding = int(encoder.tokenizer.pad_token_id)
        ids = ids.masked_fill(mask == 0, self.padding)
        self.ids = ids[: len(flat)].view(len(captions), each, -1).to(device, torch.int32)
        self.empty = ids[len(flat) :].to(device, torch.int32)

    def draw(self, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Ids [B, L] of one caption each of the pictures `index` [B], some of them empty."""
        device = index.device
        which = torch.randint(self.ids.shape[1], index.shape, device=device, generator=generator)
        chance = torch.rand(index.shape, device=device, generator=generator)
        empty = self.empty[(chance < CAPTION_DROPOUT / 2).int()]
        return torch.where((chance < CAPTION_DROPOUT)[:, None], empty, self.ids[index, which]).long()


def encode(language_model: Any, ids: torch.Tensor, padding: int, template_drop: int) -> Prompt:
    """Token ids [B, L], template included → the prompt, with gradients: what TextEncoder.encode makes of the captions.

    Nothing in it waits for the device. Embeddings are a product, whose gradient adds up in float32.
    """
    mask = ids != padding
    table = language_model.get_input_embeddings().weight
    embedded = (ids[..., None] == torch.arange(len(table), device=ids.device)).to(table.dtype) @ table
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    seen = causal & mask[:, None, None, :]
    hidden = language_model(inputs_embeds=embedded, attention_mask=seen, use_cache=False).last_hidden_state
    kept = mask[:, template_drop:]
    return Prompt(hidden[:, template_drop:] * kept[..., None].to(hidden.dtype), kept)


def draw_sigma(count: int, image_tokens: int, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """σ [count] as `qwen_shift` of train/flow/objective.py draws it one by one, but LOGIT_STD wide; float32 on `device`."""
    normal = torch.randn(count, device=device, generator=generator)
    return shift_sigma(torch.sigmoid(LOGIT_STD * normal), SigmaSchedule().mu(image_tokens))


class Step:
    """A step of AdamW on both models: compute in bfloat16 on a GPU, float32 master weights.

    So small a step is thousands of launches of a few microseconds' work: on a GPU it is replayed as one CUDA graph from the
    WARM_UP-th on, where it can be captured.
    """

    def __init__(
        self, transformer: QwenImageTransformer, encoder: TextEncoder, captions: Captions, grid: tuple[int, int]
    ):
        self.transformer, self.captions, self.grid = transformer, captions, grid
        self.language_model, self.template_drop = encoder.language_model, encoder.template_drop
        self.parameters = [*transformer.parameters(), *self.language_model.parameters()]
        self.masters = [parameter.detach().float().clone() for parameter in self.parameters]
        self.device = self.masters[0].device
        self.on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        transformer.to(self.dtype)
        self.language_model.to(self.dtype)
        self.rate = torch.tensor(PEAK_RATE, device=self.device)
        options: dict[str, Any] = {"fused": True, "capturable": True} if self.on_gpu else {}
        self.optimizer = torch.optim.AdamW(self.masters, lr=self.rate, betas=(0.9, 0.99), weight_decay=0.01, **options)
        self.inputs: list[torch.Tensor] = []
        self.loss = torch.zeros((), device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.done = 0

    def __call__(self, rate: float, *inputs: torch.Tensor) -> torch.Tensor:
        """`inputs`: ids [B, L], clean latents, noise, σ [B]. Returns the loss, on the device."""
        self.rate.fill_(rate)
        if self.on_gpu and self.done == WARM_UP:
            self.capture(inputs)
        self.done += 1
        if self.graph is None:
            return self.compute(*inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.loss

    def capture(self, inputs: tuple[torch.Tensor, ...]) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.loss = self.compute(*self.inputs)
        except RuntimeError as error:
            print(f"no CUDA graph, the step is launched kernel by kernel: {str(error).splitlines()[0]}", flush=True)
        else:
            self.graph = graph

    def compute(self, ids: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        noised = pack_latents(add_noise(clean, noise, sigma)).to(self.dtype)
        with sdpa_kernel(MASKED_ATTENTION) if self.on_gpu else nullcontext():
            prompt = encode(self.language_model, ids, self.captions.padding, self.template_drop)
            prediction = predict_velocity(self.transformer, noised, sigma, prompt, *self.grid)
            target = pack_latents(velocity_target(clean, noise))
            loss = flow_matching_loss(prediction, target, torch.ones_like(sigma)).mean()
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = None if gradient is None else gradient.float()
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)
        return loss.detach()


def learn(
    transformer: QwenImageTransformer,
    encoder: TextEncoder,
    latents: torch.Tensor,
    captions: Captions,
    course: Course,
    batch: int,
    seed: int,
) -> None:
    """Train in place on normalised latents [N, 16, 1, H/8, W/8] and their captions, all on one device.

    What is left in the models in the end is the exponential moving average of the weights, in float32.
    """
    device = latents.device
    generator = torch.Generator(device).manual_seed(seed)
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    encoder.language_model.requires_grad_(True)
    transformer.requires_grad_(True).dense_padding = False  # a mask costs nothing at this size
    step = Step(transformer, encoder, captions, (rows, columns))
    averages = [master.clone() for master in step.masters]
    if device.type == "cuda":
        for block in transformer.transformer_blocks:
            block.compile(dynamic=False)
    recent = torch.zeros((), device=device)
    for rate in course.rates(PEAK_RATE):
        index = torch.randint(len(latents), (batch,), device=device, generator=generator)
        ids = captions.draw(index, generator)
        clean = latents[index]
        noise = torch.randn(clean.shape, device=device, generator=generator)
        loss = step(rate, ids, clean, noise, draw_sigma(batch, rows * columns, device, generator))
        torch._foreach_lerp_(averages, step.masters, 1 - min(EMA_DECAY, (1 + course.done) / (20 + course.done)))
        recent = torch.lerp(loss, recent, 0.98 if course.done else 0.0)
        if course.is_due():
            course.tell(loss=recent.item())
    for parameter, average in zip(step.parameters, averages, strict=True):
        parameter.data = average
        parameter.requires_grad_(False)
    transformer.eval()
    encoder.language_model.eval()
