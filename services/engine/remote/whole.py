"""Answers that nobody reads before their end: asked for in one piece where they are short, and else told in few pieces. Pure."""

from __future__ import annotations

from typing import Final

from caravan.engine.v1 import engine_service_pb2 as pb

from services.engine.news import WHOLE_GATHER_S

PLAIN_TOKENS_MAX: Final = 512
"""A longer answer is streamed in any case: only so a caller who leaves stops it, and a provider that hangs is noticed in time."""
_TOKEN_S: Final = 0.1
"""What a slow provider needs for a token. Nothing comes before the whole answer has, and it must begin within the time for that."""


def asks_plain(generate: pb.GenerateRequest, first_byte_s: float | None) -> bool:
    """Whether the provider is asked for an answer in one piece; `first_byte_s` is how long it may take to begin, None for ever."""
    tokens = generate.stop.max_tokens
    in_time = first_byte_s is None or tokens * _TOKEN_S <= first_byte_s
    return generate.whole and 0 < tokens <= PLAIN_TOKENS_MAX and in_time


def gather_s(generate: pb.GenerateRequest, told_s: float) -> float:
    """The least time between two deltas of an answer, in seconds; `told_s` is the deployment's."""
    return max(told_s, WHOLE_GATHER_S) if generate.whole else told_s
