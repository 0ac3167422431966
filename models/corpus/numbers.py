"""Counting and small sums."""

import random

from models.corpus.exchange import Exchange, casual, simple

Phrases = tuple[str, ...]
TOO_BIG = "These numbers are too big for me."
LARGEST_TERM = 20
LARGEST_COUNT = 20
_FROM_TO: Phrases = (
    "Count from {a} to {b}.", "Please count from {a} to {b}.", "Count from {a} up to {b}.",
    "Can you count from {a} to {b}?", "Count: {a} to {b}.", "List the numbers from {a} to {b}.",
    "Give me the numbers from {a} to {b}.", "Write the numbers from {a} to {b}.",
)  # fmt: skip
_DOWN: Phrases = (
    "Count down from {a} to {b}.", "Please count down from {a} to {b}.",
    "Count backwards from {a} to {b}.", "Count from {a} down to {b}.", "Count from {a} to {b}.",
    "Can you count down from {a} to {b}?",
)  # fmt: skip
_TO: Phrases = (
    "Count to {b}.",
    "Please count to {b}.",
    "Can you count to {b}?",
    "Count up to {b}.",
)
_PLUS: Phrases = (
    "What is {a} plus {b}?", "What is {a} + {b}?", "{a} + {b}", "{a} + {b} = ?", "Add {a} and {b}.",
    "How much is {a} plus {b}?", "How much is {a} + {b}?", "What is the sum of {a} and {b}?",
    "Calculate {a} + {b}.", "{a} plus {b}?", "Compute {a} plus {b}.", "Please add {a} and {b}.",
)  # fmt: skip
_MINUS: Phrases = (
    "What is {a} minus {b}?", "What is {a} - {b}?", "{a} - {b}", "{a} - {b} = ?",
    "How much is {a} minus {b}?", "Subtract {b} from {a}.", "Calculate {a} - {b}.",
    "{a} minus {b}?", "Compute {a} minus {b}.", "How much is {a} - {b}?",
)  # fmt: skip


def count(rng: random.Random) -> Exchange:
    """Count up or down between 0 and 20, both ends included."""
    start, end = sorted(rng.sample(range(LARGEST_COUNT + 1), 2))
    roll = rng.random()
    phrases: Phrases
    if roll < 0.2:
        start, end, phrases = 1, max(2, end), _TO
    elif roll < 0.7:
        phrases = _FROM_TO
    else:
        start, end, phrases = end, start, _DOWN
    step = 1 if end > start else -1
    numbers = ", ".join(str(number) for number in range(start, end + step, step))
    number = rng.randrange(len(phrases))
    question = casual(rng, phrases[number]).format(a=start, b=end)
    return simple("counting", question, numbers + ".", key=f"{start}|{end}|{number}")


def plus(rng: random.Random) -> Exchange:
    """A sum of two terms of at most 20; terms up to 10 are drawn more often."""
    largest = rng.choice((10, LARGEST_TERM, LARGEST_TERM))
    first, second = rng.randint(0, largest), rng.randint(0, largest)
    return _sum(rng, "addition", _PLUS, first, second, first + second, "+")


def minus(rng: random.Random) -> Exchange:
    """A difference that is not negative, of numbers up to 20."""
    second, first = sorted((rng.randint(0, LARGEST_TERM), rng.randint(0, LARGEST_TERM)))
    return _sum(rng, "subtraction", _MINUS, first, second, first - second, "-")


def _sum(  # noqa: PLR0917
    rng: random.Random, skill: str, phrases: Phrases, first: int, second: int,
    result: int, sign: str,
) -> Exchange:  # fmt: skip
    number = rng.randrange(len(phrases))
    question = casual(rng, phrases[number]).format(a=first, b=second)
    answer = f"{first} {sign} {second} = {result}"
    return simple(skill, question, answer, key=f"{answer}|{number}")


def too_big(rng: random.Random) -> Exchange:
    """Sums and counts beyond the skill are declined."""
    first, second = rng.randint(30, 9999), rng.randint(1, 9999)
    if rng.random() < 0.5 and second >= 30:
        first, second = second, first
    phrases: Phrases = (*_PLUS, *_MINUS)
    if rng.random() < 0.3:
        first, second = rng.randint(1, 50), rng.choice((50, 100, 1000, rng.randint(30, 1000)))
        phrases = (*_FROM_TO, *_TO)
    phrase = casual(rng, rng.choice(phrases))
    return simple("numbers too big", phrase.format(a=first, b=second), TOO_BIG)
