"""What the LoRA learns from and is asked for: pictures with captions on disk, and wishes that the set does not show."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from demo import draw_pictures
from demo.pictures.new_things import NOT_IN_STYLE, NOT_ON_SUBJECT, PICTURES, STYLE, SUBJECT, WISHES, new_things


def test_half_is_the_subject_and_half_the_style():
    things = new_things()
    assert 20 <= len(things) == PICTURES <= 40
    assert sum(SUBJECT in thing.caption for thing in things) == PICTURES // 2
    assert sum(STYLE in thing.caption for thing in things) == PICTURES // 2
    assert len({thing.caption for thing in things}) > PICTURES * 0.9


def test_new_combinations_are_new():
    captions = [thing.caption for thing in new_things()]
    for wish in WISHES:
        assert (wish.prompt in captions) == (wish.kind == "trained")
        assert wish.shows_subject == (SUBJECT in wish.prompt)
        assert wish.shows_style == (STYLE in wish.prompt)
    for caption in captions:
        assert not any(f"{name}" in caption for name in NOT_IN_STYLE if STYLE in caption)
        if SUBJECT in caption:
            assert not any(f"{color} {SUBJECT}" in caption for color in NOT_ON_SUBJECT)


def test_the_folder_is_laid_out_as_users_have_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert draw_pictures.main(["--output_path", str(tmp_path / "pictures"), "--count", "6", "--side", "64"]) == 0
    assert "6 pictures" in capsys.readouterr().out
    images = sorted((tmp_path / "pictures").glob("*.png"))
    assert sorted(image.stem for image in images) == [f"{name}-{i:02d}" for name in (SUBJECT, STYLE) for i in range(3)]
    for image in images:
        with Image.open(image) as picture:
            assert picture.size == (64, 64)
        assert image.with_suffix(".txt").read_text().strip()
    assert draw_pictures.main(["--output_path", str(tmp_path / "none"), "--count", "1"]) == 2
    assert "--count starts at 2" in capsys.readouterr().err
