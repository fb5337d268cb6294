"""What a sample's captions may become, in this order:

1. one of its captions, where it has several;
2. of `{a|b}` one alternative (--caption_alternatives);
3. tags dropped, then shuffled, but for the first ones that are kept (--caption_tag_dropout, --caption_shuffle_tags);
4. --caption_prefix and --caption_suffix around it;
5. --trigger_word for `[trigger]`, or put first where the word would be missing.

Training on image shards does it anew for each sample of each epoch, encode_shards.py --caption_variants once: both by
`CaptionOptions`, whose fields are the flags. Imports no torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import re
import shlex
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from data_prep.sources.captions import clean

TRIGGER = "[trigger]"  # as ai-toolkit spells it; in this case alone, as there
# by option name; train/config/train_config.py and encode_shards.py share these texts
CAPTION_HELP = {
    "trigger_word": "replaces [trigger] in captions; put first, before the separator, where the word is not in the caption",
    "caption_prefix": "text before each caption",
    "caption_suffix": "text behind each caption",
    "caption_alternatives": r"of {one|another} in captions one is drawn; \{ \| \} stand for themselves",
    "caption_shuffle_tags": "shuffle the tags of each caption",
    "caption_keep_tags": "the first so many tags stay first and are never dropped",
    "caption_tag_dropout": "share of tags that are left out",
    "caption_tag_separator": "what stands between two tags",
}
_PIECES = re.compile(r"\\[{|}]|[{|}]|\\|[^\\{|}]+")
_CLINGS = tuple(",.;:!?)")  # before these a suffix needs no space

Sequel = list[Any]  # of texts and choices; a choice is a list of sequels


@dataclasses.dataclass(frozen=True)
class CaptionOptions:
    """The flags of the same names. Raises ValueError for values that can't be meant."""

    trigger_word: str = ""
    caption_prefix: str = ""
    caption_suffix: str = ""
    caption_alternatives: bool = False
    caption_shuffle_tags: bool = False
    caption_keep_tags: int = 0
    caption_tag_dropout: float = 0.0
    caption_tag_separator: str = ","

    def __post_init__(self) -> None:
        for name in ("trigger_word", "caption_prefix", "caption_suffix"):
            try:
                object.__setattr__(self, name, clean(getattr(self, name)))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if not 0 <= self.caption_tag_dropout <= 1:
            raise ValueError(f"caption_tag_dropout must be from 0 to 1, got {self.caption_tag_dropout:g}")
        if self.caption_keep_tags < 0:
            raise ValueError(f"caption_keep_tags must be at least 0, got {self.caption_keep_tags}")
        if not self.caption_tag_separator.strip():
            raise ValueError("caption_tag_separator must hold something besides white space")
        if self.caption_keep_tags and not self.varies_tags:
            raise ValueError(
                f"caption_keep_tags {self.caption_keep_tags} changes nothing without caption_shuffle_tags or "
                "caption_tag_dropout"
            )

    @classmethod
    def from_options(cls, options: Any) -> CaptionOptions:
        """Of a TrainConfig, of parsed flags: of whatever has attributes with these names. None is the default."""
        given = {field.name: getattr(options, field.name) for field in dataclasses.fields(cls)}
        made = cls(**{name: value for name, value in given.items() if value is not None})
        if made.caption_tag_separator != cls.caption_tag_separator and not (made.varies_tags or made.trigger_word):
            raise ValueError(
                f"caption_tag_separator {made.caption_tag_separator!r} changes nothing without caption_shuffle_tags, "
                "caption_tag_dropout or trigger_word"
            )
        return made

    @property
    def varies_tags(self) -> bool:
        return self.caption_shuffle_tags or self.caption_tag_dropout > 0

    @property
    def varies(self) -> bool:
        """Whether chance decides what becomes of a single caption."""
        return self.varies_tags or self.caption_alternatives

    def used(self) -> dict[str, Any]:
        """The fields that aren't left at their defaults: what a file keeps of them."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value != _DEFAULTS[name]}

    def flags(self) -> str:
        """The same as words of a command."""
        words = [[f"--{name}"] + ([] if value is True else [str(value)]) for name, value in self.used().items()]
        return shlex.join(word for pair in words for word in pair)

    @property
    def added_characters(self) -> int:
        """So many characters may stand around a caption, about."""
        return sum(len(text) + 2 for text in (self.trigger_word, self.caption_prefix, self.caption_suffix) if text)

    def first(self, captions: Sequence[str]) -> str:
        """What chance has no part in: the first caption, the first alternatives, all tags as they stand."""
        return self._framed(self._chosen(captions[0], lambda count: 0), lambda count: 0)

    def drawn(self, captions: Sequence[str], chance: Random) -> str:
        """What `chance` makes of one of the captions."""

        def choose(count: int) -> int:
            return int(chance.random() * count)

        text = self._chosen(captions[choose(len(captions))], choose)
        return self._framed(self._tags(text, chance) if self.varies_tags else text, choose)

    def variants(self, captions: Sequence[str], count: int, seed: int, name: str) -> list[str]:
        """`count` texts for the sample `name` (its source path, or key), the first one being `first`; equal ones may be among
        them. The captions take turns, so that none is left out by chance. Where nothing else varies there is no more than one
        for each caption."""
        texts = [self.first(captions)]
        for number in range(1, count if self.varies else min(count, len(captions))):
            turn = captions[number % len(captions)]
            texts.append(self.drawn([turn], caption_chance(seed, number, name)))
        return texts

    def _chosen(self, text: str, choose: Callable[[int], int]) -> str:
        return chosen(text, choose) if self.caption_alternatives and ("{" in text or "\\" in text) else text

    def _tags(self, text: str, chance: Random) -> str:
        tags = [tag for part in text.split(self.caption_tag_separator.strip()) if (tag := part.strip())]
        kept, free = tags[: self.caption_keep_tags], tags[self.caption_keep_tags :]
        if self.caption_tag_dropout > 0:
            free = [tag for tag in free if chance.random() >= self.caption_tag_dropout]
        if self.caption_shuffle_tags:
            places = [chance.random() for _ in free]
            free = [free[number] for number in sorted(range(len(free)), key=places.__getitem__)]
        return self._joint.join([*kept, *free])

    @property
    def _joint(self) -> str:
        """What tags are joined by: the separator, with the spaces that it was given, or with one behind it."""
        separator = self.caption_tag_separator
        return separator if separator != separator.strip() else f"{separator} "

    def _framed(self, text: str, choose: Callable[[int], int]) -> str:
        """With prefix, suffix and trigger word."""
        if self.caption_prefix:
            prefix = self._chosen(self.caption_prefix, choose)
            text = f"{prefix} {text}" if text else prefix
        if self.caption_suffix:
            suffix = self._chosen(self.caption_suffix, choose)
            text = f"{text}{'' if not text or suffix.startswith(_CLINGS) else ' '}{suffix}"
        if not self.trigger_word:
            return text
        text = text.replace(TRIGGER, self.trigger_word)
        if self._has_trigger.search(text):
            return text
        return f"{self.trigger_word}{self._joint}{text}" if text else self.trigger_word

    @functools.cached_property
    def _has_trigger(self) -> re.Pattern[str]:
        """The word, not as a part of another; in scripts without spaces anywhere (\\w is of ASCII)."""
        return re.compile(rf"(?<!\w){re.escape(self.trigger_word)}(?!\w)", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Variants:
    """What encode_shards.py makes of each sample's captions: `count` texts, drawn by `seed`; or the first form alone."""

    options: CaptionOptions
    count: int = 1
    seed: int = 0

    def of(self, captions: Sequence[str], name: str) -> list[str]:
        """The texts of the sample `name` (its source path, or key), as CaptionOptions.variants gives them."""
        return self.options.variants(captions, self.count, self.seed, name)

    def identity(self) -> dict[str, Any]:
        """What an encoded set keeps of it, JSON; empty where captions stay as they are, one for each sample."""
        found = self.options.used() | ({"variants": self.count} if self.count > 1 else {})
        return found | ({"seed": self.seed} if self.options.varies else {})

    @classmethod
    def from_options(cls, options: Any, most_captions: int) -> Variants:
        """Of encode_shards.py's flags, for images of which one has `most_captions` captions. Raises ValueError."""
        captions, count, seed = CaptionOptions.from_options(options), options.caption_variants, options.caption_seed
        if not 1 <= count <= MOST_VARIANTS:
            raise ValueError(f"--caption_variants {count}: must be from 1 to {MOST_VARIANTS}")
        if captions.varies and count == 1:
            raise ValueError(
                f"{captions.flags()} would change nothing with --caption_variants 1, the first form of each caption: give "
                "--caption_variants 8, say"
            )
        return cls(captions, count if captions.varies else min(count, max(1, most_captions)), seed)


MOST_VARIANTS = 1000
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(CaptionOptions)}
PLAIN = CaptionOptions()  # captions as they stand
FIRST = Variants(PLAIN)  # of each sample the first alone


def caption_chance(seed: int, epoch: int, name: int | str) -> Random:
    """What decides over one sample's caption in one epoch: a generator of its own, so that no other draw depends on captions.

    Only its `random()` is used: of all methods the one whose numbers Python keeps from version to version.
    """
    text = f"caption/{seed}/{epoch}/{name}".encode("utf-8", "surrogatepass")
    return Random(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))


def chosen(text: str, choose: Callable[[int], int]) -> str:
    """`text` with one alternative of each `{a|b}`, that of number `choose(how many)`; they may be nested.

    Braces without a bar, a brace without its partner and a bar outside of braces stay as they are.
    """
    done: list[str] = []
    todo: Sequel = parsed(text)[::-1]
    while todo:  # no recursion: captions are anybody's text
        part = todo.pop()
        if isinstance(part, str):
            done.append(part)
        else:
            todo += part[choose(len(part)) if len(part) > 1 else 0][::-1]
    return "".join(done)


def parsed(text: str) -> Sequel:
    """Texts and choices in turn. What is no choice, but might have become one, is a choice of one."""
    # The whole text, then each group that isn't closed yet: its alternatives so far.
    opened: list[list[Sequel]] = [[[]]]
    for piece in _PIECES.findall(text):
        if piece == "{":
            opened.append([[]])
        elif piece == "|" and len(opened) > 1:
            opened[-1].append([])
        elif piece == "}" and len(opened) > 1:
            group = opened.pop()
            opened[-1][-1] += [group] if len(group) > 1 else ["{", group, "}"]
        else:
            opened[-1][-1].append(piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece)
    while len(opened) > 1:
        for number, alternative in enumerate(opened.pop()):
            opened[-1][-1] += ["|" if number else "{", [alternative]]
    return opened[0][0]


def add_caption_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `CaptionOptions.from_options` reads."""
    for name, text in CAPTION_HELP.items():
        kind = type(_DEFAULTS[name])
        if kind is bool:
            parser.add_argument(f"--{name}", action="store_true", help=text)
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}[kind]
            parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=text.replace("%", "%%"))


def encoded_captions(encoding: dict[str, Any] | None) -> tuple[CaptionOptions, int]:
    """What became of the captions of an encoded set, and how many variants each sample may have: the inverse of
    Variants.identity, from its `Manifest.encoding`. Raises ValueError for what can't be that."""
    told = (encoding or {}).get("captions", {})
    try:
        count = told.get("variants", 1)
        if type(count) is not int or count < 1:
            raise TypeError(f"{count!r} variants")
        return CaptionOptions(**{name: told[name] for name in _DEFAULTS if name in told}), count
    except (TypeError, AttributeError) as error:
        raise ValueError(f"the manifest's captions are damaged ({error}): encode the image shards again") from None


def refuse_in_training(name: str, asked: CaptionOptions, encoding: dict[str, Any] | None) -> None:
    """Raise ValueError where captions that are encoded already shall have another form than they were given then.

    `name`: of the data set; `encoding`: its `Manifest.encoding`.
    """
    given, _ = encoded_captions(encoding)
    if asked in (PLAIN, given):
        return
    variants = " --caption_variants 8" if asked.varies else ""
    others = [field for field in _DEFAULTS if getattr(asked, field) != getattr(given, field)]
    raise ValueError(
        f"data: the captions of {name} are encoded already ({given.flags() or 'as they stood'}), so that "
        f"{', '.join('--' + field for field in others)} can't change them any more: encode the image shards so, python "
        f"data_prep/encode_shards.py --model MODEL --data SHARDS --output_path ENCODED{variants} {asked.flags()}"
    )
