"""Other people's readers take our shards as they are: webdataset, open_clip's, megatron-energon's.

The last two are optional, in an environment of their own: CONTRIBUTING.md says how.
"""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from data_prep import make_shards
from tests.helpers.photos import encoded, photo

NAMES = ["photo v1.2.jpg", "photo v1.3.jpg", "Käfer 🐞.png", "a.b.c.webp", "plain.jpg"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names that webdataset would tear apart at their first dot, in two shards."""
    root = tmp_path_factory.mktemp("foreign")
    base = root / "in"
    base.mkdir()
    for number, name in enumerate(NAMES):
        kind = {"png": "PNG", "webp": "WEBP"}.get(name.rpartition(".")[2], "JPEG")
        (base / name).write_bytes(encoded(photo(90, 80, seed=number), kind))
        (base / name).with_suffix(".txt").write_text(f"caption of {name}")
    flags = ["--max_pixels", "4096", "--num_workers", "0", "--resize", "pillow", "--samples_per_shard", "3"]
    assert make_shards.main(["--dataset_base_path", str(base), "--output_path", str(root / "out"), *flags]) == 0
    return root / "out"


def assert_complete(samples: list[dict]) -> None:
    """Every sample once, with its picture and its own caption."""
    assert len({sample["__key__"] for sample in samples}) == len(samples) == len(NAMES)
    for sample in samples:
        record = json.loads(sample["json"])
        assert sample["txt"].decode() == record["caption"] == f"caption of {record['path']}"
        assert Image.open(io.BytesIO(sample["jpg"])).size == (record["width"], record["height"])
    assert {json.loads(sample["json"])["path"] for sample in samples} == set(NAMES)


def test_webdataset(packed: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    tars = sorted(str(path) for path in packed.glob("*.tar"))
    assert_complete(list(webdataset.WebDataset(tars, shardshuffle=False)))


def test_open_clip(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = importlib.util.find_spec("open_clip_train")
    if package is None or package.origin is None:
        pytest.skip("open_clip_torch is not installed (optional)")
    pytest.importorskip("pandas", reason="open_clip's reader imports pandas, which is not installed (optional)")
    # Imported there for other data sets than WebDataset; the real one fails beside a torch of another build (CPU, CUDA).
    torchvision, datasets = ModuleType("torchvision"), ModuleType("torchvision.datasets")
    torchvision.datasets = datasets  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    spec = importlib.util.spec_from_file_location("open_clip_data", Path(package.origin).with_name("data.py"))
    assert spec is not None and spec.loader is not None
    data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(data)
    tars = sorted(str(path) for path in packed.glob("*.tar"))
    files = data.tar_file_expander(data.url_opener([{"url": tar} for tar in tars]))
    # webdataset 1.x marks the end of each tar with an entry that open_clip 3.3, written for 0.2, doesn't expect.
    assert_complete(list(data.group_by_keys_nothrow(file for file in files if "fname" in file)))
    samples, shards = data.get_dataset_size(str(packed / "{000000..000001}.tar"))  # from sizes.json
    assert (samples, shards) == (len(NAMES), 2)


def test_energon(packed: Path) -> None:
    pytest.importorskip("megatron.energon", reason="megatron-energon is not installed (optional)")
    command = [sys.executable, "-m", "megatron.energon.cli.main", "prepare", str(packed), "--non-interactive"]
    command += ["--split-ratio", "1,0,0", "--sample-type", "CaptioningSample", "--num-workers", "1", "--no-progress"]
    command += ["--field-map", '{"image": "jpg", "caption": "txt"}', "--media-metadata-by-extension"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    from megatron.energon import WorkerConfig, get_loader, get_train_dataset

    workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_train_dataset(packed, batch_size=1, shuffle_buffer_size=None, max_samples_per_sequence=None,
                                worker_config=workers, repeat=False)  # fmt: skip
    captions = [caption for batch in get_loader(dataset) for caption in batch.caption]
    assert sorted(captions) == sorted(f"caption of {name}" for name in NAMES)
