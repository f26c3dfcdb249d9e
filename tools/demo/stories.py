"""Short plain stories from a small grammar: what the demo model knows of running text."""

import random

from words import ANIMALS, COLOURS, FEELINGS, FOODS, NAMES, PLACES, THINGS, between, pick, some

OPENINGS = (
    "{name} lives near the {place}.",
    "One day {name} went to the {place}.",
    "{name} has a {colour} {animal}.",
    "There was a {colour} {animal} in the {place}.",
    "In the morning {name} was {feeling}.",
    "{name} and {friend} are at the {place}.",
)
MIDDLES = (
    "{name} sees a {colour} {animal} and calls {friend}.",
    "{friend} gives {name} {count} {things}.",
    "The {animal} wants to eat the {food}.",
    "They look for the {things} in the {place}.",
    "{name} puts the {things} into a {colour} box.",
    'The {animal} is {feeling}, so {name} says: "Come here!"',
    'Then {friend} asks: "Where is my {food}?"',
    "It rains, and they run to the {place}.",
    "{name} counts the {things}. There are {count}.",
    "They eat {food} and {dish} under a tree.",
    "The {animal} runs away, but {friend} finds it.",
)
ENDINGS = (
    "{name} is {feeling} now.",
    "Then they all go home.",
    "It was a good day.",
    "At night {name} sleeps well.",
    "The {animal} stays with {name}.",
    "{friend} and {name} are friends.",
)


def story(rng: random.Random) -> str:
    """An opening, two to five sentences in which the same people, animal and things come back, and an ending."""
    name, friend = some(rng, NAMES, 2)
    food, dish = some(rng, FOODS, 2)
    fixed = {"name": name, "friend": friend, "animal": pick(rng, ANIMALS), "colour": pick(rng, COLOURS)}
    fixed |= {"food": food, "dish": dish, "things": pick(rng, THINGS), "count": between(rng, 2, 9)}
    sentences = [pick(rng, OPENINGS), *some(rng, MIDDLES, between(rng, 2, 5)), pick(rng, ENDINGS)]
    return " ".join(line.format(**fixed, place=pick(rng, PLACES), feeling=pick(rng, FEELINGS)) for line in sentences)
