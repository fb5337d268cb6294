"""How each thing is drawn: parts in its own coordinates, −1 … 1 to the right and downwards.

A part is filled with a paint: `body` is the thing's own color and texture, `dark` and `light` are shades of it, the
others are fixed. Parts whose name begins with "inner" lie on the thing and get no outline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Part:
    """One filled outline. `kind`: polygon, ellipse (box corners), hole (an ellipse that is cut out), or line."""

    kind: str
    points: tuple[Point, ...]
    paint: str = "body"
    inner: bool = False
    width: float = 0.1  # of a line


@dataclass(frozen=True)
class Shape:
    """Parts in the order in which they are painted, or letters."""

    parts: tuple[Part, ...] = ()
    word: str | None = None


def polygon(*points: Point, paint: str = "body", inner: bool = False) -> Part:
    return Part("polygon", points, paint, inner)


def box(left: float, top: float, right: float, bottom: float, paint: str = "body", inner: bool = False) -> Part:
    return polygon((left, top), (right, top), (right, bottom), (left, bottom), paint=paint, inner=inner)


def ellipse(left: float, top: float, right: float, bottom: float, paint: str = "body", inner: bool = False) -> Part:
    return Part("ellipse", ((left, top), (right, bottom)), paint, inner)


def disc(x: float, y: float, radius: float, paint: str = "body", inner: bool = False) -> Part:
    return ellipse(x - radius, y - radius, x + radius, y + radius, paint, inner)


def hole(left: float, top: float, right: float, bottom: float) -> Part:
    return Part("hole", ((left, top), (right, bottom)))


def line(*points: Point, paint: str = "dark", width: float = 0.1, inner: bool = True) -> Part:
    return Part("line", points, paint, inner, width)


def eye(x: float, y: float, radius: float) -> tuple[Part, Part]:
    return disc(x, y, radius, "white", inner=True), disc(x, y, radius * 0.55, "black", inner=True)


def _star(points: int, inner_radius: float) -> Part:
    corners = []
    for i in range(2 * points):
        radius = inner_radius if i % 2 else 1.0
        angle = math.pi * i / points
        corners.append((radius * math.sin(angle), 0.06 - radius * math.cos(angle)))
    return polygon(*corners)


def _heart() -> Part:
    corners = []
    for i in range(60):
        t = 2 * math.pi * i / 60
        height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        corners.append((math.sin(t) ** 3 * 0.95, -height / 17 - 0.08))
    return polygon(*corners)


def _half_disc(left: float, top: float, right: float, bottom: float) -> Part:
    """The upper half of an ellipse that reaches from `top` down to a flat edge at `bottom`."""
    middle, radius = (left + right) / 2, (right - left) / 2
    arc = [
        (middle - radius * math.cos(math.pi * i / 24), bottom - (bottom - top) * math.sin(math.pi * i / 24))
        for i in range(25)
    ]
    return polygon(*arc)


SHAPES: dict[str, Shape] = {
    "circle": Shape((disc(0, 0, 0.92),)),
    "square": Shape((box(-0.82, -0.82, 0.82, 0.82),)),
    "triangle": Shape((polygon((0, -0.92), (0.98, 0.8), (-0.98, 0.8)),)),
    "star": Shape((_star(5, 0.45),)),
    "heart": Shape((_heart(),)),
    "ring": Shape((disc(0, 0, 0.95), hole(-0.5, -0.5, 0.5, 0.5))),
    "cross": Shape((box(-0.3, -0.95, 0.3, 0.95), box(-0.95, -0.3, 0.95, 0.3))),
    "diamond": Shape((polygon((0, -1), (0.7, 0), (0, 1), (-0.7, 0)),)),
    "moon": Shape((disc(0, 0, 0.95), hole(-0.3, -0.95, 1.3, 0.65))),
    "flower": Shape(
        (
            *(disc(0.58 * math.sin(math.pi * i / 3), -0.58 * math.cos(math.pi * i / 3), 0.4) for i in range(6)),
            disc(0, 0, 0.34, "cream", inner=True),
            disc(0, 0, 0.16, "dark", inner=True),
        )
    ),
    "tree": Shape(
        (
            box(-0.16, 0.2, 0.16, 0.98, "brown"),
            disc(-0.45, 0.02, 0.48),
            disc(0.45, 0.02, 0.48),
            disc(0, -0.42, 0.55),
        )
    ),
    "house": Shape(
        (
            box(-0.68, -0.15, 0.68, 0.92, "cream"),
            polygon((-0.98, -0.1), (0, -0.95), (0.98, -0.1)),
            box(-0.16, 0.38, 0.2, 0.92, "body", inner=True),
            box(-0.52, 0.12, -0.26, 0.4, "dark", inner=True),
            box(0.32, 0.12, 0.56, 0.4, "dark", inner=True),
        )
    ),
    "fish": Shape(
        (
            polygon((0.3, 0), (0.98, -0.6), (0.86, 0), (0.98, 0.6)),
            ellipse(-0.98, -0.56, 0.58, 0.56),
            polygon((-0.1, -0.08), (0.26, -0.3), (0.2, 0), (0.26, 0.3), (-0.1, 0.12), paint="dark", inner=True),
            *eye(-0.6, -0.14, 0.17),
        )
    ),
    "boat": Shape(
        (
            box(-0.06, -0.95, 0.06, 0.3, "brown"),
            polygon((0.06, -0.92), (0.85, 0.16), (0.06, 0.16), paint="white"),
            polygon((-0.06, -0.66), (-0.06, 0.16), (-0.62, 0.16), paint="white"),
            polygon((-0.98, 0.28), (0.98, 0.28), (0.6, 0.9), (-0.6, 0.9)),
        )
    ),
    "mushroom": Shape(
        (
            polygon((-0.28, 0), (0.28, 0), (0.36, 0.95), (-0.36, 0.95), paint="cream"),
            _half_disc(-0.98, -0.95, 0.98, 0.15),
            disc(-0.45, -0.2, 0.15, "white", inner=True),
            disc(0.1, -0.55, 0.17, "white", inner=True),
            disc(0.5, -0.12, 0.14, "white", inner=True),
        )
    ),
    "cat": Shape(
        (
            polygon((-0.82, -0.95), (-0.15, -0.55), (-0.78, 0.1)),
            polygon((0.82, -0.95), (0.15, -0.55), (0.78, 0.1)),
            ellipse(-0.88, -0.66, 0.88, 0.9),
            *eye(-0.36, -0.02, 0.2),
            *eye(0.36, -0.02, 0.2),
            polygon((-0.13, 0.3), (0.13, 0.3), (0, 0.45), paint="black", inner=True),
            line((-0.95, 0.3), (-0.35, 0.42)),
            line((0.95, 0.3), (0.35, 0.42)),
        )
    ),
    "cup": Shape(
        (
            disc(0.5, 0.1, 0.46),
            hole(0.26, -0.14, 0.74, 0.34),
            polygon((-0.88, -0.6), (0.5, -0.6), (0.36, 0.85), (-0.74, 0.85)),
            ellipse(-0.88, -0.78, 0.5, -0.42, "cream"),
        )
    ),
}
WORDS = ("YES", "NO", "HI", "SUN", "ART", "TEA", "GO", "WOW")
SHAPES |= {f'word "{word}"': Shape(word=word) for word in WORDS}

# What no picture of the training set shows: the subject that a LoRA learns (demo/pictures/new_things.py).
BLORB = Shape(
    (
        line((-0.3, -0.4), (-0.52, -0.88), paint="dark", width=0.12, inner=False),
        line((0.3, -0.4), (0.52, -0.88), paint="dark", width=0.12, inner=False),
        disc(-0.52, -0.86, 0.15, "cream"),
        disc(0.52, -0.86, 0.15, "cream"),
        box(-0.5, 0.5, -0.2, 0.98),
        box(0.2, 0.5, 0.5, 0.98),
        ellipse(-0.8, -0.58, 0.8, 0.8),
        disc(0, -0.08, 0.38, "white", inner=True),
        disc(0, -0.08, 0.19, "black", inner=True),
        polygon((-0.36, 0.42), (0.36, 0.42), (0.2, 0.62), (-0.2, 0.62), paint="black", inner=True),
    )
)
