"""The small vocabulary of the demo text, and the draws that make it the same bytes on every Python version."""

import random
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def words(text: str) -> list[str]:
    """The words of a line."""
    return text.split()


NAMES = words("Ada Amy Ann Ava Ben Bob Dan Eva Gus Ian Ivy Jim Kim Leo Max Mia Ned Pam Ray Sam Sue Tim Tom Zoe")
THINGS = words(
    "apples bags balls bells books boxes cakes cards coins cups eggs hats keys maps nuts pens pots rings socks toys"
)
ANIMALS = words("bear bird cat cow dog duck fox frog goat hen horse mouse owl pig sheep")
COLOURS = words("black blue brown green grey pink red white")
PLACES = words("barn beach farm field forest garden house lake park river shop")
FOODS = words("apple bread cake cheese egg honey milk nut pear pie rice soup")
FEELINGS = words("happy sad tired brave cold warm")
WORDS = words(
    "arm bag ball bed bell bird boat book box bus cake cap car cat cow cup day desk dog door duck ear egg fan farm "
    "fish foot fox frog game goat gold hand hat hen hill home ice ink jam jar key king kite lake lamp leaf lion map "
    "milk moon nest net nose nut oak oven owl park pen pie pig rain ring road rock rope salt sand sea ship shoe "
    "snow sock song star sun tea tent toy tree van wall wind wolf wood yard zoo"
)


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of `items`. Only `rng.random()` is promised to stay the same between Python versions, so all draws use it."""
    return items[int(rng.random() * len(items))]


def between(rng: random.Random, low: int, high: int) -> int:
    """An integer in low..high, both ends included."""
    return low + int(rng.random() * (high - low + 1))


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    """A new list of the same items in random order."""
    return [item for _, item in sorted(((rng.random(), item) for item in items), key=lambda pair: pair[0])]


def some(rng: random.Random, items: Sequence[T], count: int) -> list[T]:
    """`count` different items."""
    return shuffled(rng, items)[:count]


def weighted(rng: random.Random, weights: dict[Any, float]) -> Any:
    """One key, drawn in proportion to its weight."""
    mark = rng.random() * sum(weights.values())
    for key, weight in weights.items():
        mark -= weight
        if mark < 0:
            return key
    return key
