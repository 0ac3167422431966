"""What a skill produces: a question with its answer, and whether it may be trained on."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

HELD_OUT_SHARE = 1 / 8
"""Share of all keys that never occur in training and that evaluation draws from."""


@dataclass(frozen=True)
class Exchange:
    """One or more messages that end with an answer of the assistant.

    `key` names the draw: exchanges with equal keys are on the same side of the split.
    `subject` is what a story must name; None where the answer must match exactly.
    """

    skill: str
    key: str
    messages: tuple[Message, ...]
    subject: str | None = None

    @property
    def answer(self) -> Message:
        """The message that is graded: the last one."""
        return self.messages[-1]


def user(text: str) -> Message:
    """A message of the user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """An answer in plain text."""
    return {"role": "assistant", "content": text}


def is_held_out(key: str) -> bool:
    """Whether draws with this key belong to evaluation; a pure function of the key."""
    return hashlib.md5(key.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def draw(
    maker: Callable[[random.Random], Exchange], rng: random.Random, held_out: bool
) -> Exchange:
    """Draw from `maker` until the split is right; a skill where it never is raises ValueError."""
    for _ in range(2000):
        exchange = maker(rng)
        if is_held_out(exchange.key) == held_out:
            return exchange
    raise ValueError(f"{maker} has no draw with held_out={held_out}")


def simple(skill: str, question: str, answer: str, key: str | None = None) -> Exchange:
    """One question with one answer; the key is the question unless given."""
    return Exchange(skill, question if key is None else key, (user(question), assistant(answer)))


def casual(rng: random.Random, phrase: str) -> str:
    """The phrase as people also type it: first letter small, no mark at the end."""
    if rng.random() < 0.2:
        phrase = phrase[0].lower() + phrase[1:]
    if rng.random() < 0.15 and phrase[-1] in ".?!":
        phrase = phrase[:-1]
    return phrase


def skewed(rng: random.Random, options: Sequence[str]) -> str:
    """The first option in three of four draws: greedy answers are then clear-cut."""
    if len(options) == 1 or rng.random() < 0.75:
        return options[0]
    return rng.choice(options[1:])
