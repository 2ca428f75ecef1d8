"""The small world the embedded model lives in: one shape, one colour, one motion, one plain background.

Every other module takes its names from here, so the captions, the pixels and the judge can't disagree.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

RGB = tuple[int, int, int]

COLORS: dict[str, RGB] = {
    "red": (225, 25, 30),
    "green": (25, 190, 60),
    "blue": (35, 75, 250),
    "yellow": (250, 225, 30),
    "white": (245, 245, 245),
    "purple": (150, 40, 200),
    "orange": (255, 130, 20),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS: dict[str, tuple[int, int]] = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
BACKGROUNDS: dict[str, RGB] = {"black": (10, 10, 10), "white": (245, 245, 245), "gray": (128, 128, 128)}
BACKGROUND_SHARES = (0.44, 0.28, 0.28)
# Pixels across in a 64 pixel frame. A token of the transformer is 16 of them: in a shape no larger than that, a circle
# can't be told from a square.
SIZES: dict[str, tuple[float, float]] = {"small": (21, 24), "large": (32, 36)}
ANY_SIZE = (26, 30)

SLOW_START = 0.1  # of the room: where a slow text clip starts at most, so that its way goes on in later windows

HELD_OUT_ONE_IN = 7


class Traits(NamedTuple):
    """What a prompt can ask for; `size` may be None, which means any. What stands still is never `slow`."""

    color: str
    shape: str
    motion: str
    background: str
    size: str | None = None
    slow: bool = False


@dataclass(frozen=True)
class Scene:
    """Traits with every number decided.

    `reach` is the share of the free room that the shape travels, `along` where in the rest it starts, and
    `across` its place on the other axis, all 0 to 1. What is slow has a speed instead of a reach, and `along` is where
    in all of the room it starts.
    """

    traits: Traits
    diameter: float
    reach: float
    along: float
    across: float


def allowed(traits: Traits) -> bool:
    """A white shape on white would be a caption about nothing."""
    return traits.color != traits.background


def held_out(traits: Traits) -> bool:
    """One combination in seven, spread evenly over every trait, is never trained on."""
    key = 2 * list(COLORS).index(traits.color) + 3 * SHAPES.index(traits.shape)
    key += 4 * list(MOTIONS).index(traits.motion) + 5 * list(BACKGROUNDS).index(traits.background)
    return key % HELD_OUT_ONE_IN == 0


def combinations(*, held: bool) -> list[Traits]:
    """Every allowed combination without a size: the held-out ones, or the trained ones."""
    every = (Traits(c, s, m, b) for c in COLORS for s in SHAPES for m in MOTIONS for b in BACKGROUNDS)
    return [traits for traits in every if allowed(traits) and held_out(traits) is held]


def sample_traits(rng: random.Random, slow: float = 0.0) -> Traits:
    """Draw traits that are trained on; of what moves, the share `slow` moves slowly."""
    while True:
        ground = rng.choices(list(BACKGROUNDS), BACKGROUND_SHARES)[0]
        size = rng.choice([*SIZES, None, None])
        traits = Traits(rng.choice(list(COLORS)), rng.choice(SHAPES), rng.choice(list(MOTIONS)), ground, size)
        if allowed(traits) and not held_out(traits):
            # Without slow clips nothing more is drawn: the latents' scale comes from a fixed set of scenes.
            return traits._replace(slow=traits.motion != "still" and slow > 0 and rng.random() < slow)


def place(traits: Traits, rng: random.Random, *, anywhere: bool = False) -> Scene:
    """Decide the numbers. A text clip crosses most of the frame, or if it is slow starts at the beginning of its way;
    `anywhere` also starts in the middle of it, as the picture of an image-to-video request may."""
    low, high = SIZES.get(traits.size or "", ANY_SIZE)
    reach = rng.uniform(0.4 if anywhere else 0.8, 1.0)
    latest = SLOW_START if traits.slow and not anywhere else 1.0
    return Scene(traits, rng.uniform(low, high), reach, latest * rng.random(), rng.random())
