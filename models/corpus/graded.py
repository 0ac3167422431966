"""Held-out questions of every skill, for evaluation."""

import random
from collections.abc import Callable
from dataclasses import replace

from models.corpus import calls, memory, talk
from models.corpus.dialogues import FILLERS, NEEDS_NO_TOOL, PLAIN, Dialogue, Maker
from models.corpus.exchange import Exchange, draw, is_held_out
from models.corpus.system_prompts import system_prompt
from models.corpus.tools import Listed, list_tools


def graded_dialogue(rng: random.Random, skill: str) -> Dialogue:
    """A held-out draw of `skill`; in a third of the cases with a system prompt.

    In half of the cases other exchanges come first, except with tools.
    """
    dialogue = Dialogue()
    if rng.random() < 0.35:
        dialogue.messages.append({"role": "system", "content": system_prompt(rng)})
    if skill in _WITH_TOOLS:
        listed = list_tools(rng, ("weather",) if skill == "two tool calls" else ())
        dialogue.tools = [tool.schema for tool in listed]
        dialogue.add(draw(lambda rng: _WITH_TOOLS[skill](rng, listed), rng, held_out=True))
    elif skill == "recall":
        _add_recall(rng, dialogue)
    else:
        for _ in range(rng.choice((0, 0, 1, 2))):
            dialogue.add(draw(PLAIN[rng.choice(FILLERS)], rng, held_out=False))
        dialogue.add(draw(_ALONE[skill], rng, held_out=True))
    return dialogue


def _add_recall(rng: random.Random, dialogue: Dialogue) -> None:
    while True:
        known: dict[str, str] = {}
        told = [memory.tell(rng, known) for _ in range(rng.randint(1, 3))]
        question = memory.ask(rng, known)
        if is_held_out(question.key):
            break
    for exchange in told:
        dialogue.add(exchange)
    for _ in range(rng.randint(0, 3)):
        dialogue.add(draw(PLAIN[rng.choice(FILLERS)], rng, held_out=False))
    dialogue.add(question)


def _two_calls(rng: random.Random, listed: tuple[Listed, ...]) -> Exchange:
    tool = next(tool for tool in listed if tool.id == "weather")
    both = calls.parallel_calls(rng, tool)
    return replace(both, messages=both.messages[:2])


def _no_tool(rng: random.Random, _listed: tuple[Listed, ...]) -> Exchange:
    return replace(PLAIN[rng.choice(NEEDS_NO_TOOL)](rng), skill="no tool needed")


def _only(skill: str, maker: Maker, keep: Callable[[Exchange], bool]) -> Maker:
    """The part of a skill that `keep` accepts, under its own name."""

    def kept(rng: random.Random) -> Exchange:
        while not keep(exchange := maker(rng)):
            pass
        return replace(exchange, skill=skill)

    return kept


def _unusual(exchange: Exchange) -> bool:
    """Usual phrases are always trained on: they are no test."""
    return exchange.messages[0]["content"] not in talk.USUAL


def _words(exchange: Exchange) -> int:
    return len(exchange.answer["content"].split())


def _largest(exchange: Exchange) -> int:
    """The larger number of a sum such as "3 + 4 = 7"."""
    first, _, second, *_ = exchange.answer["content"].split()
    return max(int(first), int(second))


def _split(skill: str, names: tuple[str, str], low: Callable[[Exchange], bool]) -> dict[str, Maker]:
    maker = PLAIN[skill]
    return {
        names[0]: _only(names[0], maker, low),
        names[1]: _only(names[1], maker, lambda exchange: not low(exchange)),
    }


_ALONE: dict[str, Maker] = {
    "greeting": _only("greeting", PLAIN["greeting"], _unusual),
    "identity": _only("identity", PLAIN["identity"], _unusual),
    "facts": PLAIN["facts"],
    "do not know": PLAIN["do not know"],
    "do not know, new topics": talk.unknown_new_words,
    **_split("echo", ("echo, up to 3 words", "echo, 4 to 6 words"), lambda one: _words(one) <= 3),
    "echo of invented words": PLAIN["echo of invented words"],
    "recall in one message": PLAIN["recall in one message"],
    "stories": PLAIN["stories"],
    "JSON": PLAIN["JSON"],
    "counting": PLAIN["counting"],
    **_split(
        "addition", ("addition to 10 + 10", "addition to 20 + 20"), lambda one: _largest(one) <= 10
    ),
    **_split(
        "subtraction", ("subtraction to 10", "subtraction to 20"), lambda one: _largest(one) <= 10
    ),
    "numbers too big": PLAIN["numbers too big"],
}
_WITH_TOOLS: dict[str, Callable[[random.Random, tuple[Listed, ...]], Exchange]] = {
    "tool call": calls.tool_call,
    "two tool calls": _two_calls,
    "answer from a tool": calls.tool_answer,
    "no tool needed": _no_tool,
}
GRADED_SKILLS = (*_ALONE, "recall", *_WITH_TOOLS)
"""Everything that evaluation draws: the rows of its table."""
