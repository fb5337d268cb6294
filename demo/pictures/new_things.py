"""What a LoRA is to learn: a subject and a style that no picture of the drawing model's training shows.

The subject is the blorb, a one-eyed monster (demo/pictures/shapes.py); the style is the blueprint, white outlines on
blue squared paper. Both come as a few captioned pictures, like those that a user has.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from demo.pictures.captions import caption, tell, tell_position
from demo.pictures.painting import paint
from demo.pictures.random_scenes import place
from demo.pictures.scene import BACKGROUNDS, COLOR_NAMES, POSITIONS, SHAPE_NAMES, Scene

SUBJECT = "blorb"
STYLE = "blueprint"
PICTURES = 36  # half of them show the subject, half the style
# Things that the style is never shown with, so that it must carry over to them.
NOT_IN_STYLE = ("house", "cat", "star", "boat")
# Colors and backgrounds that the subject is never shown with.
NOT_ON_SUBJECT = ("purple", "pink")
NOT_BEHIND_SUBJECT = ("night", "bricks")


@dataclass(frozen=True)
class NewThing:
    """A picture to learn from, before it is drawn."""

    scene: Scene
    caption: str


def subject(number: int) -> NewThing:
    """The blorb in some color, size and place."""
    chance = random.Random(f"subject/{number}")
    background = chance.choice([name for name in BACKGROUNDS if name not in NOT_BEHIND_SUBJECT])
    color = chance.choice([name for name in COLOR_NAMES if name not in NOT_ON_SUBJECT and name != background])
    size = chance.choice(("medium", "large", "large"))
    position = chance.choice(("middle", *POSITIONS))
    scene = Scene((place(SUBJECT, color, "plain", size, position, chance),), background, number)
    return NewThing(scene, caption(scene, chance, full=True))


def styled(number: int) -> NewThing:
    """A known thing as a blueprint; the caption names no color, since the style decides it."""
    chance = random.Random(f"style/{number}")
    shapes = [name for name in SHAPE_NAMES if name not in NOT_IN_STYLE and not name.startswith("word")]
    shape = shapes[number % len(shapes)]
    size, position = chance.choice(("medium", "large", "large")), chance.choice(("middle", *POSITIONS))
    thing = place(shape, "white", "plain", size, position, chance)
    said = tell(thing, chance, full=True).replace("white ", "")
    spot = tell_position(position, chance, full=True)
    scene = Scene((thing,), "blue", number, style=STYLE)
    return NewThing(scene, f"{said}{spot}, {STYLE} style")


def new_things(count: int = PICTURES) -> list[NewThing]:
    """Half subject, half style, by turns."""
    return [subject(i // 2) if i % 2 == 0 else styled(i // 2) for i in range(count)]


def write_new_things(folder: Path, count: int = PICTURES, side: int = 128) -> list[Path]:
    """Write each as `name.png` with its caption in `name.txt`; returns the pictures' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, thing in enumerate(new_things(count)):
        name = SUBJECT if thing.scene.style == "plain" else STYLE
        path = folder / f"{name}-{number // 2:02d}.png"
        Image.fromarray(paint(thing.scene, side)).save(path)
        path.with_suffix(".txt").write_text(thing.caption + "\n", encoding="utf-8")
        written.append(path)
    return written


# ── What is asked of base and LoRA ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Wish:
    """A prompt and what it is to show; `kind`: trained (as in a picture of the set), new (subject or style in a
    combination that the set doesn't have), both, or other (nothing to do with the set)."""

    prompt: str
    kind: str
    shows_subject: bool = False
    shows_style: bool = False


WISHES = (
    Wish(subject(0).caption, "trained", shows_subject=True),
    Wish("a large purple blorb in the night sky", "new", shows_subject=True),
    Wish("a pink blorb at the top left in front of a brick wall", "new", shows_subject=True),
    Wish(styled(0).caption, "trained", shows_style=True),
    Wish("a large house, blueprint style", "new", shows_style=True),
    Wish("a cat on the right, blueprint style", "new", shows_style=True),
    Wish("a large blorb, blueprint style", "both", shows_subject=True, shows_style=True),
    Wish("a large red fish at the sea", "other"),
    Wish("a green tree on the left and a yellow star on the right on a blue background", "other"),
)
