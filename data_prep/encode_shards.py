"""Image shards to encoded shards: VAE latents and prompt embeddings, so that training needs neither encoder.

    python data_prep/encode_shards.py --model Qwen/Qwen-Image --data SHARDS --output_path ENCODED
    deepspeed data_prep/encode_shards.py --model Qwen/Qwen-Image --data SHARDS --output_path ENCODED   # every GPU of a node
    sbatch slurm/encode_shards.sh --model Qwen/Qwen-Image --data SHARDS --output_path ENCODED

Ranks share the shards out among themselves without talking; whoever ends last writes the manifest. A shard is written
whole or not at all, so a killed run goes on where it stopped. Sample keys, order and buckets stay those of the images.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.shards import Manifest, ShardIndex, ShardReader, read_index, read_manifest, tar_name

if TYPE_CHECKING:
    import torch

    from qwen_image.text_encoder import TextEncoder
    from qwen_image.vae import VAE

CACHED_CAPTIONS = 4096  # embeddings of the latest captions; about 1 MB each at 150 tokens


def main(argv: list[str] | None = None) -> int:
    try:
        return encode(build_parser().parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="folder in the Hugging Face layout, or a hub id")
    parser.add_argument("--data", required=True, type=Path, help="folder of image shards (make_shards.py)")
    parser.add_argument("--output_path", required=True, type=Path, help="folder for the encoded shards")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--text_encoder_path", help="file, folder or glob to use for the text encoder")
    parser.add_argument("--vae_path", help="file, folder or glob to use for the VAE")
    parser.add_argument("--tokenizer_path", help="folder to use for the tokenizer")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of the encoders; not given: bfloat16 on a GPU, float32 (5 to 10 times as fast there) on a CPU",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="images of one bucket encoded together (default 8)")
    parser.add_argument("--num_workers", type=int, default=4, help="threads that decode images (default 4)")
    parser.add_argument("--latent_std", action="store_true", help="store the posterior's standard deviation too")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


def encode(arguments: argparse.Namespace) -> int:
    """Encode this rank's share of the shards; the last rank to finish writes index and manifest."""
    from data_prep.encoded_set import EncodedSet

    if arguments.batch_size < 1 or arguments.num_workers < 1:
        raise ValueError(
            f"--batch_size ({arguments.batch_size}) and --num_workers ({arguments.num_workers}) start at 1"
        )
    manifest, index = read_manifest(arguments.data), read_index(arguments.data)
    if manifest.payload == "safetensors":
        raise ValueError(f"--data {arguments.data} holds encoded shards already; give the folder of image shards")
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))

    encoders = Encoders.load(arguments)
    encoded = EncodedSet(arguments.output_path, manifest, index, encoders.description, arguments.data)
    encoded.prepare(encoders.empty_prompt)
    mine = [shard for shard in range(len(manifest.shards))[rank::world] if not encoded.is_done(shard)]
    todo = sum(manifest.shards[shard].samples for shard in mine)
    skipped = len(range(len(manifest.shards))[rank::world]) - len(mine)
    if skipped:
        print(f"rank {rank}: {skipped} shards are encoded already")

    from tqdm import tqdm

    reader = ShardReader(arguments.data, manifest)
    with tqdm(
        total=todo, desc=f"encoding (rank {rank})", unit="image", disable=None if rank == 0 else True
    ) as progress:
        for shard in mine:
            rows = np.flatnonzero(index.shard == shard)
            samples = encode_rows(encoders, reader, manifest, index, rows, arguments.batch_size, arguments.num_workers)
            encoded.write_shard(shard, rows, counted(samples, progress))
    if encoded.finish_if_complete():
        print(f"{len(index)} samples in {len(manifest.shards)} shards: {arguments.output_path}")
    return 0


def counted(
    samples: Iterator[tuple[int, dict[str, torch.Tensor]]], progress: Any
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    for sample in samples:
        yield sample
        progress.update()


def encode_rows(
    encoders: Encoders,
    reader: ShardReader,
    manifest: Manifest,
    index: ShardIndex,
    rows: np.ndarray,
    batch_size: int,
    threads: int,
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """(row, tensors) of every sample of `rows`, bucket by bucket, images decoded ahead in threads.

    The batches depend on the shard alone, so a shard's bytes do not depend on ranks or restarts.
    """
    from data_prep.pixels import decode_stored

    sizes = {bucket.id: (bucket.width, bucket.height) for bucket in manifest.buckets}

    def load(row: int) -> tuple[np.ndarray, str]:
        width, height = sizes[int(index.bucket[row])]
        place = int(index.shard[row]), int(index.payload_offset[row]), int(index.payload_size[row])
        text = reader.read(place[0], int(index.txt_offset[row]), int(index.txt_size[row]))
        try:
            return decode_stored(reader.read(*place), width, height), text.decode("utf-8")
        except (ValueError, OSError) as error:
            shard = tar_name(int(index.shard[row]))
            raise ValueError(f"{index.key[row]} in {shard} ({index.path[row]}) cannot be read: {error}") from error

    ordered = rows[np.argsort(index.bucket[rows], kind="stable")]
    cuts = np.flatnonzero(np.diff(index.bucket[ordered])) + 1
    batches = [
        part[start : start + batch_size]
        for part in np.split(ordered, cuts)
        for start in range(0, len(part), batch_size)
    ]
    with ThreadPoolExecutor(threads) as pool:
        ahead = [pool.submit(load, int(row)) for row in batches[0]] if batches else []
        for batch, following in zip(batches, [*batches[1:], np.array([], dtype=np.int64)], strict=True):
            loaded = [future.result() for future in ahead]
            ahead = [pool.submit(load, int(row)) for row in following]
            tensors = encoders.encode([pixels for pixels, _ in loaded], [caption for _, caption in loaded])
            yield from zip((int(row) for row in batch), tensors, strict=True)


@dataclass
class Encoders:
    """VAE and text encoder of one model on this rank's device."""

    vae: VAE
    text_encoder: TextEncoder
    description: dict[str, Any]
    latent_std: bool

    def __post_init__(self) -> None:
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()

    @classmethod
    def load(cls, arguments: argparse.Namespace) -> Encoders:
        import torch

        from data_prep.encoding import describe_encoding
        from qwen_image.loading import ModelSource
        from qwen_image.pipeline import QwenImagePipeline

        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        source = ModelSource(
            arguments.model,
            revision=arguments.revision,
            text_encoder_path=arguments.text_encoder_path,
            vae_path=arguments.vae_path,
            tokenizer_path=arguments.tokenizer_path,
        )
        pipeline = QwenImagePipeline.from_pretrained(
            source,
            components=("text_encoder", "vae"),
            dtype=getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")),
            device=device,
        )
        assert pipeline.vae is not None and pipeline.text_encoder is not None
        description = describe_encoding(
            model=pipeline.files.name,
            revision=pipeline.files.revision,
            vae=pipeline.files.fingerprint("vae"),
            text_encoder=pipeline.files.fingerprint("text_encoder"),
            template_drop=pipeline.text_encoder.template_drop,
            latent_std=arguments.latent_std,
        )
        return cls(pipeline.vae, pipeline.text_encoder, description, arguments.latent_std)

    def encode(self, images: list[np.ndarray], captions: list[str]) -> list[dict[str, torch.Tensor]]:
        """Per sample: latent bf16 [16, H/8, W/8], prompt_embeds bf16 [T, D], and latent_std if asked."""
        import torch

        from qwen_image.vae import pixels_from_uint8

        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(self.vae.device, non_blocking=True)
        mode, std = self.vae.encode_moments(pixels_from_uint8(pixels))
        latents = mode.squeeze(2).to(torch.bfloat16).cpu()
        samples = [
            {"latent": latent.contiguous(), "prompt_embeds": embeds}
            for latent, embeds in zip(latents, self.encode_captions(captions), strict=True)
        ]
        if self.latent_std:
            for sample, deviation in zip(samples, std.squeeze(2).to(torch.bfloat16).cpu(), strict=True):
                sample["latent_std"] = deviation.contiguous()
        return samples

    def encode_captions(self, captions: list[str]) -> list[torch.Tensor]:
        """bf16 [T, D] each, on the CPU; a caption that came lately is not encoded again."""
        import torch

        unknown = [caption for caption in dict.fromkeys(captions) if caption not in self._cache]
        if unknown:
            for caption, embeds in zip(unknown, self.text_encoder.encode_list(unknown), strict=True):
                self._cache[caption] = embeds.to("cpu", torch.bfloat16).contiguous()
        for caption in captions:
            self._cache.move_to_end(caption)
        found = [self._cache[caption] for caption in captions]
        while len(self._cache) > CACHED_CAPTIONS:
            self._cache.popitem(last=False)
        return found

    def empty_prompt(self) -> bytes:
        """The embedding of the empty caption as a safetensors file: what caption dropout trains with."""
        import safetensors.torch

        return safetensors.torch.save({"prompt_embeds": self.encode_captions([""])[0]})


if __name__ == "__main__":
    sys.exit(main())
