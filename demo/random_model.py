"""A Qwen-Image transformer of any size with random bfloat16 weights, in the Hugging Face layout, written at disk speed,
and encoded shards of noise to train it on: for measurements of memory and speed.

    python demo/random_model.py --output_path /local/qwen_random                     # full size: 41 GB in 9 files
    python demo/random_model.py --output_path /tmp/small --layers 27 --heads 8       # 1.0 B parameters
    python demo/random_model.py --output_path /local/qwen_whole --encoders           # 14 GB of text encoder and the VAE too

Transformer, scheduler and model_index.json: what training from encoded shards reads. With --encoders everything that sampling
and encoding read: the language model of Qwen2.5-VL-7B (without its vision tower), a small tokenizer, and the VAE.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from files.atomic_files import whole_file
from qwen_image.model.family import MEMBERS

POOL_VALUES = 1 << 25  # random numbers that all tensors take their values from, each from another place
FILE_BYTES = 4_900_000_000


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_path", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--text_dim", type=int, default=3584)
    parser.add_argument("--encoders", action="store_true", help="text encoder, tokenizer and VAE of real size, too")
    parser.add_argument("--text_layers", type=int, default=28, help="of the text encoder (default 28)")
    parser.add_argument(
        "--hollow", action="store_true", help="holes instead of weights, read as zeros: for memory alone, in a second"
    )
    parser.add_argument(
        "--family", choices=MEMBERS, default="text-to-image", help="which member (default text-to-image)"
    )
    options = parser.parse_args(argv)
    shape = options.layers, options.heads, options.text_dim
    parameters, size = write_random_model(options.output_path, *shape, hollow=options.hollow, family=options.family)
    if options.encoders:
        own = write_random_encoders(options.output_path, options.text_dim, options.text_layers, hollow=options.hollow)
        parameters, size = parameters + own[0], size + own[1]
    print(f"wrote {options.output_path}: {parameters / 1e9:.2f} B parameters, {size / 1e9:.1f} GB")
    return 0


def write_random_model(
    folder: Path,
    layers: int = 60,
    heads: int = 24,
    text_dim: int = 3584,
    file_bytes: int = FILE_BYTES,
    hollow: bool = False,
    family: str = "text-to-image",
) -> tuple[int, int]:
    """Write the model and return how many parameters and bytes it has. File by file, each made durable.

    `hollow`: headers and sizes are the model's, but the weights are holes that take no room and no time and read as zeros.
    `family`: one of qwen_image.model.family.MEMBERS.
    """
    import torch

    from demo.tiny_model import SCHEDULER_CONFIG
    from qwen_image.model.sizes import TransformerConfig
    from qwen_image.model.transformer import QwenImageTransformer

    config = TransformerConfig(
        num_layers=layers,
        num_attention_heads=heads,
        joint_attention_dim=text_dim,
        zero_cond_t=MEMBERS[family].zero_cond_t,
    )
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in QwenImageTransformer(config).named_parameters()}
    transformer = folder / "transformer"
    transformer.mkdir(parents=True)
    (folder / "scheduler").mkdir()
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    write_json(transformer / "config.json", {"_class_name": "QwenImageTransformer2DModel"} | fields)
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler"} | SCHEDULER_CONFIG
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", {"_class_name": MEMBERS[family].pipelines[0]})

    return write_component(transformer, shapes, None if hollow else random_pool(config.inner_dim), file_bytes)


def write_random_encoders(
    folder: Path, text_dim: int = 3584, text_layers: int = 28, vae_dim: int = 96, hollow: bool = False
) -> tuple[int, int]:
    """Add text encoder, tokenizer and VAE to a model's folder; how many parameters and bytes they have.

    Qwen2.5-VL-7B's proportions: heads of 128, seven queries a key, an MLP of 37/7 of the width, 152,064 tokens.
    """
    import torch
    from diffusers import AutoencoderKLQwenImage
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextModel

    from demo.tiny_model import TOKENIZER_CAPTIONS, TOKENIZER_VOCABULARY, make_tokenizer

    heads = text_dim // 128
    rotary = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
    text_config = {
        "vocab_size": 152064,
        "hidden_size": text_dim,
        "intermediate_size": text_dim * 37 // 7,
        "num_hidden_layers": text_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 7),
        "rms_norm_eps": 1e-6,
        "rope_parameters": rotary,
    }
    config = Qwen2_5_VLConfig(text_config=text_config)
    with torch.device("meta"):
        parts = {
            "text_encoder": ("model.", Qwen2_5_VLTextModel(config.text_config)),
            "vae": ("", AutoencoderKLQwenImage(base_dim=vae_dim, z_dim=16)),
        }
    config.save_pretrained(folder / "text_encoder")
    parts["vae"][1].save_config(folder / "vae")
    make_tokenizer(TOKENIZER_CAPTIONS, TOKENIZER_VOCABULARY).save_pretrained(folder / "tokenizer")
    parameters = size = 0
    for component, (prefix, model) in parts.items():
        shapes = {prefix + name: parameter.shape for name, parameter in model.named_parameters()}
        pool = None if hollow else random_pool(text_dim)
        written = write_component(folder / component, shapes, pool, single=component == "vae")
        parameters, size = parameters + written[0], size + written[1]
    return parameters, size


def random_pool(width: int) -> Any:
    """The numbers that a model of this width takes its weights from, as bytes of bf16."""
    import torch

    values = torch.randn(POOL_VALUES, generator=torch.Generator().manual_seed(0)).mul_(width**-0.5)
    return values.bfloat16().view(torch.uint8).numpy()


def write_component(
    folder: Path, shapes: dict[str, Any], pool: Any, file_bytes: int = FILE_BYTES, single: bool = False
) -> tuple[int, int]:
    """The weights of one part of the model in files of `file_bytes` with an index, or in a `single` one."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if filled and filled + 2 * shape.numel() > file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += 2 * shape.numel()
    stem = "model" if folder.name == "text_encoder" else "diffusion_pytorch_model"
    if single:
        write_weights(folder / f"{stem}.safetensors", shapes, pool)
    else:
        weight_map: dict[str, str] = {}
        for number, names in enumerate(groups, start=1):
            file = folder / f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
            write_weights(file, {name: shapes[name] for name in names}, pool)
            weight_map |= dict.fromkeys(names, file.name)
        index = {"metadata": {"total_size": 2 * sum(s.numel() for s in shapes.values())}, "weight_map": weight_map}
        write_json(folder / f"{stem}.safetensors.index.json", index)
    return sum(s.numel() for s in shapes.values()), sum(path.stat().st_size for path in folder.iterdir())


def write_random_encoded(
    folder: Path,
    samples: int,
    width: int,
    height: int,
    prompt_tokens: int | Sequence[int],
    text_dim: int,
    buckets: int | Sequence[tuple[int, int]] = 1,
    family: str = "text-to-image",
    sources: Sequence[tuple[int, int]] = (),
    picture_tokens: int = 0,
    masks: bool = False,
) -> Path:
    """Encoded shards of noise that any model of `text_dim` accepts: `buckets` of them share the samples evenly.

    Bucket number b is height × (width + 32·b) pixels, unless their (width, height) are given; sample s has
    prompt_tokens − s % 3 tokens, or those given for it. Pairs for `family`: `sources` are width and height of each sample's
    source images, and its prompt begins with `picture_tokens` more tokens. `masks`: two of three samples have one.
    """
    import safetensors.torch
    import torch

    from data_prep.encoding.encoder_facts import LATENTS, PROMPTS
    from data_prep.images.stored_pixels import mask_share
    from data_prep.shard_format import shards as form
    from qwen_image.model.sizes import LATENT_CHANNELS, VAE_FACTOR

    folder.mkdir(parents=True)
    generator, of_masks = (torch.Generator().manual_seed(seed) for seed in (0, 1))

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    more = [form.PAIR_INDEX_ROWS] * bool(sources) + [form.MASK_INDEX_ROWS] * masks
    columns: dict[str, list[Any]] = {name: [] for name in form.with_more(form.INDEX_ROWS, *more).names}
    sizes = [(width + 32 * b, height) for b in range(buckets)] if isinstance(buckets, int) else list(buckets)
    lengths = prompt_tokens
    if isinstance(lengths, int):
        lengths = [lengths - index % 3 for index in range(samples)]
    assert len(lengths) == samples
    with form.TarShardWriter(folder / form.tar_name(0)) as tar:
        for index in range(samples):
            bucket, key = index % len(sizes), form.sample_key(0, index)
            tokens = lengths[index] + picture_tokens
            latent = noise(LATENT_CHANNELS, sizes[bucket][1] // VAE_FACTOR, sizes[bucket][0] // VAE_FACTOR)
            tensors = {"latent": latent, "prompt_embeds": noise(tokens, text_dim)}
            for number, size in enumerate(sources, start=1):
                tensors[f"source_latent_{number}"] = noise(
                    LATENT_CHANNELS, size[1] // VAE_FACTOR, size[0] // VAE_FACTOR
                )
            if sources:
                tensors["empty_prompt_embeds"] = noise(picture_tokens + 5, text_dim)
                tensors["picture_tokens"] = torch.tensor([picture_tokens], dtype=torch.int32)
            share = -1.0
            if masks and index % 3:
                tensors["mask"] = torch.randint(0, 256, latent.shape[1:], generator=of_masks, dtype=torch.uint8)
                share = mask_share(tensors["mask"].numpy())
            members = [("safetensors", safetensors.torch.save(tensors)), ("json", b"{}"), ("txt", b"noise")]
            places = tar.add(key, members)
            row = {"key": key, "path": key, "shard": 0, "bucket": bucket, "caption_length": 5, "prompt_tokens": tokens}
            for member, suffix in (("payload", "safetensors"), ("json", "json"), ("txt", "txt")):
                row[f"{member}_offset"], row[f"{member}_size"] = places[suffix]
            if sources:
                row |= {"sources_offset": 0, "sources_size": 0, "picture_tokens": picture_tokens}
            if masks:
                row |= {"mask_offset": 0, "mask_size": 0, "mask_share": share}
            for name, value in row.items():
                columns[name].append(value)
    form.write_index(folder, columns)
    if not sources:
        safetensors.torch.save_file({"prompt_embeds": noise(5, text_dim)}, folder / form.EMPTY_PROMPT)
    counts = [len(range(bucket, samples, len(sizes))) for bucket in range(len(sizes))]
    listed = [
        form.Bucket(b, *size, count, tuple(sources)) for b, (size, count) in enumerate(zip(sizes, counts, strict=True))
    ]
    shard = form.Shard(form.tar_name(0), samples, tar.bytes, tar.sha256)
    encoding: dict[str, Any] = {"model": "noise", "latents": LATENTS, "prompts": PROMPTS}
    fingerprint = f"{samples}x{sizes}x{prompt_tokens}x{text_dim}"
    if sources:
        edit = {"picture_positions": "grid", "empty_captions": True, "prompt_width": text_dim}
        encoding |= {"family": MEMBERS[family].name} | edit
        fingerprint += f"x{sources}x{picture_tokens}"
    totals = {"samples": samples}
    if masks:
        totals["masked"] = sum(share >= 0 for share in columns["mask_share"])
        fingerprint += "xmasks"
    manifest = form.Manifest("safetensors", fingerprint, {}, listed, totals, [shard], {}, encoding=encoding)
    form.write_manifest(folder, manifest)
    return folder


def write_weights(path: Path, shapes: dict[str, Any], pool: Any) -> None:
    """A bf16 file whose values are the pool's, over and over; without a pool it is a hole of the right size."""
    import torch

    from qwen_image.loading.safetensors_writer import data_bytes, safetensors_header

    layout = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    header = safetensors_header(layout)
    with whole_file(path) as file:
        file.write(header)
        if pool is None:
            file.truncate(len(header) + data_bytes(layout))
            return
        start = 0
        for shape in shapes.values():
            remaining = 2 * shape.numel()
            while remaining:
                piece = pool[start : start + remaining].data
                file.write(piece)
                remaining -= len(piece)
                start = (start + len(piece)) % (2 * POOL_VALUES - 2)
                start -= start % 2


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
