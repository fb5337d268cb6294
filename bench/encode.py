"""Encoding throughput of the full-size encoders on one GPU: images a second (VAE), prompts a second (Qwen2.5-VL 7B).

    python bench/encode.py
    python bench/encode.py --tiny        # small shapes, for a machine without a GPU

Random weights in bf16. The share of the card's bf16 peak counts the matrix products and convolutions that run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def language_model(tiny: bool, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Qwen2.5-VL 7B's language model (config.json of Qwen/Qwen2.5-VL-7B-Instruct), random weights."""
    import torch
    from transformers import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4}
    if tiny:
        sizes, heads = (
            {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
            {"num_attention_heads": 4, "num_key_value_heads": 2},
        )
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3] if tiny else [16, 24, 24], "rope_theta": 1_000_000.0}
    config = Qwen2_5_VLTextConfig(vocab_size=152064 if not tiny else 512, rope_parameters=rope, **sizes, **heads)
    with torch.device(device):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return Qwen2_5_VLTextModel(config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(previous)


def vae_model(tiny: bool, device: torch.device, dtype: torch.dtype) -> Any:
    """AutoencoderKLQwenImage with its own defaults, which are Qwen-Image's."""
    from diffusers import AutoencoderKLQwenImage

    model = AutoencoderKLQwenImage(**({"base_dim": 8, "num_res_blocks": 1} if tiny else {}))
    return model.to(device, dtype).eval().requires_grad_(False)


def timed(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call after a warm one."""
    import torch

    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    call()
    synchronize()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls to take the median of (default 5)")
    arguments = parser.parse_args(argv)

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    from bench.card_limit import measured_peak
    from qwen_image.encoders.vae import VAE

    peak = measured_peak(device) if device.type == "cuda" else 1.0
    print(f"peak {peak:.0f} TFLOP/s, torch {torch.__version__}, {dtype}")
    model = vae_model(arguments.tiny, device, dtype)
    vae = VAE(model, model.config.latents_mean, model.config.latents_std)
    side = 64 if arguments.tiny else 1024
    with torch.no_grad():
        for batch in (1, 4, 8):
            images = torch.rand(batch, 3, side, side, device=device) * 2 - 1
            with FlopCounterMode(display=False) as counter:
                vae.encode(images)
            tflop = counter.get_total_flops() / 1e12
            seconds = timed(partial(vae.encode, images), device, arguments.repeats)
            share = tflop / seconds / peak
            each = tflop / batch
            print(
                f"VAE {side}² batch {batch}: {batch / seconds:.2f} images/s, {each:.2f} TFLOP each, {share:.0%} of peak"
            )
        language = language_model(arguments.tiny, device, dtype)
        weights = sum(p.numel() for name, p in language.named_parameters() if "embed_tokens" not in name)
        for batch, tokens in ((1, 150), (8, 150), (32, 150), (8, 500)):
            ids = torch.randint(0, 500, (batch, tokens), device=device)
            mask = torch.ones_like(ids)
            call = partial(language, input_ids=ids, attention_mask=mask, use_cache=False)
            seconds = timed(call, device, arguments.repeats)
            tflop = 2 * weights * batch * tokens / 1e12  # attention over 150 tokens adds less than 1 %
            share = tflop / seconds / peak
            print(f"text {tokens} tokens batch {batch}: {batch / seconds:.1f} prompts/s, {share:.0%} of peak")
    return 0


if __name__ == "__main__":
    sys.exit(main())
