"""Whole dialogues: a mixture of the skills, with memory, tools and system prompts."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from models.corpus import calls, facts, memory, numbers, stories, structured, talk
from models.corpus.exchange import Exchange, Message, draw
from models.corpus.system_prompts import system_prompt
from models.corpus.tools import Schema, list_tools

Maker = Callable[[random.Random], Exchange]
PLAIN: dict[str, Maker] = {
    "greeting": talk.greeting, "identity": talk.identity, "facts": facts.fact,
    "echo": talk.echo, "echo of invented words": talk.echo_invented,
    "do not know": talk.unknown, "stories": stories.story,
    "recall in one message": memory.tell_and_ask, "JSON": structured.json_object,
    "counting": numbers.count, "addition": numbers.plus, "subtraction": numbers.minus,
    "numbers too big": numbers.too_big, "usual phrases": talk.usual,
}  # fmt: skip
"""Skills whose exchanges stand alone."""
NEEDS_NO_TOOL = ("greeting", "identity", "facts", "echo", "JSON", "counting")
"""Skills that a listed tool does not change."""
FILLERS = ("greeting", "identity", "facts", "echo", "do not know")
"""Skills whose exchanges stand between telling and asking."""


@dataclass(frozen=True)
class Mixture:
    """Shares of one training phase; weights are relative to each other."""

    weights: Mapping[str, float]
    recall: float
    tools: float
    system: float
    long: float


@dataclass
class Dialogue:
    """Messages with the tools listed; `graded` is the exchange that evaluation looks at."""

    messages: list[Message] = field(default_factory=list)
    tools: list[Schema] = field(default_factory=list)
    graded: Exchange | None = None

    def add(self, exchange: Exchange) -> None:
        """Append the exchange and make it the graded one."""
        self.messages.extend(exchange.messages)
        self.graded = exchange


def training_dialogue(rng: random.Random, mixture: Mixture) -> Dialogue:
    """A dialogue of one to fourteen exchanges without any held-out draw."""
    dialogue = Dialogue()
    if rng.random() < mixture.system:
        dialogue.messages.append({"role": "system", "content": system_prompt(rng)})
    length = rng.choice((1, 2, 2, 3, 3, 4, 5))
    if rng.random() < mixture.long:
        length = rng.randint(6, 14)
    roll = rng.random()
    if roll < mixture.tools:
        _with_tools(rng, dialogue, min(length, 4))
    elif roll < mixture.tools + mixture.recall:
        _with_memory(rng, dialogue, length)
    else:
        for _ in range(length):
            dialogue.add(draw(PLAIN[_pick(rng, mixture.weights)], rng, held_out=False))
    return dialogue


def _pick(rng: random.Random, weights: Mapping[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def _with_memory(rng: random.Random, dialogue: Dialogue, length: int) -> None:
    known: dict[str, str] = {}
    if rng.random() < 0.9:
        dialogue.add(memory.tell(rng, known))
    for _ in range(length):
        roll = rng.random()
        if roll < 0.2 and len(known) < 5:
            dialogue.add(memory.tell(rng, known))
        elif roll < 0.55:
            dialogue.add(draw(PLAIN[rng.choice(FILLERS)], rng, held_out=False))
        else:
            dialogue.add(draw(lambda rng: memory.ask(rng, known), rng, held_out=False))
    dialogue.add(draw(lambda rng: memory.ask(rng, known), rng, held_out=False))


def _with_tools(rng: random.Random, dialogue: Dialogue, length: int) -> None:
    two = rng.random() < 0.12
    listed = list_tools(rng, (rng.choice(("weather", "time")),) if two else ())
    dialogue.tools = [tool.schema for tool in listed]
    if two:
        tool = next(tool for tool in listed if tool.id in ("weather", "time"))
        dialogue.add(draw(lambda rng: calls.parallel_calls(rng, tool), rng, held_out=False))
    for _ in range(length):
        if rng.random() < 0.75:
            dialogue.add(draw(lambda rng: calls.tool_answer(rng, listed), rng, held_out=False))
        elif rng.random() < 0.3:
            dialogue.add(draw(_tool_missing, rng, held_out=False))
        else:
            dialogue.add(draw(PLAIN[rng.choice(NEEDS_NO_TOOL)], rng, held_out=False))


def _tool_missing(rng: random.Random) -> Exchange:
    """An open question that no tool of the table serves."""
    while True:
        exchange = talk.unknown(rng)
        question = exchange.messages[0]["content"].lower()
        near = ("weather", "time", "price", "how much", "rain", "times", "cost", "letter", "email",
                "find", "look", "buy", "play", "warm", "tell", "write")  # fmt: skip
        if not any(word in question for word in near):
            return exchange
