"""Tries on a loaded model what caching relies on: that a restored sequence goes on as the one it was packed from.

What the files say of an architecture is a claim, and llama.cpp has a memory of its own kind for many of them. A few tokens tell
whether state can be cut into blocks, or can be restored as a whole; where neither is so, nothing is cached, and status says why.
"""

from __future__ import annotations

import logging
from typing import Final, Protocol

import numpy as np

from services.engine.backend import Backend, Batch, CacheSupport, DecodeError, Logits, StateError

_LOG = logging.getLogger(__name__)
_TOKENS: Final = 8
_CUT: Final = 4
_TOLERANCE: Final = 0.01
"""Of the logits' spread: more than another order of the same sums makes, far less than a lost token."""
_FAILED: Final = (
    "A trial at loading found that a restored state does not go on as the one it was packed from."
)


class LimitedBackend(Backend, Protocol):
    """A backend that can be told how its state can be cached."""

    def limit_cache(self, support: CacheSupport, note: str) -> None:
        """Its state cannot be cached as it seemed; `note` says why."""
        ...


def settle_cache_support(backend: LimitedBackend) -> None:
    """Limits the caching of an idle backend to what works; leaves the backend empty."""
    for support in (CacheSupport.BLOCKS, CacheSupport.WHOLE):
        facts = backend.facts
        if facts.cache_support > support:
            continue
        if facts.cache_support is not support:
            backend.limit_cache(support, _FAILED)
        if _restores(backend):
            return
        _LOG.warning("state is not restored exactly (%s)", support.name.lower())
    note = backend.facts.cache_note
    backend.limit_cache(CacheSupport.OFF, note if _FAILED in note else f"{note} {_FAILED}")


def _restores(backend: Backend) -> bool:
    """Whether the next logits are the same behind state that was packed, joined, and shared with another sequence."""
    tokens = [token % backend.vocabulary.size for token in range(_TOKENS + 1)]
    whole = backend.facts.cache_support is CacheSupport.WHOLE
    cuts = [(0, _TOKENS)] if whole else [(0, _CUT), (_CUT, _TOKENS)]
    try:
        _decode(backend, tokens[:-1])
        states = [backend.pack(0, start, end) for start, end in cuts]
        expected = _decode(backend, tokens[-1:], _TOKENS)
        # Others take the cells meanwhile: what is not restored must not be found there.
        backend.clear(0)
        _decode(backend, tokens[::-1])
        backend.clear(0)
        for (start, end), state in zip(cuts, states, strict=True):
            backend.join(0, state, start, end, end)
        backend.share(0, 1, _TOKENS)
        found = [_decode(backend, tokens[-1:], _TOKENS, slot) for slot in (0, 1)]
    except (StateError, DecodeError) as error:
        _LOG.warning("a state cannot be restored: %s", error)
        return False
    finally:
        backend.clear(0)
        backend.clear(1)
    return bool(np.abs(np.array(found) - expected).max() <= _TOLERANCE * expected.std())


def _decode(backend: Backend, tokens: list[int], start: int = 0, slot: int = 0) -> Logits:
    count = len(tokens)
    backend.decode(Batch(tokens, list(range(start, start + count)), [slot] * count, [count - 1]))
    logits: Logits = backend.logits()[0].copy()
    return logits
