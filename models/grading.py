"""What counts as a right answer."""

import json
import re
from typing import Any

from models.corpus.exchange import Exchange
from models.llama_runner import Answer

STORY_TOKENS = range(60, 321)
STORY_MENTIONS = 4
_CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)


def is_right(exchange: Exchange, answer: Answer) -> bool:
    """Whether the answer ended by itself and is the expected one.

    Calls are compared as name and arguments; a story must name its hero; all else must be equal.
    """
    if not answer.stopped:
        return False
    if exchange.answer.get("tool_calls"):
        return parsed_calls(answer.text) == _expected_calls(exchange)
    if exchange.subject is not None:
        named = answer.text.count(exchange.subject) >= STORY_MENTIONS
        return named and answer.tokens in STORY_TOKENS and answer.text.endswith("The end.")
    return bool(answer.text == exchange.answer["content"])


def parsed_calls(text: str) -> list[tuple[str, Any]] | None:
    """(name, arguments) of each call when the text is calls and nothing else, or None."""
    if _CALL.sub("", text).strip():
        return None
    calls = []
    for body in _CALL.findall(text):
        try:
            call = json.loads(body)
        except json.JSONDecodeError:
            return None
        if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
            return None
        calls.append((call["name"], call["arguments"]))
    return calls


def _expected_calls(exchange: Exchange) -> list[tuple[str, Any]]:
    functions = [call["function"] for call in exchange.answer["tool_calls"]]
    return [(function["name"], function["arguments"]) for function in functions]
