"""Blocks with tokens: the longest match and what contains what, against a scan of all."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.cache.rows import Row
from services.cache.siblings import SiblingIndex, common_tokens
from tests.support.cache_values import facts, key, tokens_of

PARENT = key("parent")
TOKENS = st.lists(st.sampled_from([0, 1, 2, 255, 256, 2**32 - 1]), min_size=1, max_size=6)


def row(name: object, tokens: list[int]) -> Row:
    """A row with tokens."""
    told = facts(name, "parent", tokens=tokens)
    return Row(told, told.parent)


def shared(left: list[int], right: list[int]) -> int:
    """The length of the common prefix, counted."""
    length = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        length += 1
    return length


@given(TOKENS, TOKENS)
def test_common_tokens_counts_whole_tokens(left: list[int], right: list[int]) -> None:
    """Bytes that happen to agree inside of a token do not count."""
    assert common_tokens(tokens_of(left), tokens_of(right)) == shared(left, right)


@given(st.lists(TOKENS, max_size=30), TOKENS, st.data())
def test_the_best_match_is_the_longest_usable(
    families: list[list[int]], tail: list[int], data: st.DataObject
) -> None:
    """The same as looking at all of them, when some cannot be used."""
    index = SiblingIndex()
    rows = [row(number, tokens) for number, tokens in enumerate(families)]
    for one in rows:
        index.add(one)
    usable = {one for one in rows if data.draw(st.booleans())}
    found = index.best(PARENT, tokens_of(tail), usable.__contains__)
    lengths = [
        shared(tokens, tail) for one, tokens in zip(rows, families, strict=True) if one in usable
    ]
    assert (found[1] if found else 0) == max(lengths, default=0)
    if found:
        assert found[0] in usable


@given(st.lists(TOKENS, max_size=30, unique_by=tuple), TOKENS)
def test_prefixes_and_extensions_are_all_found(families: list[list[int]], mine: list[int]) -> None:
    """What a block contains, and what contains it, equal a scan."""
    index = SiblingIndex()
    rows = {tuple(tokens): row(number, tokens) for number, tokens in enumerate(families)}
    own = rows.setdefault(tuple(mine), row("mine", mine))
    for one in rows.values():
        index.add(one)
    prefixes = {r for t, r in rows.items() if len(t) < len(mine) and tuple(mine[: len(t)]) == t}
    extensions = {r for t, r in rows.items() if len(t) > len(mine) and list(t[: len(mine)]) == mine}
    assert set(index.prefixes(own)) == prefixes
    assert set(index.extensions(own)) == extensions


def test_removed_rows_are_not_found() -> None:
    """Equal tokens under two keys are told apart; an empty family takes no place."""
    index = SiblingIndex()
    one, same = row("one", [1, 2]), row("same", [1, 2])
    for each in (one, same):
        index.add(each)
    index.remove(one)
    found = index.best(PARENT, tokens_of([1, 2, 3]), lambda _: True)
    assert found == (same, 2)
    index.remove(same)
    assert len(index) == 0
    assert index.best(PARENT, tokens_of([1]), lambda _: True) is None
