"""Keys of a sequence that grows: fed a block at a time, never twice (W37). Pure."""

from __future__ import annotations

from collections.abc import Sequence

from services.engine.kv.keys import BLOCK_TOKENS, Namespace


class KeyChain:
    """The keys at block boundaries of one sequence, as far as its tokens were shown."""

    __slots__ = ("_hasher", "_keys", "namespace")

    def __init__(self, namespace: Namespace, tokens: Sequence[int]) -> None:
        self.namespace = namespace
        self._hasher = namespace.hasher()
        self._keys = [self._hasher.key()]
        self._feed(tokens, len(tokens))

    def block_keys(self) -> list[bytes]:
        """Keys at 256, 512, ... tokens."""
        return self._keys[1:]

    def key(self, tokens: Sequence[int], end: int) -> bytes:
        """Key of `tokens[:end]`; these begin with what was shown before, and `end` is not far before the last boundary."""
        self._feed(tokens, end)
        blocks, rest = divmod(end, BLOCK_TOKENS)
        if not rest:
            return self._keys[blocks]
        if blocks + 1 != len(self._keys):
            raise ValueError("only the key of the last, unfinished block can be made")
        hasher = self._hasher.copy()
        hasher.feed(tokens[end - rest : end])
        return hasher.key()

    def _feed(self, tokens: Sequence[int], end: int) -> None:
        for start in range(self._hasher.length, end - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            self._hasher.feed(tokens[start : start + BLOCK_TOKENS])
            self._keys.append(self._hasher.key())
