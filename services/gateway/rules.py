"""Rules that both public APIs share: ranges, sizes and contradictions. Pure.

A rule raises CaravanError with the path of the field in the API that the client used; `at` makes that path from the name that
the field has in caravan.core.v1 (the names of the OpenAI API are the same, without a prefix).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from caravan.core.v1 import chat_pb2, generation_pb2

from services.runtime.errors import CaravanError

STOP_TEXTS_MAX: Final = 16
STOP_TEXT_BYTES_MAX: Final = 256
LOGIT_BIASES_MAX: Final = 1024
SCHEMA_BYTES_MAX: Final = 64 * 1024
SCHEMA_LEVELS_MAX: Final = 64
TOOLS_MAX: Final = 128
MODEL_NAME_BYTES_MAX: Final = 256
TOKEN_ID_MAX: Final = 2**32 - 1

_FUNCTION_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")

Path = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Range:
    """Allowed values of a number; `above` excludes the lower end."""

    lowest: float
    highest: float
    above: bool = False

    def __contains__(self, value: float) -> bool:
        # Written so that NaN is outside.
        return (self.lowest < value if self.above else self.lowest <= value) and (
            value <= self.highest
        )

    def __str__(self) -> str:
        low = f"greater than {self.lowest:g}" if self.above else f"at least {self.lowest:g}"
        return f"{low} and at most {self.highest:.10g}"


RANGES: Final = {
    "temperature": Range(0, 2),
    "top_p": Range(0, 1, above=True),
    "top_k": Range(0, 1_000_000),
    "min_p": Range(0, 1),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "repeat_penalty": Range(0, 2, above=True),
    "max_tokens": Range(1, 2**31 - 1),
    "top_logprobs": Range(0, 20),
    "logit_bias": Range(-100, 100),
}
"""By the names of caravan.core.v1; max_tokens in tokens."""


def invalid(param: str, message: str) -> CaravanError:
    """An INVALID_VALUE that blames `param`."""
    return CaravanError("INVALID_VALUE", f"Invalid '{param}': {message}", param=param)


def check_range(name: str, value: float, param: str, allowed: Range | None = None) -> None:
    """Refuses a number outside the range of the field `name`."""
    allowed = allowed or RANGES[name]
    if value not in allowed:
        raise invalid(param, f"{_shown(value)} is not {allowed}.")


def _shown(value: float) -> str:
    # A number of JSON may have thousands of digits.
    return f"{value:.10g}" if abs(value) < 1e20 else "this number"


def check_model_name(name: str) -> None:
    """Refuses a name that no model can have."""
    if not name:
        raise CaravanError("MISSING_FIELD", "Missing required parameter: 'model'.", param="model")
    if len(name.encode()) > MODEL_NAME_BYTES_MAX:
        raise invalid("model", f"a name has at most {MODEL_NAME_BYTES_MAX} bytes.")


def check_stop(texts: Sequence[str], param: str) -> None:
    """Refuses too many, empty or overlong stop texts."""
    if len(texts) > STOP_TEXTS_MAX:
        raise invalid(param, f"at most {STOP_TEXTS_MAX} stop texts are allowed.")
    for index, text in enumerate(texts):
        if not 1 <= len(text.encode()) <= STOP_TEXT_BYTES_MAX:
            where = f"{param}[{index}]"
            raise invalid(where, f"a stop text has 1 to {STOP_TEXT_BYTES_MAX} bytes.")


def check_sampling(sampling: generation_pb2.Sampling, at: Path) -> None:
    """Refuses numbers outside their ranges, and a schema that is too large or no JSON object."""
    for name in (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repeat_penalty",
    ):
        if sampling.HasField(name):
            check_range(name, getattr(sampling, name), at(name))
    if len(sampling.logit_bias) > LOGIT_BIASES_MAX:
        raise invalid(at("logit_bias"), f"at most {LOGIT_BIASES_MAX} biases are allowed.")
    for bias in sampling.logit_bias:
        check_range("logit_bias", bias.bias, at("logit_bias"))
    if sampling.HasField("grammar"):
        if not sampling.grammar.HasField("json_schema"):
            raise CaravanError(
                "MISSING_FIELD",
                f"Missing required parameter: '{at('grammar')}.json_schema'.",
                param=f"{at('grammar')}.json_schema",
            )
        check_schema(sampling.grammar.json_schema, f"{at('grammar')}.json_schema")


def check_schema(text: str, param: str) -> None:
    """Refuses a schema of more than 64 KiB or 64 levels, or one that is not a JSON object."""
    if len(text.encode()) > SCHEMA_BYTES_MAX:
        raise invalid(param, f"a JSON schema has at most {SCHEMA_BYTES_MAX} bytes.")
    check_depth(check_json_object(text, param), param)


def schema_text(schema: dict[str, Any], param: str) -> str:
    """A schema as JSON text with its keys in their order, which models see and follow. Refuses what check_schema refuses."""
    check_depth(schema, param)
    text = msgspec.json.encode(schema)
    if len(text) > SCHEMA_BYTES_MAX:
        raise invalid(param, f"a JSON schema has at most {SCHEMA_BYTES_MAX} bytes.")
    return text.decode()


def check_depth(value: object, param: str) -> None:
    """Refuses a value of more than 64 levels: what reads it further on may read it recursively."""
    level: list[object] = [value]
    for _ in range(SCHEMA_LEVELS_MAX):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    if any(isinstance(item, dict | list) for item in level):
        raise invalid(param, f"it has more than {SCHEMA_LEVELS_MAX} levels.")


def check_json_object(text: str, param: str) -> dict[str, Any]:
    """The object that a text holds. Refuses a text that is not one JSON object."""
    try:
        value = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        raise invalid(param, "it is not valid JSON.") from None
    if not isinstance(value, dict):
        raise invalid(param, "it is not a JSON object.")
    return value


def check_stop_conditions(stop: generation_pb2.StopConditions, at: Path) -> None:
    """Refuses a bad number of tokens and bad stop texts."""
    if stop.HasField("max_tokens"):
        check_range("max_tokens", stop.max_tokens, at("max_tokens"))
    check_stop(stop.stop, at("stop"))


def check_function_name(name: str, param: str) -> None:
    """Refuses a name that no function can have."""
    if not _FUNCTION_NAME.fullmatch(name):
        raise invalid(param, "a name has 1 to 64 of the characters a-z, A-Z, 0-9, _ and -.")


def check_tool_choice(prompt: chat_pb2.ChatPrompt, grammar: bool, at: Path) -> None:
    """Refuses choices that the tools cannot satisfy, and a forced call beside a forced format."""
    choice = prompt.tool_choice
    if choice.mode not in chat_pb2.ToolChoice.Mode.values():
        raise invalid(at("tool_choice"), "the mode is not known.")
    named = choice.mode == chat_pb2.ToolChoice.MODE_NAMED
    if choice.name and not named:
        raise invalid(at("tool_choice"), "a name is for MODE_NAMED only.")
    if not named and choice.mode != chat_pb2.ToolChoice.MODE_REQUIRED:
        return
    if not prompt.tools:
        raise invalid(at("tool_choice"), "it is only allowed together with 'tools'.")
    if named and all(tool.name != choice.name for tool in prompt.tools):
        raise invalid(at("tool_choice"), "the name is not one of the tools.")
    if grammar:
        raise invalid(at("tool_choice"), "a call cannot be required beside a required format.")


def check_tool_names(names: Sequence[str], at: Callable[[int], str], whole: str) -> None:
    """Refuses too many tools, bad names, and two tools of one name. `at` gives the path of the name of a tool."""
    if len(names) > TOOLS_MAX:
        raise invalid(whole, f"at most {TOOLS_MAX} tools are allowed.")
    seen: set[str] = set()
    for index, name in enumerate(names):
        check_function_name(name, at(index))
        if name in seen:
            raise invalid(at(index), f"there are two tools of the name '{name}'.")
        seen.add(name)
