"""Answers in JSON with given values."""

import json
import random

from models.corpus.exchange import Exchange, casual, simple
from models.corpus.tables import CITIES, COLOURS, FOODS, NAMES, PETS

_VALUES: dict[str, tuple[str, ...]] = {
    "name": tuple(NAMES), "city": tuple(CITIES), "color": tuple(COLOURS),
    "food": tuple(FOODS), "pet": tuple(PETS),
}  # fmt: skip
_ASKS = (
    "Write JSON with {}.", "Give me JSON with {}.", "Answer in JSON: {}", "Make a JSON object with {}.",
    "Write a JSON object with {}.", "Return JSON with {}.", "Please write JSON with {}.",
    "Give me a JSON object with {}.", "Convert to JSON: {}", "Turn this into JSON: {}", "JSON: {}",
    "As JSON: {}", "Format as JSON: {}",
)  # fmt: skip
_PAIRS = ("{} {}", "{} {}", "{}: {}", "{} = {}", "{} is {}")


def json_object(rng: random.Random) -> Exchange:
    """One to four keys whose values are given in the question, in the order given there."""
    count = rng.choice((1, 2, 2, 3, 3, 4))
    keys = rng.sample(("name", "city", "color", "food", "pet", "age", "number"), count)
    values: dict[str, str | int] = {}
    for key in keys:
        values[key] = rng.choice(_VALUES[key]) if key in _VALUES else rng.randint(1, 99)
    pair = rng.choice(_PAIRS)
    parts = [pair.format(key, value) for key, value in values.items()]
    joined = ", ".join(parts)
    if len(parts) > 1 and rng.random() < 0.5:
        joined = ", ".join(parts[:-1]) + " and " + parts[-1]
    question = casual(rng, rng.choice(_ASKS)).format(joined)
    answer = json.dumps(values)
    return simple("JSON", question, answer, key=answer)
