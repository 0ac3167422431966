"""Fields of the OpenAI API that this version does not act on: what is harmless is accepted, the rest refused by name. Pure.

Nothing is accepted and then ignored if it would have changed the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from services.runtime.errors import CaravanError


@dataclass(frozen=True, slots=True)
class InertField:
    """A field without effect. `accepts` tells which values may pass; `null` always may."""

    why: str
    accepts: Callable[[Any], bool]
    accepted: str
    """The values that pass, in words; empty where none does."""


def _refused(why: str) -> InertField:
    return InertField(why, _only([]), "")


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _only(allowed: Sequence[Any]) -> Callable[[Any], bool]:
    # 1 == True in Python; JSON tells them apart.
    return lambda value: any(value == item and type(value) is type(item) for item in allowed)


_LABEL: Final = InertField(
    "It labels requests at OpenAI and changes no answer.", _text, "any string"
)
_ONE: Final = InertField("One answer is made per request.", _only([1]), "`1`")

_BOTH: Final = {"user": _LABEL, "n": _ONE}

CHAT_FIELDS: Final[Mapping[str, InertField]] = {
    **_BOTH,
    "audio": _refused("Answers are text."),
    "function_call": _refused("It was replaced by `tool_choice`."),
    "functions": _refused("They were replaced by `tools`."),
    "metadata": InertField(
        "It labels stored answers, and none is stored.",
        lambda value: isinstance(value, dict) and all(_text(item) for item in value.values()),
        "an object of strings",
    ),
    "modalities": InertField("Answers are text.", lambda value: value == ["text"], '`["text"]`'),
    "moderation": _refused("Nothing is moderated."),
    "parallel_tool_calls": InertField("The model may make several calls.", _only([True]), "`true`"),
    "prediction": _refused("Predicted outputs are not used."),
    "prompt_cache_key": InertField(
        "It is a hint for routing at OpenAI and changes no answer.", _text, "any string"
    ),
    "prompt_cache_options": _refused("The options of the cache are in `caravan`."),
    "prompt_cache_retention": _refused("How long something is kept cannot be chosen."),
    "reasoning_effort": _refused("The effort cannot be chosen."),
    "safety_identifier": _LABEL,
    "service_tier": InertField(
        "There is one tier.", _only(["auto", "default"]), '`"auto"`, `"default"`'
    ),
    "store": InertField("Answers are not stored.", _only([False]), "`false`"),
    "verbosity": _refused("The verbosity cannot be chosen."),
    "web_search_options": _refused("There is no web search."),
}

COMPLETION_FIELDS: Final[Mapping[str, InertField]] = {
    **_BOTH,
    "best_of": _ONE,
    "echo": InertField("The prompt is not repeated.", _only([False]), "`false`"),
    "suffix": _refused("Text is continued at its end only."),
}


def unsupported(param: str, why: str) -> CaravanError:
    """An UNSUPPORTED_FIELD that blames `param`."""
    return CaravanError("UNSUPPORTED_FIELD", f"'{param}' is not supported here: {why}", param=param)


def take_inert(body: dict[str, Any], fields: Mapping[str, InertField]) -> dict[str, Any]:
    """The body without the fields of the table. Raises UNSUPPORTED_FIELD for a value that may not pass."""
    left: dict[str, Any] = {}
    for name, value in body.items():
        field = fields.get(name)
        if field is None:
            left[name] = value
        elif value is not None and not field.accepts(value):
            also = f" Accepted: {field.accepted}." if field.accepted else ""
            raise unsupported(name, f"{field.why}{also}")
    return left
