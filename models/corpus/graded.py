"""Held-out questions of every skill, for evaluation."""

import random
from collections.abc import Callable
from dataclasses import replace

from models.corpus import calls, memory, talk
from models.corpus.dialogues import FILLERS, PLAIN, Dialogue, Maker
from models.corpus.exchange import Exchange, draw, is_held_out
from models.corpus.system_prompts import system_prompt
from models.corpus.tools import Listed, list_tools

ToolMaker = Callable[[random.Random, tuple[Listed, ...]], Exchange]


def graded_dialogue(rng: random.Random, skill: str) -> Dialogue:
    """A held-out draw of `skill`; in a third of the cases with a system prompt.

    In half of the cases other exchanges come first, except with tools.
    """
    dialogue = Dialogue()
    if rng.random() < 0.35:
        dialogue.messages.append({"role": "system", "content": system_prompt(rng)})
    if skill in _WITH_TOOLS:
        listed = list_tools(rng, (rng.choice(_LISTED[skill]),) if skill in _LISTED else ())
        dialogue.tools = [tool.schema for tool in listed]
        dialogue.add(draw(lambda rng: _WITH_TOOLS[skill](rng, listed), rng, held_out=True))
    elif skill in _RECALL:
        _add_recall(rng, dialogue, _RECALL[skill], skill)
    else:
        for _ in range(rng.choice((0, 0, 1, 2))):
            dialogue.add(draw(PLAIN[rng.choice(FILLERS)], rng, held_out=False))
        dialogue.add(draw(_ALONE[skill], rng, held_out=True))
    return dialogue


def _add_recall(
    rng: random.Random, dialogue: Dialogue, keep: Callable[[Exchange], bool], skill: str
) -> None:
    while True:
        known: dict[str, str] = {}
        told = [memory.tell(rng, known) for _ in range(rng.randint(1, 3))]
        question = memory.ask(rng, known)
        if is_held_out(question.key) and keep(question):
            break
    for exchange in told:
        dialogue.add(exchange)
    for _ in range(rng.randint(0, 3)):
        dialogue.add(draw(PLAIN[rng.choice(FILLERS)], rng, held_out=False))
    dialogue.add(replace(question, skill=skill))


def _two_calls(rng: random.Random, listed: tuple[Listed, ...]) -> Exchange:
    tool = next(tool for tool in listed if tool.id == "weather")
    both = calls.parallel_calls(rng, tool)
    return replace(both, messages=both.messages[:2])


def _no_tool(skill: str, skills: tuple[str, ...]) -> ToolMaker:
    """Questions that the listed tools do not change."""

    def kept(rng: random.Random, _listed: tuple[Listed, ...]) -> Exchange:
        return replace(PLAIN[rng.choice(skills)](rng), skill=skill)

    return kept


def _one_call(skill: str, ids: frozenset[str]) -> ToolMaker:
    """Calls of the tools with these ids; the list must have one of them."""

    def kept(rng: random.Random, listed: tuple[Listed, ...]) -> Exchange:
        wanted = tuple(tool for tool in listed if tool.id in ids)
        return replace(calls.tool_call(rng, wanted), skill=skill)

    return kept


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


def _told(exchange: Exchange) -> bool:
    return not exchange.answer["content"].startswith("You have not told")


def _numeric(exchange: Exchange) -> bool:
    return any(letter.isdigit() for letter in exchange.answer["content"])


def _names_hero(exchange: Exchange) -> bool:
    """Whether the question gives the name of the hero."""
    return f" {exchange.subject}" in exchange.messages[0]["content"]


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
    **_split("stories", ("stories, hero's name given", "stories, no name given"), _names_hero),
    **_split("JSON", ("JSON with numbers", "JSON of words"), _numeric),
    "counting": PLAIN["counting"],
    **_split(
        "addition", ("addition to 10 + 10", "addition to 20 + 20"), lambda one: _largest(one) <= 10
    ),
    **_split(
        "subtraction", ("subtraction to 10", "subtraction to 20"), lambda one: _largest(one) <= 10
    ),
    "numbers too big": PLAIN["numbers too big"],
}
_RECALL: dict[str, Callable[[Exchange], bool]] = {
    "recall of words": lambda one: _told(one) and not _numeric(one),
    "recall of numbers": lambda one: _told(one) and _numeric(one),
    "recall, never told": lambda one: not _told(one),
}
_WORD_TOOLS = ("weather", "time", "alarm", "price", "light")
_OTHER_TOOLS = ("add", "multiply", "search", "message")
_LISTED = {
    "tool call: weather, time, alarm, price, light": _WORD_TOOLS,
    "tool call: sums, search, messages": _OTHER_TOOLS,
    "two tool calls": ("weather",),
}
"""Skills with the tools of which one must be listed."""
_CHAT = ("greeting", "identity", "facts", "counting")
_WITH_TOOLS: dict[str, ToolMaker] = {
    **{
        skill: _one_call(skill, frozenset(ids))
        for skill, ids in _LISTED.items()
        if skill != "two tool calls"
    },
    "two tool calls": _two_calls,
    "answer from a tool": calls.tool_answer,
    "tools listed, but not needed": _no_tool("tools listed, but not needed", _CHAT),
    "tools listed: echo, JSON": _no_tool("tools listed: echo, JSON", ("echo", "JSON")),
}
GRADED_SKILLS = (*_ALONE, *_RECALL, *_WITH_TOOLS)
"""Everything that evaluation draws: the rows of its table."""
