"""What the report shows of a data set: totals, buckets, aspect ratios, captions, failures and a contact sheet."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from data_prep.checking import report_page as html
from data_prep.images.stored_pixels import decode_stored
from data_prep.shard_format.shards import Manifest, ShardIndex, ShardReader, read_index
from files.atomic_files import write_file

THUMBNAIL = 400  # pixels of the longer side, enough for screens of two pixels a point
BUCKETS_SHOWN = 24
LEFT_OUT_SHOWN = 100
BINS = 41  # odd: squares have a bin of their own


def write_report(path: Path, folder: Path, manifest: Manifest, problems: list[str], count: int, pictures: int) -> None:
    """Write one HTML file that needs nothing else. `problems` are the first of `count`."""
    index = read_index(folder)
    totals = manifest.totals
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    size = f"{megabytes / 1000:,.2f} GB" if megabytes >= 1000 else f"{megabytes:,.1f} MB"
    numbers = [(f"{len(index):,}", "samples"), (f"{len(manifest.shards):,}", "shards"), (size, "in tars")]
    numbers += [(f"{len(manifest.buckets):,}", "buckets")]
    numbers += [(f"{totals[name]:,}", label) for name, label in (("copied", "copied"), ("filtered", "filtered"),
                ("failed", "failed")) if name in totals]  # fmt: skip
    reasons = sorted(totals.get("reasons", {}).items(), key=lambda item: (-item[1], item[0]))
    body = [html.tiles(numbers)]
    if problems:
        more = [f"and {count - len(problems)} more"] if count > len(problems) else []
        body.append(html.section("Problems", html.items(problems + more)))
    ratios = html.section("Aspect ratios (width : height)", _ratios(folder, manifest, index))
    left_out = html.section("Left out", html.reason_bars(reasons) + _left_out(folder))
    right = html.stack(ratios, html.section("Caption lengths", _captions(index)), left_out)
    body.append(html.grid(html.section("Buckets", _buckets(manifest)), right))
    shown = min(pictures, len(index))
    body.append(html.section(f"{shown} of {len(index):,} samples", _sheet(folder, manifest, index, shown)))
    body.append(html.section("How it was made", _making(manifest)))
    kind = "latents and prompt embeddings" if manifest.payload == "safetensors" else f"{manifest.payload} images"
    subtitle = f"{kind} · format version {manifest.format_version} · fingerprint {manifest.fingerprint[:12]}"
    write_file(path.absolute(), html.page(folder.absolute().name, subtitle, count, body).encode())


def _buckets(manifest: Manifest) -> str:
    largest = sorted(manifest.buckets, key=lambda bucket: -bucket.count)[:BUCKETS_SHOWN]
    largest.sort(key=lambda bucket: (bucket.width / bucket.height, bucket.width))
    bars = html.bucket_bars([(bucket.width, bucket.height, bucket.count) for bucket in largest])
    rest = len(manifest.buckets) - len(largest)
    return bars + (f'<p class="note">and {rest} smaller ones</p>' if rest else "")


def _ratios(folder: Path, manifest: Manifest, index: ShardIndex) -> str:
    """Of the sources where the rows tell, else of the buckets; on a logarithmic scale, so that 2:1 mirrors 1:2."""
    sizes = np.array([(bucket.width, bucket.height) for bucket in manifest.buckets])[index.bucket]
    found = []
    for shard in manifest.shards:
        path = folder / shard.name.replace(".tar", ".parquet")
        names = pq.read_schema(path).names if path.is_file() else []
        if "original_width" in names:
            table = pq.read_table(path, columns=["original_width", "original_height", "status"])
            kept = table["status"].to_numpy() == "ok"
            found.append(np.stack([table[name].to_numpy()[kept] for name in table.column_names[:2]], axis=1))
    sizes = np.concatenate(found) if found else sizes
    logs = np.log2(sizes[:, 0] / sizes[:, 1])
    limit = max(1.0, float(np.abs(logs).max()))
    counts, edges = np.histogram(logs, BINS, (-limit, limit))
    labels = [f"{2 ** edges[i]:.2f} to {2 ** edges[i + 1]:.2f}" for i in range(BINS)]
    named = [(1 / 4, "1:4"), (1 / 2, "1:2"), (2 / 3, "2:3"), (1, "1:1"), (3 / 2, "3:2"), (2, "2:1"), (4, "4:1")]
    ticks = [((np.log2(ratio) + limit) / (2 * limit), text) for ratio, text in named]
    return html.histogram(counts.tolist(), labels, [(float(p), text) for p, text in ticks if -1e-9 <= p <= 1 + 1e-9])


def _captions(index: ShardIndex) -> str:
    lengths = index.caption_length
    highest = max(BINS, int(np.percentile(lengths, 99.5)))
    counts, edges = np.histogram(np.minimum(lengths, highest), BINS, (0, highest))
    labels = [f"{_ceil(edges[i])} to {_ceil(edges[i + 1]) - 1} characters" for i in range(BINS)]
    labels[-1] = f"{_ceil(edges[-2])} characters and more"
    ticks = [(share, f"{round(share * highest)}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    if lengths.max() > highest:
        ticks[-1] = (1.0, f"{highest} and more")
    note = (
        f"median {int(np.median(lengths))} characters, longest {int(lengths.max())}, {int((lengths == 0).sum())} empty"
    )
    return html.histogram(counts.tolist(), labels, ticks) + f'<p class="note">{note}</p>'


def _left_out(folder: Path) -> str:
    """The first inputs that were left out, failures before what was filtered, with what was wrong."""
    found: dict[str, list[tuple[str, str]]] = {"failed": [], "filtered": []}
    for path in sorted(folder.glob("[0-9]*.parquet")):
        if len(found["failed"]) >= LEFT_OUT_SHOWN:
            break
        columns = ["path", "status", "reason", "detail"]
        if not set(columns) <= set(pq.read_schema(path).names):
            continue  # img2dataset's rows have the same names
        table = pq.read_table(path, columns=columns)
        for row in table.filter(pc.field("status") != "ok").to_pylist():
            why = row["reason"] + (f": {row['detail']}" if row["detail"] else "")
            rows = found[row["status"]]
            if len(rows) < LEFT_OUT_SHOWN:
                rows.append((row["path"], why))
    shown = [*found["failed"], *found["filtered"]][:LEFT_OUT_SHOWN]
    return html.folded(f"Which ones (the first {len(shown)})", html.table(shown)) if shown else ""


def _ceil(edge: float) -> int:
    return int(np.ceil(edge))


def _sheet(folder: Path, manifest: Manifest, index: ShardIndex, count: int) -> str:
    """Samples evenly spread over the set, as they are stored."""
    reader, figures = ShardReader(folder, manifest), []
    for row in np.linspace(0, len(index) - 1, count).round().astype(int):
        bucket = manifest.buckets[index.bucket[row]]
        try:
            shard = int(index.shard[row])
            text = reader.read(shard, int(index.txt_offset[row]), int(index.txt_size[row])).decode("utf-8", "replace")
            url = ""
            if manifest.payload != "safetensors":
                data = reader.read(shard, int(index.payload_offset[row]), int(index.payload_size[row]))
                url = _thumbnail(decode_stored(data, bucket.width, bucket.height))
        except (ValueError, OSError) as error:
            text, url = f"cannot be shown: {error}", ""
        ratio = bucket.width / bucket.height
        figures.append((url, ratio, text, f"{bucket.width}×{bucket.height} · {index.path[row]}"))
    reader.close()
    return html.contact_sheet(figures)


def _thumbnail(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _making(manifest: Manifest) -> str:
    def lines(values: dict) -> list[tuple[str, str]]:
        return [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in values.items()]

    parts = [html.table(lines(manifest.options))]
    if manifest.encoding:
        parts.append(html.folded("Encoders", html.table(lines(manifest.encoding))))
    parts.append(html.folded("Versions", html.table(lines(manifest.versions))))
    shards = [
        (s.name, f"{s.samples:>6} samples  {s.bytes / 1e6:>9.2f} MB  sha256 {s.sha256[:16]}…") for s in manifest.shards
    ]
    parts.append(html.folded(f"{len(shards)} shards", html.table(shards[:1000])))
    return "".join(parts)
