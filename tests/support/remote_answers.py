"""What remote engines say: answers in pieces whose tokens nobody knows, and the failures of providers."""

from __future__ import annotations

from typing import Any

from services.runtime.errors import CaravanError
from tests.support.gateway_peers import Step, delta, finished, started


def failure(reason: str, message: str = "Not now.") -> CaravanError:
    """What a remote engine says."""
    return CaravanError(reason, message, retry_after_s=3.0, provider="openai")


def piece(text: str, **fields: Any) -> Step:
    """A part of a provider's answer: nobody knows its tokens."""
    return delta(text, **{"token_ids": [], "pieces": 1, **fields})


GOOD: tuple[Step, ...] = (started(prompt_tokens=0), piece("Hello"), finished())
