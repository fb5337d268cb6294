"""What is in a picture: one or two things on a background, with the words for all of it."""

from __future__ import annotations

from dataclasses import dataclass

from demo.pictures.shapes import SHAPES

Color = tuple[int, int, int]

COLORS: dict[str, Color] = {
    "red": (214, 40, 40),
    "orange": (243, 132, 26),
    "yellow": (250, 208, 44),
    "green": (46, 150, 66),
    "blue": (40, 92, 214),
    "purple": (132, 58, 176),
    "pink": (245, 130, 180),
    "brown": (126, 78, 42),
    "black": (34, 34, 38),
    "white": (250, 250, 250),
}
PLAIN_BACKGROUNDS: dict[str, Color] = {
    "white": (244, 244, 244),
    "black": (20, 20, 24),
    "gray": (158, 160, 164),
    "yellow": (252, 232, 140),
    "green": (168, 216, 150),
    "blue": (150, 198, 246),
    "pink": (250, 204, 216),
}
SHAPE_NAMES = tuple(SHAPES)
COLOR_NAMES = tuple(COLORS)
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = {"small": 0.145, "medium": 0.21, "large": 0.3}  # radius, in sides of the picture
POSITIONS = {  # middle of the thing, in sides of the picture
    "middle": (0.5, 0.5),
    "left": (0.22, 0.5),
    "right": (0.78, 0.5),
    "top": (0.5, 0.22),
    "bottom": (0.5, 0.78),
    "top left": (0.22, 0.22),
    "top right": (0.78, 0.22),
    "bottom left": (0.22, 0.78),
    "bottom right": (0.78, 0.78),
}
SCENERY = {"night": "night sky", "meadow": "meadow", "sea": "sea", "bricks": "brick wall", "sunset": "sunset"}
BACKGROUNDS = (*PLAIN_BACKGROUNDS, *SCENERY)


@dataclass(frozen=True)
class Thing:
    """A thing in its place. `position` is a key of POSITIONS; x, y and radius are in sides of the picture."""

    shape: str
    color: str
    texture: str
    size: str
    position: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn. With two things the first one is on the left. `style`: plain or blueprint."""

    things: tuple[Thing, ...]
    background: str
    seed: int
    style: str = "plain"
