"""check_shards.py: silent on a good set, one line for each kind of damage; and its report, opened in a browser."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep import check_shards, make_shards
from data_prep.packing.plan import file_sha256
from data_prep.shard_format import shards
from data_prep.shard_format.scan_tars import build_index
from data_prep.shard_format.shards import Bucket, TarShardWriter, read_index, read_manifest, write_index, write_manifest
from tests.helpers.photos import encoded, photo

NUMBERS = [
    name for name in shards.SHARD_ROWS.names if name.startswith(("crop", "original", "width", "height", "frames"))
]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("check")
    base = root / "in"
    base.mkdir()
    for number in range(10):
        (base / f"{number}.jpg").write_bytes(encoded(photo(200 + 9 * number, 180, seed=number)))
        (base / f"{number}.txt").write_text(f"a picture with the number {number} & <b>marks</b>")
    (base / "bad.jpg").write_bytes(b"<html>")
    (base / "bad.txt").write_text("x")
    flags = ["--max_pixels", "16384", "--num_workers", "0", "--resize", "pillow", "--samples_per_shard", "4"]
    assert make_shards.main(["--dataset_base_path", str(base), "--output_path", str(root / "out"), *flags]) == 0
    return root / "out"


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def check(folder: Path, *flags: str) -> int:
    return check_shards.main([str(folder), "--num_workers", "0", *flags])


def rewrite(folder: Path, change: dict[str, bytes]) -> None:
    """Write the first tar again with other contents for some suffixes of its first sample, and a matching manifest."""
    manifest, index = read_manifest(folder), read_index(folder)
    reader = shards.ShardReader(folder)
    columns = {field.name: list(getattr(index, field.name)) for field in dataclasses.fields(index)}
    name = manifest.shards[0].name
    with TarShardWriter(folder / name) as tar:
        for row in np.flatnonzero(index.shard == 0):
            members = []
            for member, suffix in (("payload", "jpg"), ("json", "json"), ("txt", "txt")):
                data = reader.read(0, columns[f"{member}_offset"][row], columns[f"{member}_size"][row])
                members.append((suffix, change.get(suffix, data) if row == 0 else data))
            places = tar.add(str(index.key[row]), members)
            for place, member in zip(places.values(), ("payload", "json", "txt"), strict=True):
                columns[f"{member}_offset"][row], columns[f"{member}_size"][row] = place
    reader.close()
    write_index(folder, columns)
    rows = pq.read_table(folder / "000000.parquet").to_pydict()
    kept = [place for place, status in enumerate(rows["status"]) if status == "ok"]
    for place, row in zip(kept, np.flatnonzero(index.shard == 0), strict=True):
        for name in (f"{member}_{what}" for member in ("payload", "json", "txt") for what in ("offset", "size")):
            rows[name][place] = int(columns[name][row])
    shards.write_rows(folder / "000000.parquet", rows, shards.SHARD_ROWS)
    stats = json.loads((folder / "000000_stats.json").read_text())
    stats |= {"bytes": tar.bytes, "sha256": tar.sha256, "rows_sha256": file_sha256(folder / "000000.parquet")}
    (folder / "000000_stats.json").write_text(json.dumps(stats))
    first = dataclasses.replace(manifest.shards[0], bytes=tar.bytes, sha256=tar.sha256)
    write_manifest(folder, dataclasses.replace(manifest, shards=[first, *manifest.shards[1:]]))


def test_a_good_set(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(packed) == 0 and check(packed, "--quick") == 0
    assert check_shards.main([str(packed), "--num_workers", "2"]) == 0
    assert "10 jpg samples in 3 shards" in capsys.readouterr().out


def test_changed_cut_missing_and_unknown_tars(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray((copy / "000000.tar").read_bytes())
    data[700] ^= 1
    (copy / "000000.tar").write_bytes(data)
    (copy / "000001.tar").write_bytes((copy / "000001.tar").read_bytes()[:-512])
    (copy / "000002.tar").rename(copy / "000009.tar")
    assert check(copy) == 1
    errors = capsys.readouterr().err
    assert "000000.tar does not have the manifest's sha256: its content changed" in errors
    assert re.search(r"000001\.tar has \d+ bytes, the manifest says \d+", errors)
    assert "000002.tar is missing" in errors and "000009.tar is not in the manifest" in errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jpg": encoded(photo(32, 32))}, r"000000000000 \(0\.jpg\): cannot be decoded: image is 32x32, its bucket"),
        ({"jpg": b"\xff\xd8 nothing"}, "cannot be decoded"),
        ({"txt": b"another caption"}, "caption has 15 characters, the index says 42"),
        (
            {"txt": b"a picture with the number 1 & <b>marks</b>"},
            "json says key 000000000000 and caption 'a picture with",
        ),
        ({"txt": b"caf\xe9"}, "cannot be decoded: 'utf-8' codec"),
        ({"json": b"{"}, "cannot be decoded: Expecting property name"),
    ],
)
def test_damaged_content(copy: Path, capsys: pytest.CaptureFixture[str], change: dict, message: str) -> None:
    rewrite(copy, change)
    assert check(copy, "--quick") == 0
    assert check(copy) == 1
    assert re.search(message, capsys.readouterr().err)


def test_index_against_tar_and_manifest(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pq.read_table(copy / "index.parquet").to_pydict()
    table["payload_offset"][0] += 1
    write_index(copy, table)
    manifest = read_manifest(copy)
    first = dataclasses.replace(manifest.buckets[0], count=manifest.buckets[0].count + 1)
    write_manifest(copy, dataclasses.replace(manifest, buckets=[first, *manifest.buckets[1:]]))
    (copy / "sizes.json").write_text("{}")
    assert check(copy) == 1
    errors = capsys.readouterr().err
    assert re.search(r"000000000000 \(0\.jpg\): payload is at 512 \+ \d+ bytes, the index says 513", errors)
    assert "in index.parquet" in errors and "sizes.json does not agree" in errors


def test_no_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str], packed: Path) -> None:
    assert check(tmp_path) == 2
    assert "is not a finished data set" in capsys.readouterr().err
    assert check(packed, "--report", str(tmp_path / "no" / "r.html")) == 2


def test_encoded_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors.torch import save

    def encoded_set(latent: tuple[int, ...], tokens: int) -> int:
        tensors = {"latent": torch.zeros(latent, dtype=torch.bfloat16), "prompt_embeds": torch.zeros(7, 3)}
        tensors["prompt_embeds"] = tensors["prompt_embeds"].bfloat16()
        with TarShardWriter(tmp_path / "000000.tar") as tar:
            members = [
                ("safetensors", save(tensors)),
                ("json", b'{"key":"000000000000","caption":"x","path":"a.jpg"}'),
                ("txt", b"x"),
            ]
            places = tar.add("000000000000", members).values()
        columns = {"key": ["000000000000"], "path": ["a.jpg"], "shard": [0], "bucket": [0], "caption_length": [1]}
        for name, (offset, size) in zip(("payload", "json", "txt"), places, strict=True):
            columns |= {f"{name}_offset": [offset], f"{name}_size": [size]}
        write_index(tmp_path, columns | {"prompt_tokens": [tokens]})
        record = dict.fromkeys(shards.SHARD_ROWS.names, "") | {name: values[0] for name, values in columns.items()}
        record |= {"status": "ok", "copied": False, "prompt_tokens": tokens} | dict.fromkeys(NUMBERS, 0)
        rows = {name: [record[name]] for name in shards.SHARD_ROWS.names}
        shards.write_rows(tmp_path / "000000.parquet", rows, shards.SHARD_ROWS)
        stats = {"samples": 1, "bytes": tar.bytes, "sha256": tar.sha256, "reasons": {}, "buckets": {}, "failed": 0}
        (tmp_path / "000000_stats.json").write_text(json.dumps(stats | {"fingerprint": "f"}))
        (tmp_path / "sizes.json").write_text('{"000000.tar": 1}')
        (tmp_path / "empty_prompt.safetensors").write_bytes(b"")
        shard = shards.Shard("000000.tar", 1, tar.bytes, tar.sha256)
        totals = {"samples": 1}
        write_manifest(
            tmp_path, shards.Manifest("safetensors", "f", {}, [Bucket(0, 64, 32, 1)], totals, [shard], {}, {})
        )
        return check(tmp_path, "--report", str(tmp_path / "report.html"))

    assert encoded_set((16, 4, 8), 7) == 0
    assert encoded_set((16, 8, 4), 7) == 1
    assert "latent is [16, 8, 4], its bucket needs [16, 4, 8]" in capsys.readouterr().err
    assert encoded_set((16, 4, 8), 9) == 1
    assert "prompt_embeds is [7, 3], the index says 9 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("bucket", r"index.parquet: 1 rows name a bucket that the manifest has not, first row 3: 99"),
        ("negative", r"1 rows name a bucket that the manifest has not, first row 3: -1"),
        ("shard", r"1 rows name a shard that the manifest has not"),
        ("path", r"path is '0\.jpg' in 000000.parquet, 'other.jpg' in index.parquet"),
        ("prompt_tokens", "prompt_tokens of image shards must be 0"),
        ("key", "1 keys come twice, first 000000000000"),
        ("totals", r"the manifest's totals say 99 samples, its shards 10"),
        ("no totals", r"the manifest's totals say None samples, its shards 10"),
        ("rows", r"000000.parquet is damaged|000000.parquet does not have the sha256"),
        ("no rows", "000000.parquet is missing"),
        ("other rows", "000000.parquet does not have the sha256 of 000000_stats.json"),
        ("stats", "000001_stats.json is missing or damaged"),
        ("plan", "plan/ is damaged"),
        ("plan rows", "plan/ is damaged"),
        ("sizes", "sizes.json does not agree"),
        ("index", "index.parquet is damaged"),
    ],
)
def test_every_file_of_a_set_is_looked_at(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, message: str
) -> None:
    columns = pq.read_table(copy / "index.parquet").to_pydict()
    manifest = json.loads((copy / "manifest.json").read_text())
    changes = {"bucket": ("bucket", 3, 99), "negative": ("bucket", 3, -1), "shard": ("shard", 9, 7)}
    changes |= {
        "path": ("path", 0, "other.jpg"),
        "prompt_tokens": ("prompt_tokens", 0, 5),
        "key": ("key", 1, columns["key"][0]),
    }
    files = {"rows": "000000.parquet", "stats": "000001_stats.json", "plan": "plan/plan.json", "sizes": "sizes.json",
             "index": "index.parquet", "plan rows": "plan/plan.parquet"}  # fmt: skip
    if damage in changes:
        name, row, value = changes[damage]
        columns[name][row] = value
        write_index(copy, columns)
    elif damage in ("totals", "no totals"):
        manifest["totals"] = {"samples": 99} if damage == "totals" else {}
        (copy / "manifest.json").write_text(json.dumps(manifest))
    elif damage == "no rows":
        (copy / "000000.parquet").unlink()
    elif damage == "other rows":
        shutil.copy(copy / "000001.parquet", copy / "000000.parquet")
    else:
        (copy / files[damage]).write_bytes((copy / files[damage]).read_bytes()[:-9])
    assert check(copy, "--report", str(tmp_path / "report.html")) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_hostile_manifest_is_one_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each value of the manifest replaced by one of another type, taken out, or led out of the folder."""
    whole = json.loads((copy / "manifest.json").read_text())
    whole["buckets"], whole["shards"] = whole["buckets"][:1], whole["shards"][:1]
    tried = 0
    for places in ([], ["buckets", 0], ["shards", 0], ["totals"], ["options"]):
        target = whole
        for place in places:
            target = target[place]
        for name in list(target):
            for value in (None, -1, "x", [], {}, 10**30, "../../x", KeyError):
                damaged = json.loads(json.dumps(whole))
                target = damaged
                for place in places:
                    target = target[place]
                if value is KeyError:
                    del target[name]
                else:
                    target[name] = value
                (copy / "manifest.json").write_text(json.dumps(damaged))
                assert check(copy, "--quick") in (1, 2)
                tried += 1
    (copy / "manifest.json").write_text("[" * 100_000)
    assert check(copy) == 2
    assert tried > 200 and "Traceback" not in capsys.readouterr().err


def test_check_is_as_strict_as_packing(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index, reader = read_index(copy), shards.ShardReader(copy)
    data = reader.read(0, int(index.payload_offset[0]), int(index.payload_size[0]))
    rewrite(copy, {"jpg": data[: len(data) // 2] + bytes(64) + data[len(data) // 2 + 64 :]})
    assert check(copy) == 1
    assert "cannot be decoded: corrupt data" in capsys.readouterr().err


# ── shards without an index ──────────────────────────────────────────────────────────────────────────────────────────


def test_scanning_gives_the_packer_s_index(packed: Path, tmp_path: Path) -> None:
    for tar in packed.glob("*.tar"):
        shutil.copy(tar, tmp_path)
    manifest = build_index(tmp_path)
    assert manifest.buckets == read_manifest(packed).buckets and manifest.shards == read_manifest(packed).shards
    ours, scanned = read_index(packed), read_index(tmp_path)
    for field in dataclasses.fields(ours):
        assert (getattr(ours, field.name) == getattr(scanned, field.name)).all(), field.name
    assert check(tmp_path) == 0


def test_scanning_refuses_what_cannot_be_trained_on(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.tar"):
        build_index(tmp_path)

    def tar_of(members: list[tuple[str, bytes]]) -> None:
        with TarShardWriter(tmp_path / "0.tar") as tar:
            tar.add("a", members)

    for members, message in (
        (
            [("jpg", encoded(photo(33, 32)))],
            r"image of a is 33x32, sides must be multiples of 16: pack the shards again",
        ),
        ([("jpg", b"<html>")], "image of a: not an image"),
        ([("txt", b"x")], "no sample of 1 tars has an image"),
        ([("jpg", encoded(photo(32, 32))), ("json", b"{")], "a.json is not valid JSON"),
    ):
        tar_of(members)
        with pytest.raises(ValueError, match=message):
            build_index(tmp_path)
    (tmp_path / "0.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match=r"0\.tar is not a whole tar"):
        build_index(tmp_path)


# ── the report ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_report_holds_everything_itself(packed: Path, tmp_path: Path) -> None:
    assert check(packed, "--report", str(tmp_path / "report.html"), "--pictures", "7") == 0
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import|<script""", page)
    assert page.count("data:image/jpeg;base64,") == 7 and "7 of 10 samples" in page
    assert "failed: not an image" in page and "everything agrees" in page
    assert re.search(r"<th>\S+</th><td><code>not an image: starts with", page)  # which one, and why
    assert "number 0 &amp; &lt;b&gt;marks" in page and "<b>marks" not in page
    options = read_manifest(packed).options
    assert all(name in page for name in options) and json.dumps(options["quality"]) in page


def test_long_and_hostile_names_in_the_report(tmp_path: Path) -> None:
    base, long = tmp_path / "in", "n" * 200
    base.mkdir()
    for name in (long, "<img src=x onerror=alert(1)>", "\x1b[2J"):
        (base / f"{name}.png").write_bytes(encoded(photo(80, 80), "PNG"))
        (base / f"{name}.txt").write_text("<script>alert(1)</script>")
    (base / ("x" * 200 + ".png")).write_bytes(b"<html>")
    (base / ("x" * 200 + ".txt")).write_text("x")
    flags = ["--dataset_base_path", str(base), "--output_path", str(tmp_path / "out"), "--max_pixels", "4096"]
    assert make_shards.main([*flags, "--num_workers", "0", "--resize", "pillow"]) == 0
    assert check(tmp_path / "out", "--report", str(tmp_path / "report.html")) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "<img src=x" not in page and long in page
    for element in ("td,th", "figure", ".rows>*"):  # whatever holds a name may be broken anywhere
        rule = re.search(re.escape(element) + r"\{([^}]*)\}", page)
        assert rule and "overflow-wrap:anywhere" in rule[1], element
    assert "nowrap" not in re.sub(r"\.verdict\{[^}]*\}", "", page)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
def test_report_in_a_browser(packed: Path, tmp_path: Path) -> None:
    assert check(packed, "--report", str(tmp_path / "report.html")) == 0
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --hide-scrollbars --window-size=1200,900"
    command = [str(CHROMIUM), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    address = (tmp_path / "report.html").as_uri()
    shot = tmp_path / "shot.png"
    subprocess.run([*command, f"--screenshot={shot}", address], check=True, capture_output=True, timeout=60)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (900, 1200, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000  # photographs are there, not only text and boxes
    blue = (np.abs(pixels - [0x3F, 0x6B, 0x8F]).max(axis=2) < 6).sum()
    assert blue > 2000  # and the bars
