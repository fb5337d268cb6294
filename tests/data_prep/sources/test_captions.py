"""Captions: encodings, line ends, Unicode, and cells that look like numbers or nothing."""

from __future__ import annotations

import math

import pytest

from data_prep.sources import captions


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("a cat".encode("utf-8-sig"), "a cat"),
        ("ein Käfer 🐞".encode("utf-16"), "ein Käfer 🐞"),
        (b"\xfe\xff" + "grün".encode("utf-16-be"), "grün"),
        ("blau".encode("utf-32"), "blau"),
        (b"  one\r\ntwo\rthree \n\n", "one\ntwo\nthree"),
        ("e\u0301te\u0301".encode(), "été"),  # decomposed, as macOS writes it
        (b"None", "None"),
        (b"", ""),
        (b" \r\n", ""),
        ("\u200b\ufeff".encode(), ""),  # zero width
        (b"abc\0\0", "abc"),
        (b"one\x0btwo\x0cthree", "one\ntwo\nthree"),
    ],
)
def test_bytes(data: bytes, text: str) -> None:
    assert captions.decode(data) == text


@pytest.mark.parametrize("data", [b"caf\xe9", b"\xff\xfea", b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_text(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"at byte .*save it as UTF-8"):
        captions.decode(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "a red car".encode("utf-16-le"),
            "a NUL at character 1, as in UTF-16 without a byte-order mark: save it as UTF-8",
        ),
        ("a red car".encode("utf-16-be"), "a NUL at character 1"),
        ("a red car".encode("utf-32-le"), "a NUL at character 1"),
        (b"a\0b", "a NUL at character 1"),
        (b"a \x1b[2Jred", r"a control character \(code 27\) at character 2"),
        ("a \x9b".encode(), r"code 155"),
        (b"x" * (captions.MAX_BYTES + 1), "too long for a caption"),
    ],
)
def test_text_that_is_none(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        captions.decode(data)


def test_placeholders_and_lengths() -> None:
    assert captions.holds_placeholder("a [trigger] dog") and captions.holds_placeholder("a {red|blue} car")
    assert not captions.holds_placeholder("a {red} car [left]") and not captions.holds_placeholder("one|two")
    assert captions.about_tokens("word " * 1000) == 1250 and captions.about_tokens("猫" * 600) == 600


@pytest.mark.parametrize(
    ("cell", "text"),
    [("None", "None"), ("NA", "NA"), ("12", "12"), (12, "12"), (1.5, "1.5"), ("", ""), (None, None), (math.nan, None)],
)
def test_cells(cell: object, text: str | None) -> None:
    assert captions.from_cell(cell) == text


@pytest.mark.parametrize("cell", [["a", "b"], {"en": "a"}, b"bytes", "half a pair \ud83d", True, "a\0b"])
def test_cells_that_are_no_caption(cell: object) -> None:
    with pytest.raises(ValueError):
        captions.from_cell(cell)
