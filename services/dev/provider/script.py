"""What the scripted provider answers when nothing goes wrong. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Self

TOKENS_MAX: Final = 1 << 20


class ScriptError(ValueError):
    """A script that makes no sense; the message says why."""


@dataclass(frozen=True, slots=True)
class Script:
    """How every request is answered.

    tokens: length of an answer, where the request asks for no fewer. A token is a word.
    text: the answer itself. "": words drawn by `seed` from what the user said last.
    echo: the answer is what the user said last.
    delay_s: seconds before the first byte of the body.
    pace_s: seconds between two pieces. 0: as fast as they go, many in one write.
    cached_tokens: tokens of each prompt that were in the provider's cache, if the prompt has so many.
    refusal: says why the model does not answer, instead of an answer.
    models: names that are served. Empty: any.
    context_tokens: prompts with more are refused. 0: none are.
    """

    tokens: int = 32
    text: str = ""
    echo: bool = False
    seed: int = 0
    delay_s: float = 0.0
    pace_s: float = 0.0
    cached_tokens: int = 0
    refusal: str = ""
    models: tuple[str, ...] = ()
    context_tokens: int = 0

    def __post_init__(self) -> None:
        """Raises ScriptError for values out of range."""
        if not 0 <= self.tokens <= TOKENS_MAX:
            raise ScriptError(f"`tokens` is not within 0 to {TOKENS_MAX}")
        if self.seed < 0 or self.cached_tokens < 0 or self.context_tokens < 0:
            raise ScriptError("`seed`, `cached_tokens` and `context_tokens` are not negative")
        if not (0 <= self.delay_s <= 3_600 and 0 <= self.pace_s <= 3_600):
            raise ScriptError("`delay_s` and `pace_s` are not within 0 to 3600")

    def changed(self, values: Mapping[str, Any]) -> Self:
        """The script with JSON-like values instead of its own. Raises ScriptError."""
        defaults = {field.name: field.default for field in fields(self)}
        for name, value in values.items():
            if name not in defaults:
                raise ScriptError(f"no such field: {name}")
            wanted = type(defaults[name])
            if wanted is tuple:
                wanted = list
            if wanted is float and type(value) is int:
                continue
            if type(value) is not wanted:
                raise ScriptError(f"`{name}` is of the wrong type")
        models = {"models": tuple(map(str, values["models"]))} if "models" in values else {}
        return replace(self, **{**values, **models})
