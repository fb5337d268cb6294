"""How a scene is told: many ways to say the same, so that a prompt in anybody's words is understood."""

from __future__ import annotations

import random
from dataclasses import replace

from demo.pictures.scene import SCENERY, Scene, Thing

WHERE = {  # how each scenery is told
    "night": ("in the night sky", "at night"),
    "meadow": ("on a green meadow", "on a meadow"),
    "sea": ("at the sea", "over the blue sea"),
    "bricks": ("in front of a brick wall", "on a brick wall"),
    "sunset": ("at sunset", "in front of the sunset"),
}
NONSENSE = 0.04  # share of captions whose noun is a word that nobody knows
LEFT_OUT = 0.08  # share of captions that say nothing of the position, or of the size
SYLLABLES = ("ba", "do", "fi", "gu", "ka", "lo", "mi", "nu", "pe", "ro", "su", "ta", "vo", "wi", "ze", "sha")


def caption(scene: Scene, chance: random.Random, full: bool = False) -> str:
    """One way to tell the scene. `full` leaves nothing out and has no nonsense words: for measuring."""
    if not full and chance.random() < NONSENSE:
        nonsense = "".join(chance.choices(SYLLABLES, k=chance.choice((2, 3))))
        number = chance.randrange(len(scene.things))
        things = tuple(replace(t, shape=nonsense) if i == number else t for i, t in enumerate(scene.things))
        scene = replace(scene, things=things)
    where = tell_background(scene, chance)
    if len(scene.things) == 2:
        what = tell_pair(scene.things[0], scene.things[1], chance)
        spot = ""
    else:
        thing = scene.things[0]
        what, spot = tell(thing, chance, full), tell_position(thing.position, chance, full)
    form = chance.randrange(4)
    if form == 0:
        return f"{what}{spot} {where}"
    if form == 1:
        return f"a drawing of {what} {where}{',' if spot else ''}{spot}"
    bare = SCENERY.get(scene.background, f"{scene.background} background")
    if form == 2:
        return f"{bare}: {what}{spot}"
    return f"a picture of {what}{spot}, {bare}"


def tell(thing: Thing, chance: random.Random, full: bool = False) -> str:
    """The thing with its size, color and texture, such as "a small red striped fish"."""
    said = [] if thing.size == "medium" or (not full and chance.random() < LEFT_OUT) else [thing.size]
    said.append(thing.color)
    if thing.texture != "plain":
        said.append(thing.texture)
    if thing.shape.startswith("word"):
        form = chance.randrange(2)
        words = [word for word in said if word != thing.color]
        return (
            f"the {' '.join([*words, thing.shape])} in {thing.color}"
            if form
            else f"the {' '.join([*said, thing.shape])}"
        )
    article = "an" if said[0][0] in "aeiou" else "a"
    return f"{article} {' '.join([*said, thing.shape])}"


def tell_pair(left: Thing, right: Thing, chance: random.Random) -> str:
    left = replace(left, size="medium") if left.size == right.size == "medium" else left
    first, second = tell(left, chance, full=True), tell(right, chance, full=True)
    form = chance.randrange(3)
    if form == 0:
        return f"{first} on the left and {second} on the right"
    if form == 1:
        return f"{second} to the right of {first}"
    return f"{first} next to {second}"


def tell_position(position: str, chance: random.Random, full: bool = False) -> str:
    """Where the thing is; the middle is mostly not worth a word."""
    if position == "middle":
        return chance.choice(("", "", " in the middle"))
    if not full and chance.random() < LEFT_OUT:
        return ""
    if " " in position:
        return chance.choice((f" in the {position} corner", f" at the {position}"))
    return chance.choice(
        (f" {'at' if position in ('top', 'bottom') else 'on'} the {position}", f" near the {position} edge")
    )


def tell_background(scene: Scene, chance: random.Random) -> str:
    if scene.background in SCENERY:
        return chance.choice(WHERE[scene.background])
    return chance.choice((f"on a {scene.background} background", f"on {scene.background}"))
