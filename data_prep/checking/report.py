"""What the report shows of a data set: totals, buckets, aspect ratios, captions, failures and a contact sheet."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from data_prep.checking.report_page import page
from data_prep.images.stored_pixels import decode_mask, decode_stored
from data_prep.shard_format.shards import Manifest, ShardIndex, ShardReader, captions_of, members_of, read_index
from files.atomic_files import write_file

THUMBNAIL = 400  # pixels of the longer side, enough for screens of two pixels a point
BUCKETS_SHOWN = 24
LEFT_OUT_SHOWN = 100
WEIGHTS_SHOWN = 40
CAPTION_SHOWN = 2000  # characters: the rest of a caption of millions is not read here
VEIL = np.array([214, 60, 120])  # RGB of every other stripe over what a mask leaves out
BINS = 41  # odd: squares have a bin of their own


def write_report(path: Path, folder: Path, manifest: Manifest, problems: list[str], count: int, pictures: int) -> None:
    """Write one HTML file that needs nothing else. `problems` are the first of `count`."""
    index = _drawable(read_index(folder), manifest)
    totals = manifest.totals
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    size = f"{megabytes / 1000:,.2f} GB" if megabytes >= 1000 else f"{megabytes:,.1f} MB"
    tiles = [(f"{len(index):,}", "samples"), (f"{len(manifest.shards):,}", "shards"), (size, "in tars")]
    tiles += [(f"{len(manifest.buckets):,}", "buckets")]
    if masked := int((index.mask_share >= 0).sum()):
        tiles += [(f"{masked:,}", "with masks")]
    tiles += [(f"{totals[name]:,}", name) for name in ("copied", "filtered", "failed") if name in totals]
    tiles += [(f"{totals[name]:,}", "with several captions") for name in ("several_captions",) if totals.get(name)]
    epoch = float(index.weight.sum())
    tiles += [(f"{epoch:,.6g}", "samples an epoch")] if (index.weight != 1).any() else []
    kind = "latents and prompt embeddings" if manifest.payload == "safetensors" else f"{manifest.payload} images"
    left_out, warned = _left_out(folder)
    text = page(
        title=folder.absolute().name,
        subtitle=f"{kind} · format version {manifest.format_version} · fingerprint {manifest.fingerprint[:12]}",
        problem_count=count,
        problems=problems + ([f"and {count - len(problems)} more"] if count > len(problems) else []),
        tiles=tiles,
        buckets=_buckets(manifest),
        ratios=_ratios(folder, manifest, index),
        captions=_captions(index),
        reasons=sorted(totals.get("reasons", {}).items(), key=lambda item: (-item[1], item[0])),
        left_out=left_out,
        warned=warned,
        remarks=_remarks(totals),
        weights=_weights(index),
        samples=len(index),
        masked=masked and manifest.payload != "safetensors",
        pictures=_pictures(folder, manifest, index, min(pictures, len(index))),
        options=_lines(manifest.options),
        encoders=_lines(manifest.encoding or {}),
        versions=_lines(manifest.versions),
        shards=[
            (s.name, f"{s.samples:>6} samples  {s.bytes / 1e6:>9.2f} MB  sha256 {s.sha256[:16]}…")
            for s in manifest.shards
        ],
    )
    write_file(path.absolute(), text)


def _drawable(index: ShardIndex, manifest: Manifest) -> ShardIndex:
    """Those rows whose bucket and shard exist, so that a damaged set has a report too."""
    buckets, shards = len(manifest.buckets), len(manifest.shards)
    kept = (index.bucket >= 0) & (index.bucket < buckets) & (index.shard >= 0) & (index.shard < shards)
    return index if kept.all() else ShardIndex(**{name: column[kept] for name, column in vars(index).items()})


def _remarks(totals: dict[str, Any]) -> list[str]:
    ignored = ", ".join(
        f"{count} {kind or 'without an extension'}" for kind, count in totals.get("ignored", {}).items()
    )
    return [
        *totals.get("remarks", []),
        *([f"files that are neither images nor captions: {ignored}"] if ignored else []),
    ]


def _weights(index: ShardIndex) -> list[tuple[str, str]]:
    """Images × weight by folder of the source, what comes most often first; none where all weights are 1."""
    if not (index.weight != 1).any():
        return []
    counts = Counter(zip((str(path).rpartition("/")[0] for path in index.path), index.weight.tolist(), strict=True))
    ordered = sorted(counts.items(), key=lambda item: (-item[0][1] * item[1], item[0]))
    rows = [(folder or ".", f"{n:>8,} × {w:g} = {n * w:,.6g} an epoch") for (folder, w), n in ordered[:WEIGHTS_SHOWN]]
    rest = ordered[WEIGHTS_SHOWN:]
    if rest:
        more = sum(n * w for (_, w), n in rest)
        rows.append((f"and {len(rest)} more", f"{sum(n for _, n in rest):>8,} of other weights = {more:,.6g} an epoch"))
    return rows


def _buckets(manifest: Manifest) -> dict[str, Any]:
    """The largest ones as bars, each with its shape drawn to scale."""
    largest = sorted(manifest.buckets, key=lambda bucket: -bucket.count)[:BUCKETS_SHOWN]
    largest.sort(key=lambda bucket: (bucket.width / bucket.height, bucket.width))
    longest = max((max(bucket.width, bucket.height) for bucket in largest), default=1)
    most = max((bucket.count for bucket in largest), default=0) or 1
    shown = [
        {
            "width": bucket.width,
            "height": bucket.height,
            "sources": " + ".join(f"{width}×{height}" for width, height in bucket.sources),
            "count": bucket.count,
            "share": f"{100 * bucket.count / most:.1f}",
            "shape_width": ceil(24 * bucket.width / longest),
            "shape_height": ceil(24 * bucket.height / longest),
        }
        for bucket in largest
    ]
    return {"shown": shown, "rest": len(manifest.buckets) - len(largest)}


def _chart(counts: np.ndarray, labels: list[str], ticks: list[tuple[float, str]]) -> dict[str, Any]:
    """A histogram's bars; `places` are those of the bars that are not empty. Ticks stand at positions from 0 to 1."""
    places = np.flatnonzero(counts).tolist()
    return {"counts": counts.tolist(), "places": places, "labels": labels, "ticks": ticks}


def _ratios(folder: Path, manifest: Manifest, index: ShardIndex) -> dict[str, Any]:
    """Of the sources where the rows tell, else of the buckets; on a logarithmic scale, so that 2:1 mirrors 1:2."""
    sizes = np.array([(bucket.width, bucket.height) for bucket in manifest.buckets]).reshape(-1, 2)[index.bucket]
    found = []
    for shard in manifest.shards:
        table = _rows(folder / shard.name.replace(".tar", ".parquet"), ["original_width", "original_height", "status"])
        if table is not None:
            kept = table["status"].to_numpy() == "ok"
            found.append(np.stack([table[name].to_numpy()[kept] for name in table.column_names[:2]], axis=1))
    sizes = np.concatenate(found) if found else sizes
    sizes = sizes[(sizes > 0).all(axis=1)]
    logs = np.log2(sizes[:, 0] / sizes[:, 1])
    limit = max(1.0, float(np.abs(logs).max(initial=0)))
    counts, edges = np.histogram(logs, BINS, (-limit, limit))
    labels = [f"{2 ** edges[i]:.2f} to {2 ** edges[i + 1]:.2f}" for i in range(BINS)]
    named = [(1 / 4, "1:4"), (1 / 2, "1:2"), (2 / 3, "2:3"), (1, "1:1"), (3 / 2, "3:2"), (2, "2:1"), (4, "4:1")]
    ticks = [((np.log2(ratio) + limit) / (2 * limit), text) for ratio, text in named]
    return _chart(counts, labels, [(float(p), text) for p, text in ticks if -1e-9 <= p <= 1 + 1e-9])


def _rows(path: Path, columns: list[str]) -> pa.Table | None:
    """Columns of NNNNNN.parquet; None when it is damaged or another program's."""
    try:
        names = pq.read_schema(path).names
        return pq.read_table(path, columns=columns) if set(columns) <= set(names) else None
    except (pa.ArrowException, OSError, ValueError):
        return None


def _captions(index: ShardIndex) -> dict[str, Any]:
    """Of each sample's longest caption."""
    lengths = np.maximum(index.caption_length, index.longest_caption)
    highest = max(BINS, int(np.percentile(lengths, 99.5)) if len(lengths) else 0)
    counts, edges = np.histogram(np.minimum(lengths, highest), BINS, (0, highest))
    labels = [f"{ceil(edges[i])} to {ceil(edges[i + 1]) - 1} characters" for i in range(BINS)]
    labels[-1] = f"{ceil(edges[-2])} characters and more"
    ticks = [(share, f"{round(share * highest)}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    longest = int(lengths.max(initial=0))
    if longest > highest:
        ticks[-1] = (1.0, f"{highest} and more")
    median = int(np.median(lengths)) if len(lengths) else 0
    note = f"median {median} characters, longest {longest}, {int((lengths == 0).sum())} empty"
    if several := int((index.captions > 1).sum()):
        all_of_them = int(np.maximum(index.captions, 1).sum())
        note += (
            f"; {several:,} samples with several captions, {all_of_them:,} captions in all (of each sample the longest)"
        )
    return _chart(counts, labels, ticks) | {"note": note}


def _left_out(folder: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The first inputs that were left out, failures before what was filtered, with what was wrong; those with warnings."""
    found: dict[str, list[tuple[str, str]]] = {"failed": [], "filtered": [], "ok": []}
    for path in sorted(folder.glob("[0-9]*.parquet")):
        table = _rows(path, ["path", "status", "reason", "detail"])
        if table is None:
            continue  # img2dataset's rows have the same names
        odd = table.filter((pc.field("status") != "ok") | (pc.field("detail") != ""))
        for row in odd.to_pylist():
            why = ": ".join(text for text in (row["reason"], row["detail"]) if text)
            rows = found.get(row["status"], [])
            if len(rows) < LEFT_OUT_SHOWN:
                rows.append((row["path"], why))
    return [*found["failed"], *found["filtered"]][:LEFT_OUT_SHOWN], found["ok"]


def _pictures(folder: Path, manifest: Manifest, index: ShardIndex, count: int) -> list[dict[str, Any]]:
    """Samples evenly spread over the set, as they are stored."""
    reader, pictures = ShardReader(folder, manifest), []
    for row in np.linspace(0, len(index) - 1, count).round().astype(int):
        bucket = manifest.buckets[index.bucket[row]]
        try:
            shard = int(index.shard[row])
            text = reader.read(shard, int(index.txt_offset[row]), int(index.txt_size[row])).decode("utf-8", "replace")
            if index.captions[row] > 1:
                text = "  ·  ".join(
                    captions_of(reader.read(shard, int(index.json_offset[row]), int(index.json_size[row])))
                )
            url, ratio = "", bucket.width / bucket.height
            if manifest.payload != "safetensors":
                data = reader.read(shard, int(index.payload_offset[row]), int(index.payload_size[row]))
                run = reader.read(shard, int(index.sources_offset[row]), int(index.sources_size[row]))
                pixels = [
                    decode_stored(image, *size)
                    for image, size in zip(
                        [data, *members_of(run)], [(bucket.width, bucket.height), *bucket.sources], strict=True
                    )
                ]
                if index.mask_size[row]:
                    mask = reader.read(shard, int(index.mask_offset[row]), int(index.mask_size[row]))
                    pixels[0] = veiled(pixels[0], decode_mask(mask, bucket.width, bucket.height))
                shown_pixels = beside(pixels)
                url, ratio = _thumbnail(shown_pixels), shown_pixels.shape[1] / shown_pixels.shape[0]
        except (ValueError, KeyError, OSError) as error:
            text, url = f"cannot be shown: {error}", ""
        share = float(index.mask_share[row])
        masked = "" if share < 0 else "mask all black · " if share == 0 else f"mask {100 * share:.3g} % · "
        note = f"{str(bucket).replace('x', '×').replace('+', ' ← ')} · {masked}{index.path[row]}"
        pictures.append({"url": url, "ratio": ratio, "caption": text[:CAPTION_SHOWN], "note": note})
    reader.close()
    return pictures


def veiled(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """An image under its mask: as it is where the mask is white, grey and under stripes where it is black."""
    rows, columns = np.indices(mask.shape)
    period = max(16, max(mask.shape) // 24)
    stripes = ((rows + columns) // (period // 2) % 2)[..., None]
    grey = pixels.mean(axis=-1, keepdims=True)
    veil = 0.65 * grey + 0.35 * np.where(stripes, VEIL, np.uint8(255))
    share = mask[..., None] / 255
    return np.rint(share * pixels + (1 - share) * veil).astype(np.uint8)


def beside(pixels: list[np.ndarray]) -> np.ndarray:
    """The images of a pair in one: source images in order, then their target, all of its height."""
    target, *sources = pixels
    height = len(target)
    scaled = [
        np.asarray(Image.fromarray(each).resize((max(1, round(each.shape[1] * height / len(each))), height)))
        for each in sources
    ]
    return np.concatenate([*scaled, target], axis=1)


def _lines(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in values.items()]


def _thumbnail(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
