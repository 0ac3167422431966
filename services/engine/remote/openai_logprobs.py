"""Log probabilities of the OpenAI API: a list of tokens for chats, lists side by side for texts. Pure.

Ids of tokens are not told; they are 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec
from caravan.core.v1 import generation_pb2

_Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]


class _Alternative(msgspec.Struct):
    token: str = ""
    logprob: float = 0.0
    bytes: list[_Byte] | None = None


class _Token(_Alternative):
    top_logprobs: list[_Alternative] | None = None


class Logprobs(msgspec.Struct):
    """Both forms: `content` of chats; `tokens`, `token_logprobs` and `top_logprobs` of texts."""

    content: list[_Token] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


def token_logprobs(given: Logprobs) -> list[generation_pb2.TokenLogprob]:
    """The tokens of one chunk."""
    if given.content is not None:
        return [
            generation_pb2.TokenLogprob(
                token=_bytes_of(token),
                logprob=token.logprob,
                top=[
                    generation_pb2.TopLogprob(token=_bytes_of(other), logprob=other.logprob)
                    for other in token.top_logprobs or ()
                ],
            )
            for token in given.content
        ]
    return list(_side_by_side(given))


def _bytes_of(token: _Alternative) -> bytes:
    """Bytes may be a part of a character, which the text of a token cannot be."""
    return token.token.encode() if token.bytes is None else bytes(token.bytes)


def _side_by_side(given: Logprobs) -> Iterator[generation_pb2.TokenLogprob]:
    numbers = given.token_logprobs or []
    tops = given.top_logprobs or []
    for place, token in enumerate(given.tokens or ()):
        number = numbers[place] if place < len(numbers) else None
        top = tops[place] if place < len(tops) else None
        ranked = sorted((top or {}).items(), key=lambda entry: -entry[1])
        yield generation_pb2.TokenLogprob(
            token=token.encode(),
            logprob=number or 0.0,
            top=[
                generation_pb2.TopLogprob(token=text.encode(), logprob=logprob)
                for text, logprob in ranked
            ],
        )
