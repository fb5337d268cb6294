"""Files whose names hold escape sequences, newlines, direction marks or bytes that are no UTF-8, in any locale."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
NAMES = [
    b"a\x1b[2J\x1b]0;owned\x07.jpg",
    b"two\nlines.jpg",
    "right\u202egpj.jpg".encode(),
    b"latin \xfc.jpg",
    b"x" * 251 + b".jpg",
]


@pytest.mark.parametrize("locale", [{"LC_ALL": "C.UTF-8"}, ASCII], ids=["UTF-8", "ASCII"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole images", "broken images"])
def test_what_the_packer_says_is_harmless(tmp_path: Path, locale: dict[str, str], whole: bool):
    photos, out = tmp_path / "photos", tmp_path / "shards"
    photos.mkdir()
    for number, name in enumerate([*NAMES, b"good.jpg"]):
        path = os.path.join(os.fsencode(photos), name)
        with open(path, "wb") as file:
            if whole or name == b"good.jpg":
                Image.new("RGB", (64, 64), (40 * number, 0, 0)).save(file, "JPEG")
            else:
                file.write(b"no picture")
        with open(path.replace(b".jpg", b".txt"), "w", encoding="utf-8") as file:
            file.write("a caption – größer")
    flags = f"--dataset_base_path {photos} --output_path {out} --num_workers 0 --height 64 --width 64".split()
    command = [sys.executable, str(ROOT / "data_prep" / "make_shards.py"), *flags]
    environment = {**os.environ, **locale}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True)
    assert done.returncode == (0 if whole else 2), done.stderr
    lines = (done.stdout + done.stderr).replace(b"\r", b"\n").split(b"\n")  # the progress bar returns
    assert all(line.decode("utf-8").isprintable() for line in lines), lines
    assert max(map(len, lines)) < 1000
    if whole:
        check = [sys.executable, str(ROOT / "data_prep" / "check_shards.py"), str(out), "--num_workers", "0"]
        assert subprocess.run(check, env=environment, capture_output=True).returncode == 0
    else:
        assert rb"\x1b[2J" in done.stdout + done.stderr
