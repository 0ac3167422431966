"""Keys of a sequence that grows: fed a block at a time, never twice (W37). Pure."""

from __future__ import annotations

from collections.abc import Sequence

from services.engine.kv.keys import BLOCK_TOKENS, Namespace


class KeyChain:
    """The keys at block boundaries of one sequence, as far as its tokens were shown."""

    __slots__ = ("_hashers", "namespace")

    def __init__(self, namespace: Namespace, tokens: Sequence[int]) -> None:
        self.namespace = namespace
        self._hashers = [namespace.hasher()]
        """At 0, 256, 512, ... tokens."""
        self._feed(tokens, len(tokens))

    def block_keys(self) -> list[bytes]:
        """Keys at 256, 512, ... tokens."""
        return [hasher.key() for hasher in self._hashers[1:]]

    def key(self, tokens: Sequence[int], end: int) -> bytes:
        """Key of `tokens[:end]`; these begin with what was shown before."""
        self._feed(tokens, end)
        blocks, rest = divmod(end, BLOCK_TOKENS)
        hasher = self._hashers[blocks]
        if rest:
            hasher = hasher.copy()
            hasher.feed(tokens[end - rest : end])
        return hasher.key()

    def _feed(self, tokens: Sequence[int], end: int) -> None:
        for start in range(self._hashers[-1].length, end - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            hasher = self._hashers[-1].copy()
            hasher.feed(tokens[start : start + BLOCK_TOKENS])
            self._hashers.append(hasher)
