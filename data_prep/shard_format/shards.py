"""THE FORMAT of a data set on disk: names, members, manifest, index; writing one tar, reading one member.

A data set is a folder:

    000000.tar              members KEY.jpg KEY.json KEY.txt (or .safetensors .json .txt), adjacent, in this order; of a pair
                            (target and source images of an edit) also KEY.source_image.jpg, KEY.source_image_2.jpg …;
                            where the image has a mask, KEY.mask.png before those: grey, 8 bits, of the image's size, 255: learn
    000000.parquet          one row an INPUT of this shard, failed and filtered ones with their reason (SHARD_ROWS)
    000000_stats.json       counts, bytes and hashes; written last: a shard without it does not exist
    index.parquet           one row a SAMPLE of the whole set (INDEX_ROWS)
    manifest.json           what the set is: class Manifest
    sizes.json              {"000000.tar": samples}, which open_clip reads

In a set with pairs the bucket of a sample tells the sizes of its source images too, and rows and index have PAIR_ROWS and
PAIR_INDEX_ROWS besides; in one with masks MASK_ROWS and MASK_INDEX_ROWS. Encoded sets hold the mask, averaged onto the latent
grid, as the tensor `mask` of the payload (uint8 [H/8, W/8]). Where a sample has several captions, KEY.txt holds the first and
`captions` in KEY.json all of them; rows and index have CAPTION_ROWS. Where any sample's weight isn't 1, they have WEIGHT_ROWS,
and such samples a `weight` in their json.

In an encoded set with caption variants KEY.safetensors holds the first one's embedding, and members KEY.variant_2.safetensors …
behind KEY.txt those of the others. `variants` in KEY.json tells of each its caption, its tokens, which draws it is the outcome
of (equal ones are stored once), and its place and size behind KEY.txt. Rows and index have variant_rows, and prompt_tokens
are those of the longest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.shard_format.row_groups import write_row_groups
from data_prep.shard_format.weight_limits import MOST
from files.atomic_files import commit, json_bytes, partial_path, write_file
from files.plain_name import plain_name
from files.shown import shown

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.parquet"
SIZES = "sizes.json"
EMPTY_PROMPT = "empty_prompt.safetensors"
MAX_SIDE = 1 << 14  # pixels of a bucket: nothing that a model was trained on comes near

_OFFSETS = [(f"{m}_{f}", pa.int64()) for m in ("payload", "json", "txt") for f in ("offset", "size")]
INDEX_ROWS = pa.schema(
    [("key", pa.string()), ("path", pa.string()), ("shard", pa.int32()), ("bucket", pa.int32())]
    + _OFFSETS
    + [("caption_length", pa.int32()), ("prompt_tokens", pa.int32())]
)
# Rows of NNNNNN.parquet. status: ok | filtered | failed; reason: one of images/skip_reasons.py; detail: this case's values,
# and of samples what the decoder warned of.
# width, height: pixels of the bucket; original_*: upright pixels of the source; crop_*: box in those; -1 where unknown.
SHARD_ROWS = pa.schema(
    [("key", pa.string()), ("path", pa.string())]
    + [(name, pa.string()) for name in ("status", "reason", "detail", "caption", "sha256")]
    + [(name, pa.int32()) for name in ("width", "height", "original_width", "original_height")]
    + [(f"crop_{side}", pa.int32()) for side in ("left", "top", "width", "height")]
    + [("copied", pa.bool_()), ("frames", pa.int32())]
    + _OFFSETS
    + [("caption_length", pa.int32()), ("prompt_tokens", pa.int32())]
)
# Besides, in sets with pairs. sources: "1024x768+512x512", or "" without; sources_offset, _size: the run of the tar that holds
# the source members, their headers included (encoded sets have none); picture_tokens: those of prompt_tokens that are the
# pictures'; source_sha256: of the source images' files, with commas between them.
PAIR_INDEX_ROWS = pa.schema(
    [("sources_offset", pa.int64()), ("sources_size", pa.int64()), ("picture_tokens", pa.int32())]
)
# In sets where a sample has several captions: how many (0 or 1: one; the json member's `captions` holds them), and the
# characters of the longest.
CAPTION_ROWS = pa.schema([("captions", pa.int32()), ("longest_caption", pa.int32())])
VARIANT_TOKENS = "variant_tokens"  # in encoded sets with caption variants: variant_rows
PAIR_ROWS = pa.schema([("sources", pa.string()), ("source_sha256", pa.string()), *PAIR_INDEX_ROWS])
# Repeats of a sample in an epoch of training, above 0; 1 in sets without the column.
WEIGHT_ROWS = pa.schema([("weight", pa.float64())])
# Besides, in sets with masks. mask_offset, mask_size: of the member (encoded sets have none); mask_share: the mask's mean on
# the latent grid, 0 (all black) … 1, and -1 for a sample without; mask_sha256: of the mask's file ("" where it is the alpha
# channel).
MASK_INDEX_ROWS = pa.schema([("mask_offset", pa.int64()), ("mask_size", pa.int64()), ("mask_share", pa.float32())])
MASK_ROWS = pa.schema([("mask_sha256", pa.string()), *MASK_INDEX_ROWS])
NO_MASK = {"mask_sha256": "", "mask_offset": 0, "mask_size": 0, "mask_share": -1.0}
MASK_SUFFIX = "mask.png"
OPTIONAL_INDEX_ROWS = (PAIR_INDEX_ROWS, CAPTION_ROWS, WEIGHT_ROWS, MASK_INDEX_ROWS)


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def sample_key(shard: int, index: int) -> str:
    """12 digits: unique over the set, and without a dot, at which webdataset would cut the name."""
    if not (0 <= shard < 10**6 and 0 <= index < 10**6):
        raise ValueError(f"shard {shard}, sample {index}: a data set holds at most 1000000 shards of 1000000 samples")
    return f"{shard:06d}{index:06d}"


def tar_name(shard: int) -> str:
    return f"{shard:06d}.tar"


def rows_name(shard: int) -> str:
    return f"{shard:06d}.parquet"


def stats_name(shard: int) -> str:
    return f"{shard:06d}_stats.json"


def bucket_name(width: int, height: int, sources: Iterable[tuple[int, int]] = ()) -> str:
    """The bucket as it stands in a sample's json: '1024x768' (width x height, pixels); of a pair '1024x768+512x512'."""
    return "+".join(f"{width}x{height}" for width, height in [(width, height), *sources])


def sizes_of(bucket: str) -> list[tuple[int, int]]:
    """The inverse: the sizes of a bucket's image and of its source images; none for ""."""
    sides = [size.split("x") for size in bucket.split("+")] if bucket else []
    return [(int(width), int(height)) for width, height in sides]


def source_suffix(number: int) -> str:
    """The `number`-th source image's member, from 0: source_image, source_image_2 …"""
    return "source_image" + (f"_{number + 1}" if number else "")


# ── manifest ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Bucket:
    id: int
    width: int  # pixels, also in encoded sets (latents are width/8 wide)
    height: int
    count: int
    sources: tuple[tuple[int, int], ...] = ()  # width and height of each source image

    def __str__(self) -> str:
        return bucket_name(self.width, self.height, self.sources)


@dataclasses.dataclass(frozen=True)
class Shard:
    name: str
    samples: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """manifest.json: what a data set is and how it was made."""

    payload: str  # jpg | png | safetensors: suffix of each sample's first member
    fingerprint: str  # sha256 over options and inputs (for an encoded set: over the image set and the encoders)
    options: dict[str, Any]
    buckets: list[Bucket]
    totals: dict[str, Any]  # samples, bytes, and for image sets inputs, filtered, failed, reasons
    shards: list[Shard]  # those with samples; the index's `shard` column is a position in this list
    versions: dict[str, str]
    encoding: dict[str, Any] | None = None  # encoders and conventions of an encoded set
    format_version: int = FORMAT_VERSION


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json. It is written last: a folder with a manifest is complete."""
    fields = dataclasses.asdict(manifest)
    for bucket in fields["buckets"]:
        if not bucket["sources"]:  # as manifests were before there were pairs
            del bucket["sources"]
    write_file(folder / MANIFEST, json_bytes(fields))


def read_manifest(folder: str | Path) -> Manifest:
    """Read manifest.json.

    Raises FileNotFoundError when there is none, ValueError when it is damaged, of another format version, or names
    shards outside of the folder.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        what = "no such folder" if not path.parent.is_dir() else f"no {MANIFEST} in it"
        raise FileNotFoundError(f"{folder} is not a finished data set: {what}. Make one with data_prep/make_shards.py")
    try:
        fields = json.loads(path.read_bytes())
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"{path} has format version {version}, this code reads {FORMAT_VERSION}: pack again")
        fields["buckets"] = [_bucket(**bucket) for bucket in fields["buckets"]]
        fields["shards"] = [Shard(**shard) for shard in fields["shards"]]
        for shard in fields["shards"]:
            if not plain_name(shard.name, path).endswith(".tar") or shard.name.startswith("."):
                raise ValueError(
                    f"{path} is damaged or not to be trusted: {shown(repr(shard.name))} is no shard (*.tar)"
                )
        return _typed(Manifest(**fields))
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): run the program that made it again") from None


def _bucket(sources: Iterable[Iterable[int]] = (), **fields: Any) -> Bucket:
    return Bucket(**fields, sources=tuple((width, height) for width, height in sources))


def _typed(manifest: Manifest) -> Manifest:
    """The manifest, if its values are of their types. Raises TypeError that names one that isn't."""
    values: list[tuple[str, type, Any]] = [
        ("payload", str, manifest.payload),
        ("fingerprint", str, manifest.fingerprint),
    ]
    values += [(name, dict, getattr(manifest, name)) for name in ("options", "totals", "versions")]
    for bucket in manifest.buckets:
        values += [(f"a bucket's {name}", int, value) for name, value in vars(bucket).items() if name != "sources"]
        values += [("a source image's side", int, side) for size in bucket.sources for side in size]
        for sides in ((bucket.width, bucket.height), *bucket.sources):
            if any(type(side) is int and side > MAX_SIDE for side in sides):
                raise TypeError(f"a bucket has {sides[0]}x{sides[1]} pixels, more than {MAX_SIDE} on a side")
    for shard in manifest.shards:
        values += [(f"{shard.name}'s {name}", int, getattr(shard, name)) for name in ("samples", "bytes")]
        values.append((f"{shard.name}'s sha256", str, shard.sha256))
    for name, kind, value in values:
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            raise TypeError(f"{name} is {str(value)[:40]!r}, not {'a count' if kind is int else kind.__name__}")
    return manifest


# ── index ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """index.parquet as numpy columns [N], in the order of the tars."""

    key: np.ndarray  # <U12; empty strings when read with strings=False
    path: np.ndarray  # object (str): the source, for messages; empty strings when read with strings=False
    shard: np.ndarray  # int32: position in manifest.shards
    bucket: np.ndarray  # int32: Bucket.id
    payload_offset: np.ndarray  # int64, bytes from the start of the tar to the member's content
    payload_size: np.ndarray  # int64, bytes
    json_offset: np.ndarray
    json_size: np.ndarray
    txt_offset: np.ndarray
    txt_size: np.ndarray
    caption_length: np.ndarray  # int32, characters
    prompt_tokens: np.ndarray  # int32; 0 when unknown
    sources_offset: np.ndarray  # int64; this and what follows: 0 in sets without pairs
    sources_size: np.ndarray  # int64
    picture_tokens: np.ndarray  # int32: so many of prompt_tokens are source images'
    captions: np.ndarray  # int32; this and what follows: 0 in sets where no sample has several
    longest_caption: np.ndarray  # int32, characters
    variant_tokens: (
        np.ndarray
    )  # int32 [N, variants]: the tokens of each draw, 0 behind the last; no column without variants
    weight: np.ndarray  # float64: repeats an epoch; 1 in sets without weights
    mask_offset: np.ndarray  # int64; this and the next: 0 in sets without masks, and in encoded ones
    mask_size: np.ndarray  # int64
    mask_share: np.ndarray  # float32, mean of the mask, from 0 to 1; -1 without a mask

    def __len__(self) -> int:
        return len(self.shard)


def write_rows(path: Path, columns: Mapping[str, Any], schema: pa.Schema) -> None:
    """Write a parquet file of `schema`; `columns` maps every column's name to a sequence, all of one length."""
    write_row_groups(path, [columns], schema)


def write_index(folder: Path, columns: Mapping[str, Any]) -> None:
    """Write index.parquet from sequences of equal length, one for each column of INDEX_ROWS; with OPTIONAL if given."""
    variants = len(columns[VARIANT_TOKENS][0]) if columns.get(VARIANT_TOKENS) else 0
    write_rows(folder / INDEX, columns, index_schema(columns.keys(), variants))


def index_schema(names: Iterable[str], variants: int = 0) -> pa.Schema:
    """The schema of an index that has, among others, columns of these names, and those of `variants` of captions."""
    there = set(names)
    found = [more for more in OPTIONAL_INDEX_ROWS if set(more.names) <= there]
    return with_more(INDEX_ROWS, *found, *[variant_rows(variants)] * (variants > 1))


def variant_rows(count: int) -> pa.Schema:
    """What rows and index have besides in an encoded set of so many caption variants: the tokens of each, 0 where a sample has
    fewer."""
    return pa.schema([(VARIANT_TOKENS, pa.list_(pa.int32(), count))])


def variants_in(schema: pa.Schema) -> int:
    """How many variants of captions the rows of a file have; 0 without. Raises ValueError for a column of another type."""
    if VARIANT_TOKENS not in schema.names:
        return 0
    kind = schema.field(VARIANT_TOKENS).type
    if not pa.types.is_fixed_size_list(kind) or kind.value_type != pa.int32():
        raise ValueError(f"{VARIANT_TOKENS} is {kind}, not a list of int32 of one length")
    return int(kind.list_size)


def with_more(schema: pa.Schema, *more: pa.Schema) -> pa.Schema:
    """The schema of rows or index in a set that has more columns: of pairs, of several captions."""
    return pa.schema([*schema, *(field for each in more for field in each)])


_REMAKE = "delete it and run the program that made it again"


def read_index(folder: str | Path, *, strings: bool = True) -> ShardIndex:
    """Read index.parquet. `strings=False` leaves keys and paths out, which at 10 M samples are most of the memory."""
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {INDEX}: make it with data_prep/make_shards.py or scan.build_index")
    try:
        there = pq.read_schema(path)
        schema = index_schema(there.names, variants_in(there))
        names = [name for name in schema.names if strings or name not in ("key", "path")]
        table = pq.read_table(path, columns=names, schema=pa.schema([schema.field(name) for name in names]))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}): {_REMAKE}") from None
    if any(table[name].null_count for name in names):
        raise ValueError(f"{path} is damaged (it has empty cells): {_REMAKE}")
    columns = {name: table[name].to_numpy() for name in names if name != VARIANT_TOKENS}
    columns[VARIANT_TOKENS] = (
        _lists(table[VARIANT_TOKENS], path) if VARIANT_TOKENS in names else np.zeros((len(table), 0), int)
    )
    blank = np.zeros(len(table), "U1")
    columns["key"] = columns["key"].astype("U12") if strings else blank
    columns.setdefault("path", blank)
    columns.setdefault("weight", np.ones(len(table)))
    for field in with_more(*OPTIONAL_INDEX_ROWS):
        columns.setdefault(field.name, np.full(len(table), NO_MASK.get(field.name, 0), field.type.to_pandas_dtype()))
    return ShardIndex(**columns)


def _lists(column: pa.ChunkedArray, path: Path) -> np.ndarray:
    """A column of lists of one length as an array [N, length]."""
    flat = pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type)
    if flat.null_count or len(flat) != len(column) * column.type.list_size:
        raise ValueError(f"{path} is damaged (it has empty cells): {_REMAKE}")
    return flat.to_numpy().reshape(len(column), column.type.list_size)


def check_index(index: ShardIndex, manifest: Manifest, folder: object) -> None:
    """Does every row name a bucket and a shard of the manifest, and a place in that shard? Raises ValueError for the first.

    A row that doesn't can't be read as a broken sample: nobody knows which shard or bucket it is of.
    """
    bucket_ids = [bucket.id for bucket in manifest.buckets]
    wrong = ~np.isin(index.bucket, bucket_ids) | (index.shard < 0) | (index.shard >= len(manifest.shards))
    known = np.clip(index.shard, 0, max(len(manifest.shards) - 1, 0))
    ends = np.array([shard.bytes for shard in manifest.shards] or [0], dtype=np.int64)[known]
    for name in ("payload", "json", "txt", "sources", "mask"):
        offset, size = (getattr(index, f"{name}_{field}") for field in ("offset", "size"))
        inside = (size >= 0) & (offset >= tarfile.BLOCKSIZE) & (size <= ends) & (offset <= ends - size)
        wrong |= ~inside & ((size != 0) | (name == "payload"))
    if (bad := ~((index.weight > 0) & (index.weight <= MOST**2))).any():
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(f"{shown(folder)}: {INDEX} is damaged: row {row} has weight {index.weight[row]:g}; {_REMAKE}")
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        place = ", ".join(
            f"{name} {getattr(index, name)[row]}" for name in ("shard", "bucket", "payload_offset", "payload_size")
        )
        raise ValueError(
            f"{shown(folder)}: {INDEX} is damaged or of another {MANIFEST}: {int(wrong.sum())} of {len(index)} rows name a "
            f"shard, a bucket or a place that isn't there, first row {row} ({place}); {_REMAKE}"
        )


# ── one tar ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class TarShardWriter:
    """Writes one tar whose bytes depend on its members alone (mtime 0, uid 0, mode 644, ustar headers).

    The file appears under its name only when `finish` was called, or the `with` block ended without an exception.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self.sha256 = ""
        self._hash = hashlib.sha256()
        self._partial = partial_path(path)
        self._file: IO[bytes] | None = open(self._partial, "wb", buffering=1 << 20)  # noqa: SIM115

    def add(self, key: str, members: Iterable[tuple[str, bytes]]) -> dict[str, tuple[int, int]]:
        """Append the members KEY.suffix of one sample, in the order given; return {suffix: (offset, size)}."""
        places = {}
        for suffix, data in members:
            header = tarfile.TarInfo(f"{key}.{suffix}")
            header.size = len(data)
            self._write(header.tobuf(tarfile.USTAR_FORMAT))
            places[suffix] = (self.bytes, len(data))
            self._write(data)
            self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return places

    def _write(self, data: bytes) -> None:
        assert self._file is not None, "the shard is finished"
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    def finish(self) -> None:
        """End the archive, fsync, rename. Afterwards `bytes` and `sha256` are those of the file."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.bytes % tarfile.RECORDSIZE))
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        commit(self._partial, self.path)
        self.sha256 = self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._file is not None:
                self.finish()
        finally:  # finishing flushes, and so may be what finds the disk full
            if self._file is not None:
                with contextlib.suppress(OSError):  # so does closing; the first exception is the one to show
                    self._file.close()
                self._file = None
                self._partial.unlink(missing_ok=True)


def members_of(run: bytes) -> list[bytes]:
    """The contents of tar members, of a run of whole ones with their headers. Raises ValueError for what is none."""
    found, position = [], 0
    while position < len(run):
        try:
            header = tarfile.TarInfo.frombuf(run[position : position + tarfile.BLOCKSIZE], "utf-8", "strict")
        except tarfile.HeaderError as error:
            raise ValueError(f"no tar member where the index says one ({error})") from None
        position += tarfile.BLOCKSIZE
        found.append(run[position : position + header.size])
        position += -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return found


def variant_suffix(number: int) -> str:
    """The member of a sample's `number`-th stored variant, from 2: the first is its payload."""
    return f"variant_{number}.safetensors"


def padded(size: int) -> int:
    """Bytes that a member's content of `size` takes in a tar."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


@dataclasses.dataclass(frozen=True)
class StoredVariant:
    """One of a sample's caption variants, from `variants` in its json member."""

    caption: str
    tokens: int
    draws: tuple[int, ...]  # which of the draws have it as their outcome
    offset: int = 0  # from the end of KEY.txt in the tar, its padding included; the first has none: it is the payload
    size: int = 0


def variants_of(record: bytes) -> list[StoredVariant]:
    """The variants of a sample of an encoded set, the first one first; none where it has one caption.

    Raises ValueError for what is no such list, or where a draw has no outcome or two.
    """
    try:
        found = [
            StoredVariant(**each | {"draws": tuple(each["draws"])}) for each in json.loads(record).get("variants", [])
        ]
        draws = sorted(draw for each in found for draw in each.draws)
        sound = all(type(n) is int and n >= 0 for each in found for n in (each.tokens, each.offset, each.size))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"variants in its json: {error}") from None
    if not sound or draws != list(range(len(draws))) or not all(isinstance(each.caption, str) for each in found):
        raise ValueError("variants in its json are damaged")
    return found


def captions_of(record: bytes) -> list[str]:
    """All captions of a sample that has several, from its json member. Raises ValueError where it has no such list."""
    captions = json.loads(record)["captions"]
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError("captions in its json is no list of texts")
    return captions


def original_sizes(record: bytes) -> list[tuple[int, int]]:
    """Width and height of a pair's source images before they were packed, from its json member."""
    sources = json.loads(record)["sources"]
    return [(int(source["original_width"]), int(source["original_height"])) for source in sources]


class ShardReader:
    """Random access into the tars of a data set. Picklable: each process opens its own descriptors late."""

    def __init__(self, folder: str | Path, manifest: Manifest | None = None) -> None:
        self.folder = Path(folder)
        self.names = [shard.name for shard in (manifest or read_manifest(folder)).shards]
        self._files: dict[int, int] = {}
        self._process = os.getpid()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of the tar at position `shard` of the manifest.

        Raises FileNotFoundError when the tar is gone and ValueError when it is shorter than the index says.
        """
        if self._process != os.getpid():  # forked: the parent's descriptors are not ours to close
            self._files, self._process = {}, os.getpid()
        if shard not in self._files:
            path = self.folder / self.names[shard]
            if not path.is_file():
                raise FileNotFoundError(f"{path} is named in the manifest but missing: pack again or copy it back")
            self._files[shard] = os.open(path, os.O_RDONLY)
        data = os.pread(self._files[shard], int(size), int(offset))
        if len(data) != size:
            raise ValueError(
                f"{self.folder / self.names[shard]} ends before byte {offset + size}: the file is truncated"
            )
        return data

    def close(self) -> None:
        if self._process == os.getpid():
            for file in self._files.values():
                os.close(file)
        self._files = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _process=os.getpid())
