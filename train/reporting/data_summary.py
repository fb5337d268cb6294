"""The data of a run for the page: how many samples in which sizes, and where the report of the data set lies."""

import os
from pathlib import Path
from typing import Any

from data_prep.shard_format.shards import read_manifest
from train.config.data_sources import read_sources
from train.reporting.data_by_source import lines_by_source
from train.reporting.run_record import RunRecord

BUCKETS = 12
PAGES, HEAD_BYTES = 40, 1 << 16  # so many HTML files are looked at for the report, and so much of each


def data_summary(run: RunRecord, page_folder: Path) -> dict[str, Any]:
    """`rows` of names and values, `buckets` (the largest), `reports` as (address, name), and `command` where there is none.

    From the facts of the run's start; else from the data set, where it still lies here.
    """
    facts = dict(run.fact("data") or {})
    folders = data_folders(run)
    folder = folders[0] if len(folders) == 1 else None
    manifest = None
    if folder is not None:
        try:
            manifest = read_manifest(folder)
        except (OSError, ValueError):
            manifest = None
    if not facts and manifest is not None:
        buckets = [[bucket.width, bucket.height, bucket.count] for bucket in manifest.buckets]
        facts = {"fingerprint": manifest.fingerprint, "samples": manifest.totals.get("samples"), "buckets": buckets}
        facts |= {"encoded": manifest.payload == "safetensors", "masked": manifest.totals.get("masked", 0)}
    fingerprints = {str(facts.get("fingerprint", ""))}
    if manifest is not None:
        fingerprints |= {manifest.fingerprint, str(manifest.options.get("images", ""))}
    reports = data_reports(folder, {text for text in fingerprints if text}) if folder is not None else []
    for each in folders if len(folders) > 1 else []:
        reports += [path for path in data_reports(each, fingerprints_in(each)) if path not in reports]
    rows = [("data", str(facts.get("name") or " + ".join(data_texts(run)) or "unknown"))]
    if facts.get("samples") is not None:
        held_out = f", {facts['held_out']:,} of them held out" if facts.get("held_out") else ""
        rows.append(("samples", f"{facts['samples']:,}{held_out}"))
    sources = facts.get("sources")
    rows += [("images × weight", line) for line in lines_by_source(sources if isinstance(sources, list) else [])]
    if "encoded" in facts:
        rows.append(("kind", "latents and prompt embeddings" if facts["encoded"] else "images, encoded while training"))
    if facts.get("masked"):
        weight = run.config.get("mask_min_weight") if run.config.get("masked_loss") else None
        used = "not used" if weight is None else f"outside of them the loss weighs {weight}"
        rows.append(("masks", f"{facts['masked']:,} samples, {used}"))
    if facts.get("micro_batches"):
        rows.append(("micro-batches an epoch", f"{facts['micro_batches']:,.6g}"))
    if facts.get("fingerprint"):
        rows.append(("fingerprint", str(facts["fingerprint"])[:12]))
    shards = folders[0] if folders else Path((data_texts(run) or ["SHARDS"])[0])
    return {
        "rows": rows,
        "buckets": bucket_bars(facts.get("buckets") or []),
        "more_buckets": max(0, len(facts.get("buckets") or []) - BUCKETS),
        "reports": [(os.path.relpath(path, page_folder), path.name) for path in reports],
        "command": f"python data_prep/check_shards.py {shards} --report data.html",
    }


def data_texts(run: RunRecord) -> list[str]:
    """The option `data` of the run's configuration."""
    given = run.config.get("data") or []
    return [str(each) for each in given] if isinstance(given, list) else [str(given)]


def data_folders(run: RunRecord) -> list[Path]:
    """The data sets' folders on this machine; remote ones are left out, and those that are gone."""
    found = []
    for text in data_texts(run):
        if not text or "://" in text or text.startswith("pipe:"):
            continue
        try:
            folder = Path(read_sources("data", (text,))[0].address).expanduser()
        except ValueError:  # edited by hand
            continue
        if (folder / "manifest.json").is_file():
            found.append(folder)
    return found


def fingerprints_in(folder: Path) -> set[str]:
    """Of the set in a folder, and of the images that it was encoded from."""
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError):
        return set()
    return {text for text in (manifest.fingerprint, str(manifest.options.get("images", ""))) if text}


def data_reports(folder: Path, fingerprints: set[str]) -> list[Path]:
    """HTML files of check_shards.py on this data set, or on that which it was encoded from: in its folder and beside it."""
    found = []
    for place in (folder, folder.resolve().parent):
        for path in sorted(place.glob("*.html"))[:PAGES]:
            try:
                with open(path, "rb") as file:
                    head = file.read(HEAD_BYTES)
            except OSError:
                continue
            if any(f"fingerprint {text[:12]}".encode() in head for text in fingerprints):
                found.append(path)
    return found


def bucket_bars(buckets: list[Any]) -> list[dict[str, Any]]:
    """The largest ones, by shape, with each one's share of the largest in percent."""
    whole = [each for each in buckets if isinstance(each, list) and len(each) == 3 and each[2]]
    largest = sorted(whole, key=lambda each: -each[2])[:BUCKETS]
    most = max((count for _, _, count in largest), default=1)
    longest = max((max(width, height) for width, height, _ in largest), default=1)
    largest.sort(key=lambda each: (each[0] / each[1], each[0]))
    return [
        {
            "name": f"{width} × {height}",
            "count": f"{count:,}",
            "share": f"{100 * count / most:.1f}",
            "shape": (max(3, round(24 * width / longest)), max(3, round(24 * height / longest))),
        }
        for width, height, count in largest
    ]
