"""A request to a provider in the words that all of them share. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class AskedError(Exception):
    """A request that the provider refuses: status, message, and one of faults.REASONS."""

    def __init__(self, status: int, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked for.

    prompt_characters: of all messages together; last_user: text of the user's last message.
    forced_tool: name of the tool that must be called; "" where the model may decide, and it decides against it.
    schema: the JSON schema that the answer must follow; None: it is text.
    top_logprobs: alternatives asked for; None: no log probabilities.
    """

    model: str
    stream: bool
    last_user: str
    prompt_characters: int
    images: int = 0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    tools: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    forced_tool: str = ""
    schema: Mapping[str, Any] | None = None
    include_usage: bool = True
    top_logprobs: int | None = None


def object_of(value: object, what: str) -> Mapping[str, Any]:
    """`value`, which must be a JSON object. Raises AskedError."""
    if not isinstance(value, dict):
        raise AskedError(400, f"{what} must be an object")
    return value


def list_of(value: object, what: str) -> Sequence[Any]:
    """`value`, which must be a JSON array. Raises AskedError."""
    if not isinstance(value, list):
        raise AskedError(400, f"{what} must be an array")
    return value


def text_of(value: object, what: str) -> str:
    """`value`, which must be a string that is not empty. Raises AskedError."""
    if not isinstance(value, str) or not value:
        raise AskedError(400, f"{what} must be a string")
    return value


def tokens_of(value: object, what: str) -> int | None:
    """A number of tokens, at least 1; None stays None. Raises AskedError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AskedError(400, f"{what} must be a positive integer")
    return value


def forced(choice: str, tools: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The tool that must be called: by name, or the first where `choice` is "*". Raises AskedError."""
    names = [name for name, _ in tools]
    if not choice:
        return ""
    if not names:
        raise AskedError(400, "a tool choice needs tools")
    if choice == "*":
        return names[0]
    if choice not in names:
        raise AskedError(400, f"there is no tool {choice!r}")
    return choice
