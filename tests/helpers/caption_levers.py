"""What tests of caption levers share: the flags, and pictures whose captions every lever has something to do with."""

from pathlib import Path

from tests.helpers.data_sets import write_set

LEVERS = [
    "--caption_shuffle_tags",
    "--caption_keep_tags",
    "1",
    "--caption_tag_dropout",
    "0.3",
    "--caption_alternatives",
]
TRIGGER = ["--trigger_word", "zwx", "--caption_suffix", "at night"]


def write_captioned(folder: Path) -> Path:
    """Image shards of 14 samples."""
    return write_set(folder, 14, "png", caption=lambda number: f"[trigger] {number}, a, b, {{c|d}}, e")
