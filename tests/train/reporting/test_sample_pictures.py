"""The timeline of sample images: base beside LoRA, thousands of them bounded, damaged ones told."""

import base64
import io
from pathlib import Path

from PIL import Image

from tests.helpers.run_folders import HOSTILE, write_run, write_samples
from train.reporting.run_record import read_run
from train.reporting.sample_pictures import THUMBNAIL, timeline
from train.watching.image_grid import save_png


def color(found: dict) -> tuple[int, ...]:
    data = base64.b64decode(found["url"].removeprefix("data:image/jpeg;base64,"))
    return Image.open(io.BytesIO(data)).convert("RGB").getpixel((3, 3))


def test_base_and_steps_by_prompt(tmp_path: Path) -> None:
    found = timeline(read_run(write_run(tmp_path / "run")))
    assert found is not None and found["steps"] == [25, 50, 75, 100] and found["note"] == ""
    assert [prompt["text"] for prompt in found["prompts"]] == ["a blue circle", HOSTILE]
    first = found["prompts"][0]
    reds = [color(first["base"])[0], *(color(image)[0] for image in first["images"])]
    assert all(abs(red - step) < 4 for red, step in zip(reds, [0, 25, 50, 75, 100], strict=True))
    assert (first["base"]["width"], first["base"]["height"]) == (48, 32)


def test_no_pictures_and_no_base(tmp_path: Path) -> None:
    assert timeline(read_run(write_run(tmp_path / "none", samples=0))) is None
    folder = write_run(tmp_path / "run", samples=0)
    write_samples(folder, [40, 80])
    found = timeline(read_run(folder))
    assert found is not None and found["steps"] == [40, 80] and found["prompts"][0]["base"] is None


def test_the_bases_own_folder_and_pictures_of_the_average(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", samples=0)
    write_samples(folder, [7, 0, 40])
    (folder / "samples" / "step-00000007").rename(folder / "samples" / "base")
    save_png(folder / "samples" / "step-00000040" / "00-ema.png", Image.new("RGB", (8, 8), "red"), {"prompt": "a cat"})
    found = timeline(read_run(folder))
    assert found is not None and found["steps"] == [0, 40]
    texts = {prompt["name"]: prompt["text"] for prompt in found["prompts"]}
    assert texts == {"00-ema.png": "a cat (ema)", "00.png": "a blue circle", "01.png": HOSTILE}
    assert all(abs(color(prompt["base"])[0] - 7) < 4 for prompt in found["prompts"])


def test_thousands_are_bounded_and_large_ones_are_small(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", samples=0)
    write_samples(folder, list(range(300)), tuple(f"prompt {number}" for number in range(12)))
    Image.new("RGB", (1500, 1000), "red").save(folder / "samples" / "step-00000299" / "00.png")
    found = timeline(read_run(folder), pictures=40)
    assert found is not None and len(found["prompts"]) == 8
    assert sum(len(prompt["images"]) + 1 for prompt in found["prompts"]) <= 40
    assert found["steps"][0] == 1 and found["steps"][-1] == 299
    assert found["note"] == "4 of 299 steps, evenly spread; 8 of 12 prompts"
    assert (found["prompts"][0]["images"][-1]["width"], found["prompts"][0]["images"][-1]["height"]) == (THUMBNAIL, 256)


def test_damaged_and_missing_pictures(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "samples" / "step-00000050" / "00.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    (folder / "samples" / "step-00000075" / "01.png").unlink()
    (folder / "samples" / "step-00000012").touch()
    found = timeline(read_run(folder))
    assert found is not None and found["note"] == "1 pictures can't be read, first step-00000050/00.png"
    assert [image is not None for image in found["prompts"][0]["images"]] == [True, False, True, True]
    assert [image is not None for image in found["prompts"][1]["images"]] == [True, True, False, True]
