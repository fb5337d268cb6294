"""Names out of files: what would leave the folder that they are joined to is refused."""

from pathlib import Path

import pytest

from files.plain_name import plain_name


@pytest.mark.parametrize("name", ["000000.tar", "a b – ü.safetensors", ".hidden", "...", "a..b", "-rf"])
def test_a_plain_name_passes(name: str):
    assert plain_name(name, "manifest.json") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/etc/passwd",
        "../x.tar",
        "a/../../x",
        "a/b",
        "a/",
        "a\\b",
        "..\\x",
        "C:\\x",
        "a\0b",
        None,
        3,
        ["a"],
        b"a",
    ],
)
def test_another_is_refused_in_one_line(name: object):
    with pytest.raises(ValueError, match=r"set/manifest\.json") as refused:
        plain_name(name, Path("set/manifest.json"))
    assert str(refused.value).isprintable()


def test_an_evil_name_is_shown_harmlessly():
    with pytest.raises(ValueError) as refused:
        plain_name("../\x1b[2J\n" + "x" * 10**6, "m")
    assert str(refused.value).isprintable() and len(str(refused.value)) < 500
