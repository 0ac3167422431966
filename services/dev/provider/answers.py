"""Composes answers: the same request gets the same answer. Pure."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from services.dev.provider.asked import Asked, AskedError
from services.dev.provider.schemas import SchemaError, instance
from services.dev.provider.script import Script

TOKENS_MAX: Final = 1 << 20
_CHARACTERS_PER_TOKEN: Final = 4
_IMAGE_TOKENS: Final = 85
_TEXT: Final = (
    "amber bridge candle drift ember field garden harbour island journey kettle lantern meadow night orchard pebble "
    "quiet river stone thread under valley willow yellow zephyr and the of with by over in"
)
_WORDS: Final = _TEXT.split()
# A token is a word with the white space before it; together they are the text, to the character.
_TOKEN: Final = re.compile(r"\s*\S+|\s+")


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool; its arguments come in pieces."""

    id: str
    name: str
    arguments: tuple[str, ...]

    def arguments_value(self) -> Any:
        """The arguments as JSON values."""
        return json.loads("".join(self.arguments))


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer. `finish` is OpenAI's word: stop, length, tool_calls or content_filter. `stop_text` is the stop text that was met."""

    finish: str
    prompt_tokens: int
    cached_tokens: int
    pieces: tuple[str, ...] = ()
    refusal: tuple[str, ...] = ()
    call: Call | None = None
    stop_text: str = ""

    @property
    def completion_tokens(self) -> int:
        """Tokens of the answer: a piece is a token."""
        return len(self.pieces) + len(self.refusal) + (len(self.call.arguments) if self.call else 0)


def compose(asked: Asked, script: Script) -> Answer:
    """Answers. Raises AskedError for a model that is not there and a prompt that is too long."""
    if script.models and asked.model not in script.models:
        raise AskedError(404, f"The model `{asked.model}` does not exist")
    prompt_tokens = -(-asked.prompt_characters // _CHARACTERS_PER_TOKEN)
    prompt_tokens += asked.images * _IMAGE_TOKENS
    if script.context_tokens and prompt_tokens > script.context_tokens:
        message = f"prompt is too long: {prompt_tokens} tokens > {script.context_tokens} maximum"
        raise AskedError(400, message, "context_length")
    cached_tokens = min(script.cached_tokens, prompt_tokens)
    if script.refusal:
        return Answer("stop", prompt_tokens, cached_tokens, refusal=_tokens(script.refusal))
    if asked.forced_tool:
        call = _call(asked)
        return Answer("tool_calls", prompt_tokens, cached_tokens, call=call)
    pieces, finish, stop_text = _text(asked, script)
    return Answer(finish, prompt_tokens, cached_tokens, pieces, stop_text=stop_text)


def _text(asked: Asked, script: Script) -> tuple[tuple[str, ...], str, str]:
    room = min(asked.max_tokens or TOKENS_MAX, TOKENS_MAX)
    if asked.schema is not None:
        wanted = _json(asked.schema)
    elif script.echo:
        wanted = _tokens(asked.last_user)
    elif script.text:
        wanted = _tokens(script.text)
    else:
        wanted = _drawn(asked.last_user, script)
    stopped, stop_text = _before_stop("".join(wanted), asked.stop)
    if stop_text:
        wanted = _tokens(stopped)
    if len(wanted) > room:
        return wanted[:room], "length", ""
    return wanted, "stop", stop_text


def _drawn(prompt: str, script: Script) -> tuple[str, ...]:
    start = zlib.crc32(prompt.encode(errors="surrogatepass"), script.seed)
    # There are 32 words, so a walk with an odd step meets all of them before it begins again.
    count, step = len(_WORDS), start >> 8 | 1
    words = [_WORDS[(start + i * step + i // count) % count] for i in range(script.tokens)]
    return tuple(word if i == 0 else f" {word}" for i, word in enumerate(words))


def _call(asked: Asked) -> Call:
    arguments = _json(dict(asked.tools)[asked.forced_tool])
    number = zlib.crc32(f"{asked.forced_tool} {asked.last_user}".encode(errors="surrogatepass"))
    return Call(f"call_{number:08x}", asked.forced_tool, arguments)


def _json(schema: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        return _tokens(json.dumps(instance(schema)))
    except SchemaError as error:
        raise AskedError(400, str(error)) from error


def _tokens(text: str) -> tuple[str, ...]:
    return tuple(_TOKEN.findall(text))


def _before_stop(text: str, stops: tuple[str, ...]) -> tuple[str, str]:
    """The text before the first stop text in it, and which one that is."""
    found = [(at, stop) for stop in stops if stop and (at := text.find(stop)) >= 0]
    if not found:
        return text, ""
    at, stop = min(found)
    return text[:at], stop
