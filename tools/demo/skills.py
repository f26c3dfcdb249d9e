"""The small skills of the demo model: each function draws one question and its answer."""

import json
import random
from collections.abc import Callable

from words import ANIMALS, COLOURS, FOODS, NAMES, THINGS, WORDS, between, pick, shuffled, some, weighted, words

Turn = tuple[str, str]

# Sums whose two operands both lie in here never appear in the text: they are kept for reinforcement learning.
HELD_OUT = range(50, 90)


def table(text: str) -> dict[str, str]:
    """`a-b c-d` as a dict."""
    return dict(pair.split("-") for pair in words(text))


OPPOSITES = table(
    "hot-cold big-small up-down day-night fast-slow old-new wet-dry full-empty high-low near-far soft-hard light-dark "
    "left-right first-last good-bad happy-sad"
)
SOUNDS = table("dog-woof cat-meow cow-moo pig-oink duck-quack sheep-baa owl-hoot bird-tweet")
COLOUR_OF = table("grass-green snow-white night-black mud-brown ash-grey blood-red sea-blue")
LEGS = table("dog-4 cat-4 cow-4 bird-2 duck-2 hen-2 ant-6 fish-0")
ROUNDS = (words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"), words("spring summer autumn winter"))
CHATTER = (
    ("Hello", "Hello! How can I help?"),
    ("Hi", "Hi! What can I do for you?"),
    ("Good morning", "Good morning! How can I help?"),
    ("How are you?", "I am well, thank you."),
    ("Who are you?", "I am a small demo model."),
    ("What can you do?", "I can add, copy, sort and spell."),
    ("Thank you", "You are welcome."),
    ("Thanks", "You are welcome."),
    ("Goodbye", "Goodbye!"),
    ("Can you help me?", "Yes, of course."),
)


def held_out(a: int, b: int) -> bool:
    """Whether this pair of operands is kept out of the text."""
    return a in HELD_OUT and b in HELD_OUT


def operands(rng: random.Random, top: int = 99) -> tuple[int, int]:
    """Two numbers of 0..top, small ones more often, never a held-out pair."""
    top = weighted(rng, {9: 1, 20: 2, top: 7})
    while True:
        a, b = between(rng, 0, top), between(rng, 0, top)
        if not held_out(a, b):
            return a, b


def add(rng: random.Random) -> Turn:
    """A sum."""
    a, b = operands(rng)
    forms = {"{a} + {b}": 6, "What is {a} + {b}?": 2, "Add {a} and {b}.": 1}
    return weighted(rng, forms).format(a=a, b=b), str(a + b)


def subtract(rng: random.Random) -> Turn:
    """A difference of numbers up to 50 that is not negative."""
    a, b = sorted(operands(rng, 50), reverse=True)
    forms = {"{a} - {b}": 6, "What is {a} - {b}?": 2, "Take {b} from {a}.": 1}
    return weighted(rng, forms).format(a=a, b=b), str(a - b)


def multiply(rng: random.Random) -> Turn:
    """A product out of the table of ten."""
    a, b = between(rng, 0, 10), between(rng, 0, 10)
    return weighted(rng, {"{a} x {b}": 3, "What is {a} x {b}?": 1}).format(a=a, b=b), str(a * b)


def word_problem(rng: random.Random) -> Turn:
    """A sum or a difference told with things and people."""
    a, b = sorted(operands(rng, 50), reverse=True)
    forms = {
        "{name} has {a} {thing} and gets {b} more. How many now?": a + b,
        "{name} has {a} {thing} and loses {b}. How many now?": a - b,
        "{name} buys {b} {thing} and {a} {other}. How many?": a + b,
    }
    form = pick(rng, list(forms))
    thing, other = some(rng, THINGS, 2)
    return form.format(name=pick(rng, NAMES), a=a, b=b, thing=thing, other=other), str(forms[form])


def record(rng: random.Random) -> Turn:
    """Name and number of things out of a line, in the form that is asked for."""
    a, b = operands(rng, 30)
    thing, other = some(rng, THINGS, 2)
    name, total, key = pick(rng, NAMES), a + b, pick(rng, ("sum", "count", "all"))
    line = pick(rng, (f"{name}: {a} {thing}, {b} {other}.", f"{name} gets {a} {thing} and {b} {other}."))
    forms = (
        ("Sum?", str(total)),
        ("Name?", name),
        ("Name and sum?", f"{name} {total}"),
        ("Sum and name?", f"{total} {name}"),
        ("JSON: name", json.dumps({"name": name})),
        (f"JSON: {key}", json.dumps({key: total})),
        (f"JSON: name, {key}", json.dumps({"name": name, key: total})),
        (f"JSON: {key}, name", json.dumps({key: total, "name": name})),
    )
    wish, answer = pick(rng, forms)
    return f"{line} {wish}", answer


def compare(rng: random.Random) -> Turn:
    """Which number is larger or smaller."""
    a, b = between(rng, 0, 99), between(rng, 0, 99)
    if a == b:
        b = a + 1
    if pick(rng, (True, False)):
        return f"Which is larger, {a} or {b}?", str(max(a, b))
    if pick(rng, (True, False)):
        return f"Which is smaller, {a} or {b}?", str(min(a, b))
    return f"Is {a} larger than {b}?", "Yes" if a > b else "No"


def count_on(rng: random.Random) -> Turn:
    """The number after or before another."""
    n = between(rng, 1, 98)
    if pick(rng, (True, False)):
        return f"What comes after {n}?", str(n + 1)
    return f"What comes before {n}?", str(n - 1)


def copy(rng: random.Random) -> Turn:
    """Say it again."""
    pool = pick(rng, (WORDS, NAMES, THINGS))
    text = " ".join(some(rng, pool, between(rng, 1, 5)))
    return pick(rng, ("Say: {}", "Copy: {}", "Repeat: {}")).format(text), text


def copy_digits(rng: random.Random) -> Turn:
    """Say a number again."""
    text = "".join(str(between(rng, 0, 9)) for _ in range(between(rng, 2, 6)))
    return pick(rng, ("Say: {}", "Copy: {}", "Repeat: {}")).format(text), text


def reverse(rng: random.Random) -> Turn:
    """Words or digits from last to first."""
    items = some(rng, pick(rng, (WORDS, NAMES, "0123456789")), between(rng, 2, 4))
    return "Reverse: " + " ".join(items), " ".join(reversed(items))


def sort(rng: random.Random) -> Turn:
    """Digits by size, or words by their first letters, which differ."""
    if pick(rng, (True, False)):
        digits = some(rng, "0123456789", between(rng, 2, 5))
        return "Sort: " + " ".join(digits), " ".join(sorted(digits))
    by_letter = {word[0]: word for word in shuffled(rng, WORDS)}
    words = some(rng, sorted(by_letter.values()), between(rng, 2, 3))
    return "Sort: " + " ".join(words), " ".join(sorted(words))


def change_case(rng: random.Random) -> Turn:
    """Capital letters and back."""
    word = pick(rng, WORDS)
    return pick(rng, ((f"Upper: {word}", word.upper()), (f"Lower: {word.upper()}", word)))


def letters(rng: random.Random) -> Turn:
    """Spelling, counting letters, first and last letter."""
    word = pick(rng, WORDS)
    return pick(
        rng,
        (
            (f"Spell: {word}", " ".join(word)),
            (f"How many letters in {word}?", str(len(word))),
            (f"First letter of {word}?", word[0]),
            (f"Last letter of {word}?", word[-1]),
        ),
    )


def times(rng: random.Random) -> Turn:
    """One word some times over."""
    word, count = pick(rng, WORDS), between(rng, 2, 5)
    return f"Say {word} {count} times.", " ".join([word] * count)


def fact(rng: random.Random) -> Turn:
    """A fact of the small world."""
    opposite, animal, thing, legs = (pick(rng, sorted(known)) for known in (OPPOSITES, SOUNDS, COLOUR_OF, LEGS))
    ring = pick(rng, ROUNDS)
    at = between(rng, 0, len(ring) - 1)
    return pick(
        rng,
        (
            (f"What is the opposite of {opposite}?", OPPOSITES[opposite]),
            (f"What does a {animal} say?", SOUNDS[animal]),
            (f"What colour is {thing}?", COLOUR_OF[thing]),
            (f"How many legs has a {legs}?", LEGS[legs]),
            (f"What comes after {ring[at]}?", ring[(at + 1) % len(ring)]),
        ),
    )


def kind_of(rng: random.Random) -> Turn:
    """What sort of thing a word names."""
    pools = {"an animal": ANIMALS, "a colour": COLOURS, "a food": [food for food in FOODS if food != "fish"]}
    kind = pick(rng, sorted(pools))
    word = pick(rng, pools[kind])
    asked = pick(rng, sorted(pools))
    return pick(
        rng,
        (
            (f"What is {word}?", kind[0].upper() + kind[1:] + "."),
            (f"Is {word} {asked}?", "Yes" if asked == kind else "No"),
        ),
    )


def chatter(rng: random.Random) -> Turn:
    """Manners."""
    return pick(rng, CHATTER)


SKILLS: dict[Callable[[random.Random], Turn], float] = {
    add: 26,
    subtract: 9,
    multiply: 5,
    word_problem: 8,
    record: 20,
    compare: 3,
    count_on: 2,
    copy: 9,
    copy_digits: 3,
    reverse: 4,
    sort: 4,
    change_case: 3,
    letters: 4,
    times: 2,
    fact: 3,
    kind_of: 2,
    chatter: 2,
}


def turn(rng: random.Random) -> Turn:
    """One question and its answer, of a skill drawn by weight."""
    return weighted(rng, SKILLS)(rng)
