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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.encoding.caption_variants import Variants, add_caption_flags
from data_prep.shard_format.shards import ShardReader, check_index, read_index, read_manifest
from files.shown import one_line, tolerant_output
from qwen_image.loading.model_flags import add_model_flags

if TYPE_CHECKING:
    from data_prep.encoding.encoded_samples import Sample
    from data_prep.encoding.encoded_set import EncodedSet
    from data_prep.encoding.encoders import Encoders
    from data_prep.shard_format.shards import Manifest, ShardIndex
    from files.folder_lock import FolderLock
    from qwen_image.loading.model_files import ModelFiles


def main(argv: list[str] | None = None) -> int:
    tolerant_output()
    try:
        return encode(build_parser().parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; finished shards stay valid: start again to go on", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_model_flags(parser, "text_encoder", "vae", "tokenizer")
    parser.add_argument("--data", required=True, type=Path, help="folder of image shards (make_shards.py)")
    parser.add_argument("--output_path", required=True, type=Path, help="folder for the encoded shards")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of the encoders; not given: bfloat16 on a GPU, float32 (5 to 10 times as fast there) on a CPU",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="images of one bucket encoded together (default 8)")
    parser.add_argument("--num_workers", type=int, default=4, help="threads that decode images (default 4)")
    parser.add_argument(
        "--on_broken_sample",
        choices=("stop", "skip"),
        default="stop",
        help="an image or caption that cannot be read ends the run (default), or is left out, named and counted",
    )
    parser.add_argument("--gpu_memory_limit", type=float, metavar="GIB", help="take the card for one of so many GiB")
    parser.add_argument("--latent_std", action="store_true", help="store the posterior's standard deviation too")
    parser.add_argument(
        "--empty_captions",
        action="store_true",
        help="of pairs: store the embedding of the empty caption with each sample's source images too, which training with "
        "--caption_dropout needs (about 10 MB a sample for Qwen-Image-Edit, 1.4 MB an image for -2509 and -2511)",
    )
    add_caption_flags(parser)
    parser.add_argument(
        "--caption_variants",
        type=int,
        default=1,
        metavar="K",
        help="encode so many forms of each sample's captions, of which training draws one in each epoch; equal ones are stored "
        "once (default 1: the first caption, without chance)",
    )
    parser.add_argument("--caption_seed", type=int, default=0, help="of what is drawn for the variants (default 0)")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


def encode(arguments: argparse.Namespace) -> int:
    """Encode this rank's share of the shards; the last rank to finish writes index and manifest."""
    from data_prep.encoding.encoded_set import EncodedSet
    from data_prep.encoding.encoders import Encoders, encoder_dtype
    from data_prep.packing.output_folder import LOCKS, output_lock

    if arguments.batch_size < 1 or arguments.num_workers < 1:
        raise ValueError(
            f"--batch_size ({arguments.batch_size}) and --num_workers ({arguments.num_workers}) start at 1"
        )
    manifest, index = read_manifest(arguments.data), read_index(arguments.data)
    check_index(index, manifest, arguments.data)
    if manifest.payload == "safetensors":
        raise ValueError(f"--data {arguments.data} holds encoded shards already; give the folder of image shards")
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))

    variants = Variants.from_options(arguments, int(index.captions.max(initial=1)))
    files = model_files(arguments)
    for line in [
        *variant_lines(variants, arguments, manifest, index),
        *check_pairs(files, manifest, arguments, variants),
    ]:
        print(line)
    described = describe(files, arguments, variants)
    encoded = EncodedSet(arguments.output_path, manifest, index, described, arguments.data, variants)
    options = encoder_dtype(arguments.dtype), arguments.latent_std, arguments.empty_captions
    encoders: list[Encoders] = []  # empty until a shard, or the empty prompt, needs them

    def loaded() -> Encoders:
        if not encoders:
            encoders.append(Encoders.load(files, *options, arguments.batch_size, arguments.gpu_memory_limit))
        return encoders[0]

    with output_lock(arguments.output_path / LOCKS, "encoding", rank, world) as lock:
        encoded.prepare(None if files.member.most_sources else lambda: loaded().empty_prompt())
        return encode_share(arguments, manifest, index, encoded, loaded, (rank, world), lock)


def encode_share(
    arguments: argparse.Namespace,
    manifest: Manifest,
    index: ShardIndex,
    encoded: EncodedSet,
    loaded: Callable[[], Encoders],
    place: tuple[int, int],
    lock: FolderLock,
) -> int:
    """The shards of rank `place[0]` of `place[1]` that are not done yet; the manifest where they are the last ones."""
    from data_prep.encoding.encoded_samples import EncodedSamples

    rank, world = place
    share = range(len(manifest.shards))[rank::world]
    mine = [shard for shard in share if not encoded.is_done(shard)]
    if not mine and encoded.is_finished():
        print(f"rank {rank}: nothing to do, {arguments.output_path} is finished")
        return 0
    if len(mine) < len(share):
        print(f"rank {rank}: {len(share) - len(mine)} of {len(share)} shards are encoded already")

    from tqdm import tqdm

    reader, skip = ShardReader(arguments.data, manifest), arguments.on_broken_sample == "skip"
    todo = sum(manifest.shards[shard].samples for shard in mine)
    with tqdm(total=todo, desc=f"encoding (rank {rank})", unit="image", disable=rank != 0) as progress:
        for shard in mine:
            lock.require()
            rows = np.flatnonzero(index.shard == shard)
            options = arguments.batch_size, arguments.num_workers, skip, encoded.variants
            samples = EncodedSamples(loaded(), reader, manifest, index, *options)
            encoded.write_shard(shard, rows, counted(samples.of(rows), progress), loaded().tokens_of)
    if missing := encoded.missing():
        print(f"rank {rank}: {len(missing)} of {len(manifest.shards)} shards are left to other ranks")
        return 0
    lock.require()
    totals = encoded.finish().totals
    left_out = f", {totals['failed']} samples left out" if totals["failed"] else ""
    for line in [*encoded.long_captions(), *peak_line()]:
        print(line)
    if masked := totals.get("masked"):
        print(f"{masked} samples have a mask, stored on the latent grid: train_lora.py --masked_loss uses it")
    print(f"{totals['samples']} samples in {len(manifest.shards)} shards{left_out}: {arguments.output_path}")
    return 0


def peak_line() -> list[str]:
    """The most that this rank's GPU held; none without one."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"]


def counted(samples: Iterator[Sample], progress: Any) -> Iterator[Sample]:
    for sample in samples:
        yield sample
        progress.update()


def model_files(arguments: argparse.Namespace) -> ModelFiles:
    from qwen_image.loading.model_files import ModelSource, resolve_model

    return resolve_model(ModelSource.from_options(arguments), ("text_encoder", "tokenizer", "vae"))


def variant_lines(
    variants: Variants, arguments: argparse.Namespace, manifest: Manifest, index: ShardIndex
) -> list[str]:
    """For people: what becomes of captions, and those that are left out."""
    told = variants.identity()
    several, most = int((index.captions > 1).sum()), int(index.captions.max(initial=1))
    said = []
    if told:
        what = f"{variants.count} variants of each sample's" if variants.count > 1 else "each sample's first"
        said.append(f"captions: {what}, {variants.options.flags() or 'as they stand'}")
    if arguments.caption_variants > variants.count:
        said.append(
            f"--caption_variants {arguments.caption_variants}: no sample has more than {variants.count} different ones without "
            "another of the caption flags"
        )
    if several and variants.count < most:
        said.append(
            f"{several} samples have several captions, up to {most}, of which {variants.count} at most "
            f"{'is' if variants.count == 1 else 'are'} encoded: --caption_variants {most} holds all"
        )
    return said


def describe(files: ModelFiles, arguments: argparse.Namespace, variants: Variants) -> dict[str, Any]:
    """`Manifest.encoding` of these encoders, from their files: no weights are loaded."""
    from transformers import AutoTokenizer

    from data_prep.encoding.encoder_facts import describe_encoding
    from data_prep.encoding.encoders import encoder_dtype

    tokenizer = AutoTokenizer.from_pretrained(files["tokenizer"].folder)
    edit = None
    if files.member.most_sources:
        edit = {
            "family": files.member.name,
            "picture_positions": files.picture_positions,
            "empty_captions": arguments.empty_captions,
            "prompt_width": prompt_width(files),
        }
    return describe_encoding(
        model=files.name,
        revision=files.revision,
        vae=files.fingerprint("vae"),
        text_encoder=files.fingerprint("text_encoder"),
        template_drop=len(tokenizer(files.member.prefix).input_ids),
        latent_std=arguments.latent_std,
        computed_in=encoder_dtype(arguments.dtype),
        edit=edit,
        captions=variants.identity(),
    )


def prompt_width(files: ModelFiles) -> int:
    from transformers import Qwen2_5_VLConfig

    return int(Qwen2_5_VLConfig.from_pretrained(files["text_encoder"].folder).text_config.hidden_size)


def check_pairs(files: ModelFiles, manifest: Manifest, arguments: argparse.Namespace, variants: Variants) -> list[str]:
    """Do model and images go together? Raises ValueError if not; lines for people about what will be stored."""
    from qwen_image.encoders.text_encoder import text_tokens_of

    for bucket in manifest.buckets:
        files.member.check_sources(len(bucket.sources), f"{arguments.data}: each of {bucket.count} samples ({bucket})")
    if not files.member.most_sources:
        if arguments.empty_captions:
            raise ValueError(
                f"--empty_captions is for pairs: {files.member.name} has one empty caption for all samples"
            )
        return []
    samples = sum(bucket.count for bucket in manifest.buckets)
    tokens = sum(bucket.count * text_tokens_of(files.member, bucket.sources) for bucket in manifest.buckets)
    size = 2 * prompt_width(files) * tokens * variants.count
    said = (
        f"{samples} pairs for {files.member.name}: {tokens // samples} tokens of pictures a prompt, {size / 1e9:.2f} GB"
    )
    both = size * (variants.count + 1) / variants.count
    return [said + (f"; with the empty captions {both / 1e9:.2f} GB" * arguments.empty_captions)]


if __name__ == "__main__":
    sys.exit(main())
