"""The demo's own parts: the photographs, the report; the whole run is a slow test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demo import run
from demo.photos import PHOTOS, write_photo_folder
from demo.report import read_course, write_report


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photo_folder(folder)
    return folder


def test_every_photo_is_a_readable_image_with_its_own_caption(photos: Path):
    from PIL import Image

    images = sorted(file for file in photos.iterdir() if file.suffix != ".txt")
    assert len(images) == len(PHOTOS) == len({photo.name for photo in PHOTOS})
    for image in images:
        with Image.open(image) as picture:
            picture.load()
            assert min(picture.size) >= 120, f"{image.name} is only {picture.size}"
    captions = [image.with_suffix(".txt").read_text(encoding="utf-8").strip() for image in images]
    assert all(len(caption) > 30 and caption.endswith(".") for caption in captions)
    assert len(set(captions)) == len(captions)


def test_a_detail_is_cut_from_its_photograph(photos: Path):
    import numpy as np
    from PIL import Image

    photo = next(photo for photo in PHOTOS if photo.name == "cat_eyes")
    assert photo.box is not None
    whole, detail = (np.asarray(Image.open(photos / name)) for name in ("cat.png", "cat_eyes.png"))
    left, top, right, bottom = photo.box
    assert np.array_equal(detail, whole[top:bottom, left:right])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"need skimage.*pip install"):
        write_photo_folder(tmp_path / "photos")


def write_metrics(output: Path, validation: list[float]) -> None:
    (output / "run" / "wandb").mkdir(parents=True)
    rows = [{"step": step, "loss": 2 - step / 100, "seconds_per_step": 0.1} for step in range(1, 60)]
    rows += [{"step": 50 * i, "validation_loss": loss} for i, loss in enumerate(validation)]
    (output / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_results(output: Path) -> None:
    for folder in ("photos", "photo_shards", "pictures", "encoded", "samples"):
        (output / folder).mkdir()
    buckets = [{"id": 0, "width": 256, "height": 128, "count": 1}, {"id": 1, "width": 64, "height": 64, "count": 0}]
    (output / "photo_shards" / "manifest.json").write_text(json.dumps({"buckets": buckets, "shards": [{}]}))
    (output / "photos.html").touch()
    scores = {"subject": [0.0, 0.9], "style": [0.0, 1.0], "others": [0.95, 0.93], "moved": 4.0}
    (output / "samples" / "scores.json").write_text(json.dumps(scores))
    (output / "run" / "lora.safetensors").write_bytes(bytes(1000))
    (output / "samples" / "grid.png").touch()


def test_report_passes_when_validation_fell(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_metrics(tmp_path, [3.0, 1.5])
    write_results(tmp_path)
    assert write_report(tmp_path, seconds=12) == 0
    text = capsys.readouterr().out
    assert "3.000 at step 0 → 1.500 at step 50" in text
    assert "256×128" in text
    assert "64×64" not in text  # an empty bucket
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_report_fails_when_validation_did_not_fall(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_metrics(tmp_path, [3.0, 2.9])
    write_results(tmp_path)
    assert write_report(tmp_path, seconds=12) == 1
    assert "did not fall" in capsys.readouterr().out


def test_report_needs_two_validations(tmp_path: Path):
    write_metrics(tmp_path, [3.0])
    with pytest.raises(ValueError, match="1 validations"):
        read_course(tmp_path / "run" / "metrics.jsonl")


def test_report_misses_a_file(tmp_path: Path):
    write_metrics(tmp_path, [3.0, 1.0])
    write_results(tmp_path)
    (tmp_path / "samples" / "grid.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"grid\.png"):
        write_report(tmp_path, seconds=1)


def test_only_a_folder_of_the_demo_is_emptied(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    precious = tmp_path / "precious.txt"
    precious.touch()
    (tmp_path / "model_index.json").touch()
    assert run.main(["--output_path", str(tmp_path), "--model", str(tmp_path)]) == 2
    assert "choose another --output_path" in capsys.readouterr().err
    assert precious.exists()
    run.clear(tmp_path / "new")
    (tmp_path / "new" / "old.png").touch()
    run.clear(tmp_path / "new")
    assert [file.name for file in (tmp_path / "new").iterdir()] == [run.MARKER]


def test_a_failing_stage_ends_the_demo(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(run.StageFailed, match="exit code 2"):
        run.stage("no scripts", "data_prep/make_shards.py", dataset_base_path=tmp_path / "absent", output_path=tmp_path)
    assert "$ python data_prep/make_shards.py" in capfd.readouterr().out


def test_without_a_drawing_model_the_demo_says_how_to_get_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run.main(["--output_path", str(tmp_path / "demo"), "--model", str(tmp_path)]) == 2
    assert "demo/train_drawing_model.py" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
@pytest.mark.skipif(not (run.MODEL / "model_index.json").is_file(), reason="no weights in demo/drawing_model/")
def test_the_whole_demo(tmp_path: Path):
    assert run.main(["--output_path", str(tmp_path / "demo")]) == 0
    assert (tmp_path / "demo" / "samples" / "grid.png").stat().st_size > 10_000
