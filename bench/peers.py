"""One LoRA training step of each peer, done as its own training script does it, from cached latents and embeddings.

    pip install '.[peers]'                            # DiffSynth-Studio; without it that peer is left out
    python bench/peers.py --tiny --layers 2           # every peer on the CPU, seconds: shows that each runs and learns
    python bench/peers.py --device cuda --height 1024 --width 1024        # full size, 60 blocks, one after the other

Used by the benchmark on a GPU:

    with PEERS["diffsynth"](Shape(), Work(1024, 1024, batch=1, text_tokens=128), "cuda") as peer:
        loss = peer.step()

The model's weights are random and made on the device; LoRA has rank 32 on the six q, k, v projections; everything is
bfloat16. What each script does was read in examples/qwen_image/model_training (DiffSynth-Studio 2.x, `--task sft:train`)
and examples/dreambooth/train_dreambooth_lora_qwen_image.py (diffusers). Left out of a step: data loader and progress bar.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time

from bench.peer import TINY, Builder, Peer, Shape, Work
from bench.peer_diffsynth import diffsynth
from bench.peer_diffusers import diffusers, diffusers_tuned

__all__ = ["PEERS", "TINY", "Peer", "Shape", "Work", "unavailable"]

PEERS: dict[str, Builder] = {"diffsynth": diffsynth, "diffusers": diffusers, "diffusers_tuned": diffusers_tuned}
NEEDS = {  # modules that a peer imports, beyond what this project requires anyway
    "diffsynth": ("diffsynth", "modelscope", "torchvision", "imageio", "pandas", "einops", "peft", "accelerate"),
    "diffusers": ("diffusers", "peft", "accelerate"),
    "diffusers_tuned": ("diffusers", "peft"),
}


def unavailable(name: str, work: Work | None = None) -> str | None:
    """Why PEERS[name] cannot run here (packages that are missing, a batch it cannot train on), or None."""
    missing = [module for module in NEEDS[name] if importlib.util.find_spec(module) is None]
    if missing:
        return f"needs {', '.join(missing)}: pip install '.[peers]'"
    if name == "diffsynth" and work is not None and work.batch > 1:
        return f"DiffSynth-Studio trains on one image at a time, batch is {work.batch}"
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--tiny", action="store_true", help="a transformer of 4 heads of 32 channels, images of 64²")
    parser.add_argument("--layers", type=int, help="number of blocks (default: 60, or 2 with --tiny)")
    parser.add_argument("--height", type=int, help="pixels (default: 1024, or 64 with --tiny)")
    parser.add_argument("--width", type=int, help="pixels (default: --height)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--text_tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5, help="the first ones compile and allocate")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    import torch

    full = TINY if options.tiny else Shape()
    shape = Shape(options.layers or full.layers, full.heads, full.head_dim, full.joint_dim)
    height = options.height or (64 if options.tiny else 1024)
    try:
        work = Work(height, options.width or height, options.batch, options.text_tokens)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in options.peers:
        if reason := unavailable(name, work):
            print(f"{name}: left out ({reason})")
            continue
        with PEERS[name](shape, work, options.device) as peer:
            seconds, losses = [], []
            for _ in range(options.steps):
                start = time.perf_counter()
                losses.append(f"{peer.step().item():.3f}")  # waits for the device
                seconds.append(time.perf_counter() - start)
            trained = sum(parameter.numel() for parameter in peer.trainable)
            versions = " ".join(f"{package} {number}" for package, number in peer.versions.items())
            print(f"{name}: {min(seconds):.3f} s (best of {options.steps}), {trained:,} parameters trained, {versions}")
            print(f"  losses {' '.join(losses)}", end="")
            if torch.device(options.device).type == "cuda":
                print(f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", end="")
                torch.cuda.reset_peak_memory_stats()
            print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
