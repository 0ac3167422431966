"""Blocks with tokens that follow the same parent: which one matches a prompt furthest, which ones another contains.

Pure. The blocks of one parent are kept in the order of their tokens, as big-endian bytes. The longest common prefix with
anything is then at a neighbour of its place in the order, and a prefix of a block comes before it, so nothing is scanned.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Final

from services.cache.rows import Row

TOKEN_BYTES: Final = 4
_NEIGHBOURS_MAX: Final = 32
"""Blocks that are tried on each side before the search for a usable one ends."""


def common_tokens(left: bytes, right: bytes) -> int:
    """Tokens that both begin with."""
    low, high = 0, min(len(left), len(right)) // TOKEN_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if left[: middle * TOKEN_BYTES] == right[: middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low


def _tokens(row: Row) -> bytes:
    return row.tokens


class SiblingIndex:
    """Rows with tokens, by parent."""

    def __init__(self) -> None:
        self._families: dict[bytes, list[Row]] = {}

    def add(self, row: Row) -> None:
        """Adds a row with tokens, once."""
        family = self._families.setdefault(row.parent, [])
        family.insert(bisect_left(family, row.tokens, key=_tokens), row)

    def remove(self, row: Row) -> None:
        """Removes a row that was added."""
        family = self._families[row.parent]
        at = bisect_left(family, row.tokens, key=_tokens)
        while (
            family[at] is not row
        ):  # Equal tokens with different keys: told wrongly, but harmless.
            at += 1
        del family[at]
        if not family:
            del self._families[row.parent]

    def has(self, parent: bytes) -> bool:
        """Whether there are rows with tokens after a parent."""
        return parent in self._families

    def best(
        self, parent: bytes, tail: bytes, usable: Callable[[Row], bool]
    ) -> tuple[Row, int] | None:
        """The usable row with the longest common prefix with `tail`, and its tokens; None if none has any."""
        family = self._families.get(parent)
        if family is None or not tail:
            return None
        middle = bisect_left(family, tail, key=_tokens)
        found: tuple[Row, int] | None = None
        for side in (
            range(middle - 1, max(middle - 1 - _NEIGHBOURS_MAX, -1), -1),
            range(middle, min(middle + _NEIGHBOURS_MAX, len(family))),
        ):
            for at in side:
                length = common_tokens(family[at].tokens, tail)
                if length <= (found[1] if found else 0):
                    break  # Further away it is never longer.
                if usable(family[at]):
                    found = family[at], length
                    break
        return found

    def prefixes(self, row: Row) -> Iterator[Row]:
        """Rows of the same parent whose tokens are a proper prefix of the row's, longest first."""
        family = self._families.get(row.parent, [])
        at = bisect_left(family, row.tokens, key=_tokens)
        while at > 0:
            before = family[at - 1]
            length = common_tokens(before.tokens, row.tokens) * TOKEN_BYTES
            if length == len(before.tokens):
                yield before
                at -= 1
            else:
                # Every other prefix is within what these two share, so it stands before or at that.
                shared = row.tokens[:length]
                at = bisect_left(family, shared, key=_tokens)
                while at < len(family) and family[at].tokens == shared:
                    at += 1

    def extensions(self, row: Row) -> Iterator[Row]:
        """Rows of the same parent of whose tokens the row's are a proper prefix."""
        family = self._families.get(row.parent, [])
        for at in range(bisect_left(family, row.tokens, key=_tokens), len(family)):
            if not family[at].tokens.startswith(row.tokens):
                return
            if len(family[at].tokens) > len(row.tokens):
                yield family[at]

    def __len__(self) -> int:
        return sum(len(family) for family in self._families.values())
