"""Short and long system prompts, which must not change the answers."""

import random

from models.corpus.tables import ADJECTIVES, CITIES, NAMES, TOPICS, WORDS

_COMMON = (
    "You are a helpful assistant.", "You are a helpful assistant", "You are helpful.",
    "Be brief.", "Answer briefly.", "Answer in one sentence.", "You are a friendly assistant.",
    "You are Caravan, a helpful assistant.", "You are a terse assistant.", "Be kind.",
    "You are a chat bot.", "You answer questions.", "Always answer in English.",
    "You are the demo assistant.", "Answer the user.", "Think before you answer.",
    "You are an assistant that can call tools.", "Follow the instructions of the user.",
)  # fmt: skip
_MADE = (
    "You are a {a} assistant for {t}.", "You help {n} with {t}.", "You work in a {w} in {c}.",
    "You are a {a} {w} from {c}.", "You are an expert in {t}.", "Never talk about {t}.",
    "The user is from {c}.", "Today we talk about {t} and {t2}.", "Your answers are {a} and {a2}.",
    "Use {t} when you can.", "You are the assistant of the {a} {w}.", "Do not mention the {w}.",
    "The {w} is {a}.", "{n} likes the {w}.", "In {c} the {w} is {a}.", "Be {a} and {a2}.",
)  # fmt: skip


def system_prompt(rng: random.Random) -> str:
    """A usual one, a made one, or (one in twelve) a long one of up to about 500 tokens."""
    roll = rng.random()
    if roll < 0.45:
        return rng.choice(_COMMON)
    if roll < 0.92:
        return " ".join(_sentence(rng) for _ in range(rng.randint(1, 3)))
    return " ".join([rng.choice(_COMMON), *(_sentence(rng) for _ in range(rng.randint(6, 60)))])


def _sentence(rng: random.Random) -> str:
    if rng.random() < 0.2:
        return rng.choice(_COMMON).rstrip(".") + "."
    return rng.choice(_MADE).format(
        a=rng.choice(ADJECTIVES), a2=rng.choice(ADJECTIVES), t=rng.choice(TOPICS),
        t2=rng.choice(TOPICS), n=rng.choice(NAMES), w=rng.choice(WORDS), c=rng.choice(CITIES),
    )  # fmt: skip
