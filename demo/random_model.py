"""A Qwen-Image transformer of any size with random bfloat16 weights, in the Hugging Face layout, written at disk speed.

    python demo/random_model.py --output_path /local/qwen_random                     # full size: 41 GB in 9 files
    python demo/random_model.py --output_path /tmp/small --layers 27 --heads 8       # 1.0 B parameters

Transformer, scheduler and model_index.json only: what training from encoded shards reads.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

POOL_VALUES = 1 << 25  # random numbers that all tensors take their values from, each from another place
FILE_BYTES = 4_900_000_000


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_path", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--text_dim", type=int, default=3584)
    options = parser.parse_args(argv)
    parameters, size = write_random_model(options.output_path, options.layers, options.heads, options.text_dim)
    print(f"wrote {options.output_path}: {parameters / 1e9:.2f} B parameters, {size / 1e9:.1f} GB")
    return 0


def write_random_model(
    folder: Path, layers: int = 60, heads: int = 24, text_dim: int = 3584, file_bytes: int = FILE_BYTES
) -> tuple[int, int]:
    """Write the model and return how many parameters and bytes it has. File by file: fsync, so that caches can be dropped."""
    import torch

    from demo.tiny_model import SCHEDULER_CONFIG
    from qwen_image.transformer import QwenImageTransformer, TransformerConfig

    config = TransformerConfig(num_layers=layers, num_attention_heads=heads, joint_attention_dim=text_dim)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in QwenImageTransformer(config).named_parameters()}
    transformer = folder / "transformer"
    transformer.mkdir(parents=True)
    (folder / "scheduler").mkdir()
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    write_json(transformer / "config.json", {"_class_name": "QwenImageTransformer2DModel"} | fields)
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler"} | SCHEDULER_CONFIG
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", {"_class_name": "QwenImagePipeline"})

    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if filled and filled + 2 * shape.numel() > file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += 2 * shape.numel()
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(POOL_VALUES, generator=generator).mul_(0.02).bfloat16().view(torch.uint8).numpy()
    weight_map = {}
    for number, names in enumerate(groups, start=1):
        file = transformer / f"diffusion_pytorch_model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_file(file, {name: shapes[name] for name in names}, pool)
        weight_map |= dict.fromkeys(names, file.name)
    index = {"metadata": {"total_size": 2 * sum(s.numel() for s in shapes.values())}, "weight_map": weight_map}
    write_json(transformer / "diffusion_pytorch_model.safetensors.index.json", index)
    return sum(s.numel() for s in shapes.values()), sum(path.stat().st_size for path in transformer.iterdir())


def write_file(path: Path, shapes: dict[str, Any], pool: Any) -> None:
    header: dict[str, Any] = {}
    place = 0
    for name, shape in shapes.items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [place, place := place + 2 * shape.numel()],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = 0
        for shape in shapes.values():
            remaining = 2 * shape.numel()
            while remaining:
                piece = pool[start : start + remaining].data
                file.write(piece)
                remaining -= len(piece)
                start = (start + len(piece)) % (2 * POOL_VALUES - 2)
                start -= start % 2
        file.flush()
        os.fsync(file.fileno())


def drop_cache(folder: Path) -> None:
    """Ask the kernel to forget the files' pages (they are on the disk already): the next read comes from the disk."""
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
