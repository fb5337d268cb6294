"""What captions may become: each lever alone, all of them together, and what chance may and may not do."""

import argparse
import re
import shlex
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.encoding.caption_variants import (
    PLAIN,
    CaptionOptions,
    add_caption_flags,
    caption_chance,
    chosen,
    encoded_captions,
    refuse_in_training,
)

TAG = st.text("abcdefgh é中", min_size=1, max_size=6).map(str.strip).filter(bool)
WORD = st.text("xyz0", min_size=1, max_size=5)
ANY = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=40)


def drawn(options: CaptionOptions, *captions: str, times: int = 40) -> list[str]:
    return [options.drawn(captions, caption_chance(7, epoch, 3)) for epoch in range(times)]


@given(ANY, st.integers(0, 10**12))
def test_without_levers_a_caption_stays_as_it_is(text, seed):
    assert PLAIN.first([text]) == text
    assert PLAIN.drawn([text], Random(seed)) == text
    assert PLAIN.used() == {} and PLAIN.flags() == "" and not PLAIN.varies


@given(st.lists(TAG, max_size=8), st.integers(0, 8), st.integers(0, 10**12), st.sampled_from([",", ";", " | ", "/"]))
def test_shuffled_tags_are_the_same_tags_and_the_kept_ones_stay_first(tags, keep, seed, separator):
    options = CaptionOptions(caption_shuffle_tags=True, caption_keep_tags=keep, caption_tag_separator=separator)
    joined = options.drawn([separator.join(tags)], Random(seed))
    found = [tag.strip() for tag in joined.split(separator.strip())] if joined else []
    assert found[:keep] == tags[:keep] and Counter(found) == Counter(tags)


@given(st.lists(TAG, max_size=8), st.integers(0, 8), st.floats(0.01, 1), st.booleans(), st.integers(0, 10**12))
def test_dropped_tags_are_never_kept_ones_and_none_is_new(tags, keep, share, shuffle, seed):
    options = CaptionOptions(caption_shuffle_tags=shuffle, caption_keep_tags=keep, caption_tag_dropout=share)
    found = [tag for tag in options.drawn([", ".join(tags)], Random(seed)).split(", ") if tag]
    assert found[: len(tags[:keep])] == tags[:keep]
    assert not Counter(found) - Counter(tags)
    if not shuffle:
        rest = iter(tags)
        assert all(tag in rest for tag in found), "the order stays"
    if share == 1:
        assert found == tags[:keep]


def test_the_share_of_dropped_tags_and_all_orders_come():
    options = CaptionOptions(caption_tag_dropout=0.25)
    texts = drawn(options, "a, b, c, d", times=4000)
    assert sum(len(text.split(", ")) if text else 0 for text in texts) / 16_000 == pytest.approx(0.75, abs=0.01)
    orders = Counter(drawn(CaptionOptions(caption_shuffle_tags=True, caption_keep_tags=1), "k, a, b, c", times=1200))
    assert len(orders) == 6 and min(orders.values()) > 150 and all(text.startswith("k, ") for text in orders)


@given(WORD, ANY)
def test_the_trigger_word_stands_in_every_caption_and_is_added_at_most_once(word, text):
    options = CaptionOptions(trigger_word=word)
    found = options.first([text])
    assert word in found and "[trigger]" not in found
    assert options.first([found]) == found, "a second time changes nothing"
    if "[trigger]" not in text:
        assert found in (text, f"{word}, {text}", word)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a photo of [trigger] on a sofa", "a photo of zwx on a sofa"),
        ("[trigger] and [trigger]", "zwx and zwx"),
        ("a photo of a cat", "zwx, a photo of a cat"),
        ("a photo of zwx cat", "a photo of zwx cat"),
        ("a photo of zwxy", "zwx, a photo of zwxy"),
        ("[Trigger], a cat", "zwx, [Trigger], a cat"),
        ("", "zwx"),
    ],
)
def test_where_the_trigger_word_goes(caption, expected):
    assert CaptionOptions(trigger_word="zwx").first([caption]) == expected


def test_the_trigger_word_stands_before_the_separator_of_tags():
    options = CaptionOptions(trigger_word="zwx", caption_shuffle_tags=True, caption_tag_separator=" | ")
    assert options.first(["a | b"]) == "zwx | a | b"


def test_a_dropped_tag_takes_no_trigger_word_along():
    options = CaptionOptions(trigger_word="zwx", caption_tag_dropout=1.0, caption_prefix="photo")
    assert set(drawn(options, "[trigger] cat, sofa")) == {"zwx, photo"}


@pytest.mark.parametrize(
    ("prefix", "suffix", "caption", "expected"),
    [
        ("A photo:", "", "a cat", "A photo: a cat"),
        ("", "35 mm", "a cat", "a cat 35 mm"),
        ("", ", 35 mm", "a cat", "a cat, 35 mm"),
        (" by [trigger], ", "film", "", "by zwx, film"),
        ("one", "two", "", "one two"),
    ],
)
def test_prefix_and_suffix(prefix, suffix, caption, expected):
    trigger = "zwx" if "[trigger]" in prefix else ""
    assert (
        CaptionOptions(trigger_word=trigger, caption_prefix=prefix, caption_suffix=suffix).first([caption]) == expected
    )


@pytest.mark.parametrize(
    ("text", "all_of_them"),
    [
        ("a {red|blue} car", {"a red car", "a blue car"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("{a {small|large}|no} cat", {"a small cat", "a large cat", "no cat"}),
        ("{a|}x", {"ax", "x"}),
        ("{one}", {"one".join("{}")}),
        ("{one {a|b}}", {"{one a}", "{one b}"}),
        (r"\{a|b\} {c\|d|e}", {"{a|b} c|d", "{a|b} e"}),
        (r"no braces, a\|b", {"no braces, a|b"}),
        (r"saber \(fate\) {a|b}", {r"saber \(fate\) a", r"saber \(fate\) b"}),
        ("{a|b", {"{a|b"}),
        ("a|b}", {"a|b}"}),
        ("{x {a|b}", {"{x a", "{x b"}),
        ("|{}|", {"|{}|"}),
    ],
)
def test_alternatives(text, all_of_them):
    options = CaptionOptions(caption_alternatives=True)
    found = drawn(options, text, times=200)
    assert set(found) == all_of_them
    assert options.first([text]) == found[0] or options.first([text]) in all_of_them
    assert set(drawn(PLAIN, text)) == {text}


def test_the_first_form_takes_the_first_alternative_and_leaves_tags_alone():
    options = CaptionOptions(
        trigger_word="zwx",
        caption_prefix="{Photo|Picture} of",
        caption_suffix="indoors",
        caption_alternatives=True,
        caption_shuffle_tags=True,
        caption_tag_dropout=0.5,
    )
    assert options.first(["a {red|blue} cat,sofa", "another"]) == "zwx, Photo of a red cat,sofa indoors"
    texts = drawn(options, "{b|c}, a", "another", times=300)
    assert all(re.fullmatch(r"zwx, (Photo|Picture) of( another|( [abc](, [abc])?)?) indoors", text) for text in texts)
    assert len(set(texts)) > 10


@given(st.text("ab{}|\\ ", max_size=60), st.integers(0, 10**9))
def test_any_braces_parse_and_what_comes_out_stood_there(text, seed):
    chance = Random(seed)
    found = chosen(text, lambda count: int(chance.random() * count))
    rest = iter(text)
    assert all(character in rest for character in found), "a subsequence of the text"
    if not re.search(r"\{.*\|.*\}", text) and "\\" not in text:
        assert found == text


def test_hostile_depths_and_lengths_end():
    for text in ("{" * 100_000, "{a|" * 50_000 + "b" + "}" * 50_000, "{" * 50_000 + "}" * 50_000, "{a|b}" * 50_000):
        assert chosen(text, lambda count: count - 1)


@given(st.integers(0, 2**40), st.integers(0, 1000), st.integers(0, 10**9))
def test_draws_belong_to_seed_epoch_and_sample(seed, epoch, index):
    draws = [caption_chance(*place).random() for place in [(seed, epoch, index)] * 2]
    assert draws[0] == draws[1]
    others = {caption_chance(*place).random() for place in [(seed + 1, epoch, index), (seed, epoch + 1, index)]}
    assert draws[0] not in others


def test_the_numbers_of_chance_stay_what_they_are():
    """A checkpoint's run goes on with them, under any Python."""
    found = [caption_chance(0, 1, 2).random(), caption_chance(5, 0, "photos/ä.jpg").random()]
    assert found == [0.9647622152364975, 0.5748651300549428]
    options = CaptionOptions(caption_shuffle_tags=True)
    assert drawn(options, "a, b, c, d", times=3) == ["d, b, a, c", "c, d, b, a", "d, b, c, a"]


def test_one_of_several_captions_is_drawn_evenly_and_the_first_is_the_first():
    counts = Counter(drawn(PLAIN, "one", "two", "three", times=3000))
    assert set(counts) == {"one", "two", "three"} and min(counts.values()) > 900
    assert PLAIN.first(["one", "two"]) == "one"


@given(st.lists(st.lists(TAG, min_size=1, max_size=4).map(", ".join), min_size=1, max_size=4), st.integers(1, 9))
def test_variants_begin_with_the_first_form_and_give_every_caption_its_turn(captions, count):
    assert PLAIN.variants(captions, count, 0, "a.jpg") == captions[:count]
    options = CaptionOptions(caption_shuffle_tags=True, trigger_word="zwx")
    texts = options.variants(captions, count, 0, "a.jpg")
    assert texts == options.variants(captions, count, 0, "a.jpg") and len(texts) == count
    assert texts[0] == options.first(captions)
    for number, text in enumerate(texts):
        assert sorted(text.removeprefix("zwx, ").split(", ")) == sorted(captions[number % len(captions)].split(", "))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"caption_keep_tags": 1}, "caption_keep_tags 1 changes nothing without"),
        ({"caption_tag_dropout": 1.5}, "caption_tag_dropout must be from 0 to 1, got 1.5"),
        ({"caption_keep_tags": -1, "caption_shuffle_tags": True}, "must be at least 0, got -1"),
        ({"caption_tag_separator": " "}, "must hold something besides white space"),
        ({"trigger_word": "a\x1bb"}, "trigger_word: a control character"),
        ({"caption_prefix": "\ud800"}, "caption_prefix: not valid Unicode"),
    ],
)
def test_what_cannot_be_meant_is_refused(values, said):
    with pytest.raises(ValueError, match=said):
        CaptionOptions(**values)


def test_flags_make_the_options_and_come_back():
    parser = argparse.ArgumentParser()
    add_caption_flags(parser)
    options = CaptionOptions(
        trigger_word="my cat",
        caption_shuffle_tags=True,
        caption_keep_tags=2,
        caption_tag_dropout=0.25,
        caption_suffix="é",
    )
    assert CaptionOptions.from_options(parser.parse_args(shlex.split(options.flags()))) == options
    assert CaptionOptions.from_options(parser.parse_args([])) == PLAIN
    assert CaptionOptions(trigger_word="e\u0301").trigger_word == "é", "NFC, as captions are"


def test_encoded_captions_take_no_other_form():
    zwx = CaptionOptions(trigger_word="zwx", caption_shuffle_tags=True)
    for asked, encoded in ((PLAIN, {}), (PLAIN, {"captions": zwx.used()}), (zwx, {"captions": zwx.used()})):
        refuse_in_training("ENCODED", asked, encoded)
    with pytest.raises(
        ValueError, match=r"so that --trigger_word, --caption_shuffle_tags can't .* --caption_variants 8"
    ) as said:
        refuse_in_training("ENCODED", zwx, {})
    assert said.value.args[0].endswith("--caption_variants 8 --trigger_word zwx --caption_shuffle_tags")
    with pytest.raises(ValueError, match="encoded already \\(--trigger_word zwx --caption_shuffle_tags\\)"):
        refuse_in_training("ENCODED", CaptionOptions(trigger_word="other"), {"captions": zwx.used()})


@pytest.mark.parametrize(
    "told", [5, "x", [], {"trigger_word": 5}, {"variants": "3"}, {"variants": 0}, {"caption_keep_tags": 2}]
)
def test_a_damaged_manifest_is_one_line(told):
    with pytest.raises(ValueError, match=r"captions are damaged|changes nothing"):
        encoded_captions({"captions": told})
    assert encoded_captions(None) == encoded_captions({}) == (PLAIN, 1)
