"""Names for people: nothing that moves a cursor, one line, bounded, printable in any encoding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from files.shown import LONGEST, one_line, shown
from tests.helpers.training_run import ROOT


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("photo – größer.jpg", "photo – größer.jpg"),
        (Path("a/b.jpg"), "a/b.jpg"),
        (7, "7"),
        ("", ""),
        ("two\nlines\r\t", r"two\nlines\r\t"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b2J\x7f\x00", r"\x9b2J\x7f\x00"),
        ("cat\u202egpj.exe", r"cat\u202egpj.exe"),
        ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
        (os.fsdecode(b"\xff.jpg"), r"\udcff.jpg"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_cannot_be_seen_is_escaped(name: object, text: str):
    assert shown(name) == text
    assert shown(name).isprintable()


def test_a_long_name_keeps_its_begin_and_its_end():
    text = shown("folder/" + "x" * 10**6 + "/photo.jpg")
    assert len(text) == LONGEST and text.startswith("folder/xx") and text.endswith("xx/photo.jpg") and "…" in text
    assert shown("y" * LONGEST) == "y" * LONGEST
    assert shown("abcdefghijk", longest=7) == "abc…ijk"


def test_an_escape_is_not_cut_in_two():
    text = shown("\x1b" * 1000, longest=22)
    assert text == r"\x1b\x1b…\x1b\x1b" and len(text) <= 22


@pytest.mark.parametrize("length", [1, 50, 199, 200, 201, 399, 401, 5000])
def test_the_limit_holds_for_every_length(length: int):
    assert len(shown("\n" * length)) <= LONGEST
    assert len(shown("z" * length)) == min(length, LONGEST)


def test_a_whole_message_is_one_line():
    assert one_line(ValueError("a\nb")) == r"a\nb"
    assert len(one_line("x" * 10**6)) == 4000


@pytest.mark.parametrize(
    "settings",
    [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "latin-1"}],
)
def test_any_character_can_be_printed_anywhere(settings: dict[str, str]):
    program = (
        "from files.shown import tolerant_output; tolerant_output(); print('gr\\xf6\\xdfer \\u2265 \\u732b \\udcff')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **settings}, capture_output=True, check=True
    )
    assert done.stdout.startswith(b"gr") and not done.stderr


def test_streams_that_are_closed_take_no_files_place():
    """A file that got number 1 or 2 would take what others print."""
    code = "from files.shown import tolerant_output; tolerant_output(); import os, sys; print('x'); print('y', file=sys.stderr)"
    code += f"; sys.exit(10 + os.open({__file__!r}, os.O_RDONLY))"
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        command = f'exec {sys.executable} -c "$CODE" {closed}'
        environment = os.environ | {"PYTHONPATH": str(ROOT), "CODE": code}
        done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, timeout=60)
        assert done.returncode >= 13, done.stderr
