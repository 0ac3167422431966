"""Blocks for tests of the KV cache: chains of a prompt, with states that say what they are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from services.engine.kv.keys import BLOCK_TOKENS, Namespace, prefix_keys
from services.engine.kv.store import SavedBlock, SaveReason

NAMESPACE = Namespace(b"\xaa" * 32, 1, b"\xbb" * 32)


def prompt_of(seed: int, length: int) -> list[int]:
    """A prompt; different seeds differ from the first token on."""
    return [(seed * 7_919 + position * 31 + 1) % 150_000 for position in range(length)]


def state_of(key: bytes, size: int) -> memoryview:
    """The state of a block: no other block has these bytes."""
    pattern = hashlib.sha512(key).digest()
    return memoryview((pattern * (size // len(pattern) + 1))[:size])


def chain_of(
    tokens: Sequence[int],
    *,
    namespace: Namespace = NAMESPACE,
    state_bytes: int = 2_000,
    prompt_end: int = 0,
    reason: SaveReason = SaveReason.COLD,
) -> list[SavedBlock]:
    """The blocks of a sequence: full ones, then its tail. The one in which `prompt_end` lies may be used in part too."""
    hasher = namespace.hasher()
    parent = hasher.key()
    blocks = []
    for start in range(0, len(tokens), BLOCK_TOKENS):
        own = tuple(tokens[start : start + BLOCK_TOKENS])
        hasher.feed(own)
        key = hasher.key()
        end = start + len(own)
        blocks.append(
            SavedBlock(
                key=key,
                parent=parent,
                start=start,
                end=end,
                tokens=own,
                partial=len(own) < BLOCK_TOKENS or start < prompt_end <= end,
                reason=reason,
                state=state_of(key, state_bytes),
            )
        )
        parent = key
    return blocks


def whole_of(
    tokens: Sequence[int],
    end: int,
    *,
    namespace: Namespace = NAMESPACE,
    state_bytes: int = 2_000,
    reason: SaveReason = SaveReason.FINISH,
) -> SavedBlock:
    """The state of the first `end` tokens, of a model whose state cannot be cut."""
    (key,) = prefix_keys(namespace, tokens, [end])
    return SavedBlock(
        key=key,
        parent=namespace.root_key(),
        start=0,
        end=end,
        tokens=tuple(tokens[max(0, end - BLOCK_TOKENS) : end]),
        partial=False,
        reason=reason,
        state=state_of(key, state_bytes),
        whole=True,
    )
