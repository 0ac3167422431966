"""Log probabilities in the two forms of the OpenAI API. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from caravan.core.v1 import generation_pb2

LOWEST_LOGPROB: Final = -9999.0
"""Stands for minus infinity, which JSON cannot hold; the OpenAI API shows the same."""

Logprobs = Iterable[generation_pb2.TokenLogprob]


def chat_tokens(logprobs: Logprobs) -> list[dict[str, Any]]:
    """The entries of `logprobs.content` of a chat."""
    return [
        {**_entry(token), "top_logprobs": [_entry(top) for top in token.top]} for token in logprobs
    ]


def _entry(token: generation_pb2.TokenLogprob | generation_pb2.TopLogprob) -> dict[str, Any]:
    # A token may end within a character; then `bytes` tells what it is.
    return {
        "token": token.token.decode("utf-8", "replace"),
        "logprob": _finite(token.logprob),
        "bytes": list(token.token),
    }


def _finite(logprob: float) -> float:
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


class CompletionLogprobs:
    """Makes the `logprobs` objects of one completion: lists side by side, offsets in characters of the answer."""

    def __init__(self) -> None:
        self._offset = 0

    def take(self, logprobs: Logprobs) -> dict[str, list[Any]]:
        """The object for the next tokens."""
        taken: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token in logprobs:
            taken["tokens"].append(_legacy_name(token.token))
            taken["token_logprobs"].append(_finite(token.logprob))
            taken["top_logprobs"].append(
                {_legacy_name(top.token): _finite(top.logprob) for top in token.top}
            )
            taken["text_offset"].append(self._offset)
            # Characters are counted by their first bytes: 0b10xxxxxx continues one.
            self._offset += sum(byte & 0xC0 != 0x80 for byte in token.token)
        return taken


def _legacy_name(token: bytes) -> str:
    """The text of a token, or `bytes:\\xe2\\x9c` where it is none: names are keys here, and must differ."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
