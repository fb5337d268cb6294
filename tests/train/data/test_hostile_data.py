"""Encoded shards that hold something else than they should: a broken sample with its key, or one clear line; never another."""

import json
import shutil
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from data_prep.shard_format.shards import EMPTY_PROMPT, INDEX, MANIFEST, TarShardWriter, read_index, write_index
from tests.helpers.data_sets import MEMBERS, embeds_of, latent_of, write_set
from train.data.batch import make_batch
from train.data.draws import sample_draws
from train.data.remote_shards import open_remote
from train.data.sample import BrokenSample
from train.data.shard_dataset import ShardDataset
from train.flow.timestep_sampling import SigmaSampling

SAMPLES = 6


def rewrite(folder: Path, number: int, payload: bytes) -> None:
    """The set with another payload for one sample, indexed as the others are."""
    index = read_index(folder)
    with TarShardWriter(folder / "new.tar") as tar:
        columns = {name: getattr(index, name).copy() for name in pq.read_schema(folder / INDEX).names}
        data = (folder / "000000.tar").read_bytes()
        for row in range(len(index)):
            parts = []
            for name, suffix in zip(MEMBERS, ("safetensors", "json", "txt"), strict=True):
                start, size = columns[f"{name}_offset"][row], columns[f"{name}_size"][row]
                parts.append((suffix, payload if name == "payload" and row == number else data[start : start + size]))
            for name, place in zip(MEMBERS, tar.add(str(index.key[row]), parts).values(), strict=True):
                columns[f"{name}_offset"][row], columns[f"{name}_size"][row] = place
    (folder / "new.tar").rename(folder / "000000.tar")
    write_index(folder, columns)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["shards"][0] |= {"bytes": tar.bytes, "sha256": tar.sha256}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def sample(**other: torch.Tensor) -> bytes:
    return safetensors.torch.save({"latent": latent_of(2), "prompt_embeds": embeds_of(2)} | other)


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[3] = float("nan")
    return tensor


DAMAGES = {
    "int16 latents": (sample(latent=latent_of(2).to(torch.int16)), "latent is int16, encoded shards hold bfloat16"),
    "declared float16": (sample(latent=latent_of(2).view(torch.float16)), "latent is float16"),
    "float32 prompt": (sample(prompt_embeds=embeds_of(2).float()), "prompt_embeds is float32"),
    "prompt width": (sample(prompt_embeds=embeds_of(2)[:, :7].contiguous()), r"shape \(7, 7\), must be \(T, 8\)"),
    "no token": (sample(prompt_embeds=embeds_of(2)[:0]), r"shape \(0, 8\)"),
    "NaN latent": (sample(latent=with_nan(latent_of(2))), "latent is not finite: 1 of 128 values"),
    "infinite prompt": (sample(prompt_embeds=embeds_of(2) * float("inf")), "prompt_embeds is not finite"),
    "another bucket": (sample(latent=latent_of(1)), r"shape \(16, 4, 2\), its bucket 32x16 needs \(16, 2, 4\)"),
    "another name": (
        safetensors.torch.save({"latents": latent_of(2)}),
        "it holds latents, not latent and prompt_embeds",
    ),
    "one more": (sample(more=torch.ones(3)), "it holds latent, more, prompt_embeds, not"),
    "a mask of floats": (sample(mask=torch.ones(2, 4)), r"mask is float32 \(2, 4\), must be uint8"),
    "a mask of another size": (sample(mask=torch.ones(3, dtype=torch.uint8)), r"mask is uint8 \(3,\), must be uint8"),
    "a mask unknown to the index": (
        sample(mask=torch.ones(2, 4, dtype=torch.uint8)),
        "has a mask, the index says otherwise",
    ),
    "no safetensors": (b"\xff" * 300, "Error"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_a_sample_must_not_hold(tmp_path, damage):
    payload, message = DAMAGES[damage]
    folder = write_set(tmp_path / "set", SAMPLES, shard_size=SAMPLES)
    rewrite(folder, 2, payload)
    dataset = ShardDataset(folder)
    with pytest.raises(BrokenSample, match=r"^000000000002 in .*000000\.tar: .*" + message):
        dataset.read(2)
    assert dataset.read(0).key == "000000000000" and dataset.read(3).key == "000000000003"


@pytest.mark.parametrize(
    "column,value,place",
    [
        ("shard", 9, "shard 9"),
        ("shard", -1, "shard -1"),
        ("bucket", 7, "bucket 7"),
        ("payload_offset", 2**62, "payload_"),
    ],
)
def test_rows_of_the_index_that_lead_nowhere(tmp_path, column, value, place):
    folder = write_set(tmp_path / "set", SAMPLES)
    index = read_index(folder)
    columns = {name: getattr(index, name).copy() for name in pq.read_schema(folder / INDEX).names}
    columns[column][4] = value
    write_index(folder, columns)
    with pytest.raises(ValueError, match=rf"1 of 6 rows name a shard, a bucket or a place .*first row 4 \(.*{place}"):
        ShardDataset(folder)


@pytest.mark.parametrize(
    "edit,message",
    [
        (lambda m: m["buckets"][0].update(width=10**7, height=10**7), "10000000x10000000 pixels, more than 16384"),
        (lambda m: m["shards"][0].update(name="../../../PWNED.tar"), "leads to another folder"),
        (lambda m: m["shards"][0].update(name="manifest.json"), r"is no shard \(\*\.tar\)"),
        (lambda m: m["shards"][0].update(name=".tar"), "is no shard"),
        (lambda m: m["shards"][0].update(name=7), "is a int, not text"),
        (lambda m: m["shards"][0].update(bytes="many"), "not a count"),
    ],
    ids=["bucket", "path", "file", "dot", "type", "bytes"],
)
def test_manifests_that_are_not_to_be_trusted(tmp_path, edit, message):
    folder = write_set(tmp_path / "set", SAMPLES)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    edit(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        ShardDataset(folder)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, safetensors.torch.save({"other": torch.ones(2)})])
def test_a_damaged_empty_prompt_is_named(tmp_path, damage):
    folder = write_set(tmp_path / "set", SAMPLES)
    (folder / EMPTY_PROMPT).write_bytes(damage)
    with pytest.raises(ValueError, match=r"empty_prompt\.safetensors is damaged"):
        ShardDataset(folder)


# ── anything at all ──────────────────────────────────────────────────────────────────────────────────────────────────

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "..", "/etc/x.tar", "../../x.tar", "a\0.tar"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["name", "id", "width"]), inner, max_size=2)
    ),
    max_leaves=4,
)
FIELDS = ["payload", "fingerprint", "options", "buckets", "totals", "shards", "versions", "encoding", "format_version"]
INNER = [("shards", "name"), ("shards", "bytes"), ("shards", "sha256"), ("buckets", "width"), ("buckets", "id")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("hostile") / "set", SAMPLES)


def read_everything(folder: Path | str, cache: Path, held_out: int = 0) -> None:
    """Train on all of it; only errors for people may come out."""
    try:
        dataset = ShardDataset(folder, held_out, say=lambda line: None, cache_folder=cache)
        order = dataset.order(2)
        for place in range(order.length):
            epoch, indices = order.micro_batch(place)
            batch = make_batch(
                dataset, place, epoch, indices.tolist(), lambda *a: sample_draws(0, *a, SigmaSampling(), 0.5)
            )
            if batch.latents is not None:
                assert torch.isfinite(batch.latents).all() and batch.latents.dtype == torch.bfloat16
    except (ValueError, OSError) as error:
        assert str(error)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(data=st.data())
def test_bytes_that_were_flipped_or_cut(whole, tmp_path_factory, data):
    root = tmp_path_factory.mktemp("damaged")
    folder = shutil.copytree(whole, root / "a" / "set")
    path = folder / data.draw(st.sampled_from(sorted(path.name for path in whole.iterdir())))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    read_everything(folder, root / "cache")
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*")) == names
    shutil.rmtree(root)


@hypothesis.settings(max_examples=80, deadline=None)
@hypothesis.given(field=st.sampled_from(FIELDS) | st.sampled_from(INNER), value=JSON, remote=st.booleans())
def test_manifests_of_any_content(whole, tmp_path_factory, field, value, remote):
    """Here, and behind a URL (fsspec's local one), from where shards are copied into the cache."""
    root = tmp_path_factory.mktemp("manifest")
    folder, cache = shutil.copytree(whole, root / "a" / "b" / "set"), root / "c" / "d" / "cache"
    manifest = json.loads((folder / MANIFEST).read_bytes())
    if isinstance(field, str):
        manifest[field] = value
    else:
        manifest[field[0]][0][field[1]] = value
    (folder / MANIFEST).write_text(json.dumps(manifest))
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    read_everything(f"file://{folder}" if remote else folder, cache)
    added = {str(path.relative_to(root)) for path in root.rglob("*")} - set(names)
    assert all(name.startswith("c") for name in added), added
    shutil.rmtree(root)


# A column of the index as another program, or nobody sane, would write it; cast where it can be, refused where it can't.
COLUMNS = {
    "text": pa.array(["x"] * SAMPLES),
    "long text": pa.array(["y" * 100_000] * SAMPLES),
    "NUL": pa.array(["a\0b"] * SAMPLES),
    "bytes": pa.array([b"\xff\0"] * SAMPLES),
    "half": pa.array([0.5] * SAMPLES),
    "NaN": pa.array([float("nan")] * SAMPLES),
    "infinity": pa.array([float("inf")] * SAMPLES),
    "null": pa.nulls(SAMPLES),
    "some null": pa.array([1, None] * (SAMPLES // 2)),
    "lists": pa.array([[1]] * SAMPLES),
    "structs": pa.array([{"a": 1}] * SAMPLES),
    "truth": pa.array([True] * SAMPLES),
    "unsigned": pa.array([2**64 - 1] * SAMPLES, pa.uint64()),
    "negative": pa.array([-1] * SAMPLES),
    "int8": pa.array([1] * SAMPLES, pa.int8()),
    "largest": pa.array([2**63 - 1] * SAMPLES),
    "time": pa.array([1] * SAMPLES, pa.timestamp("ns")),
    "decimal": pa.array([1] * SAMPLES).cast(pa.decimal128(38)),
    "dictionary": pa.array(["a"] * SAMPLES).dictionary_encode(),
}


@pytest.mark.parametrize("held_out", [0, 2])
@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_of_any_type(whole, tmp_path, kind, held_out):
    folder = shutil.copytree(whole, tmp_path / "a" / "set")
    table = pq.read_table(folder / INDEX)
    for place, name in enumerate(table.schema.names):
        pq.write_table(table.set_column(place, name, COLUMNS[kind]), folder / INDEX)
        read_everything(folder, tmp_path / "cache", held_out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["a", "set", *(p.name for p in whole.iterdir())])


@pytest.mark.parametrize(
    "edit",
    [
        lambda table: table.drop(["bucket"]),
        lambda table: table.slice(0, 0),
        lambda table: table.slice(0, 1),
        lambda table: table.append_column("more", table["shard"]),
        lambda table: table.append_column("shard", table["shard"]),
        lambda table: pa.table({"other": [[[1]]] * SAMPLES}),
        lambda table: pa.concat_tables([table, table]),
    ],
    ids=["one less", "no row", "one row", "one more", "one twice", "others", "rows twice"],
)
def test_tables_of_another_form(whole, tmp_path, edit):
    folder = shutil.copytree(whole, tmp_path / "set")
    pq.write_table(edit(pq.read_table(folder / INDEX)), folder / INDEX)
    read_everything(folder, tmp_path / "cache")


@pytest.fixture(scope="module")
def one_shard(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("hostile") / "set", SAMPLES, shard_size=SAMPLES)


DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.int16, torch.uint8, torch.bool, torch.float8_e4m3fn]
TENSORS = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 7, 8, 16, 17]), max_size=5),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 1.0, -3.0, float("nan"), float("inf"), 1e38]),
)


def header(length: int, text: bytes) -> bytes:
    """A safetensors file by hand: the length that it says its header has, and whatever stands there."""
    return length.to_bytes(8, "little") + text


BY_HAND = st.sampled_from(
    [
        b"",
        header(2, b"{}"),
        header(2**63, b"{}"),  # a bomb, for who believes it
        header(10**8, b"{" + b" " * 100),
        header(4, b"null"),
        header(60_000, b"[" * 60_000),
        *(
            header(len(text), text)
            for text in (
                b'{"latent":{"dtype":"BF16","shape":[16,4294967296,4294967296],"data_offsets":[0,0]}}',
                b'{"latent":{"dtype":"BF16","shape":[-1],"data_offsets":[0,2]}}',
                b'{"latent":{"dtype":"BF16","shape":[1],"data_offsets":[5,1]}}',
                b'{"latent":{"dtype":"Q4","shape":[],"data_offsets":[0,0]}}',
                b'{"__metadata__":{"a":1}}',
            )
        ),
    ]
)
PAYLOADS = BY_HAND | st.dictionaries(
    st.sampled_from(["latent", "prompt_embeds", "", "\u202e", "../x"]), TENSORS, max_size=3
).map(safetensors.torch.save)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(payload=PAYLOADS | st.binary(max_size=300), number=st.integers(0, SAMPLES - 1))
def test_payloads_of_any_content(one_shard, tmp_path_factory, payload, number):
    """The sample is broken, by name; its neighbours are not."""
    root = tmp_path_factory.mktemp("payload")
    folder = shutil.copytree(one_shard, root / "set")
    rewrite(folder, number, payload)
    dataset = ShardDataset(folder, say=lambda line: None)
    try:
        sample = dataset.read(number)
        assert sample.latent is not None and torch.isfinite(sample.latent).all()  # a sound one may be drawn
    except BrokenSample as error:
        assert str(error).startswith(f"{number:012d} in ") and "\n" not in str(error)
    assert dataset.read((number + 1) % SAMPLES).latent is not None
    read_everything(folder, root / "cache")
    shutil.rmtree(root)


HOSTILE_NAMES = [
    "/etc/x.tar",
    "../x.tar",
    "a/../../x.tar",
    "a\\x.tar",
    "a\0.tar",
    "x" * 300 + ".tar",
    "ü\u202e.tar",
    "\ud800.tar",
]


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_names_of_shards_that_lead_elsewhere_or_nowhere(whole, tmp_path, name, remote):
    folder = shutil.copytree(whole, tmp_path / "served" / "set")
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["shards"][0]["name"] = name
    (folder / MANIFEST).write_text(json.dumps(manifest))
    before = set(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError)):
        ShardDataset(f"file://{folder}" if remote else folder, cache_folder=tmp_path / "cache")
    assert all(path.is_relative_to(tmp_path / "cache") for path in set(tmp_path.rglob("*")) - before)


def test_a_remote_manifest_writes_nothing_outside_the_cache(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "served" / "set")
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["shards"][0]["name"] = "../../../PWNED.tar"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="leads to another folder"):
        open_remote(f"file://{folder}", tmp_path / "x" / "y" / "cache")
    assert not list(tmp_path.rglob("PWNED*"))
