"""What the cache service tells, and what routing makes of it."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.published import DEPTH_MAX, GROUPS_MAX, PLACES_MAX, PublishedBlocks

RAM, DISK = 1, 3


def chain_of(names: str, blocks: PublishedBlocks, place: str = "", *engines: str) -> None:
    """Publishes a block for each letter, each the parent of the next."""
    for at, name in enumerate(names):
        parent = names[at - 1].encode() if at else b"root"
        tier = DISK if place else RAM
        blocks.published(name.encode(), parent, tier, place, engines)


def test_nearest_block_and_fastest_place_come_first() -> None:
    """The block itself, RAM before disk; then what is left of the chain before it."""
    blocks = PublishedBlocks()
    chain_of("abc", blocks, "disk", "e1", "e2")
    chain_of("ab", blocks, "", "e3")
    blocks.published(b"c", b"b", RAM, "", ["e1"])
    assert blocks.holders(b"c") == [("e1",), ("e1", "e2"), ("e3",)]
    blocks.evicted(b"c", b"b", "", ["e1"])
    assert blocks.holders(b"c") == [("e1", "e2"), ("e3",)]
    blocks.evicted(b"c", b"b", "disk", ["e1", "e2"])
    assert blocks.holders(b"c") == [("e3",), ("e1", "e2")]
    blocks.check_integrity()


def test_gone_and_unknown_are_two_things() -> None:
    """Only where all that is present was told can anything be known to be gone."""
    blocks = PublishedBlocks()
    assert blocks.holders(b"a") is None
    chain_of("ab", blocks, "", "e1")
    for name, parent in ((b"b", b"a"), (b"a", b"root")):
        blocks.evicted(name, parent, "", ["e1"])
    assert blocks.holders(b"b") is None
    blocks.complete()
    assert blocks.holders(b"b") == []
    assert blocks.holders(b"x") is None
    blocks.published(b"a", b"root", RAM, "", ["e2"])
    assert blocks.holders(b"b") == [("e2",)]
    blocks.clear()
    assert blocks.holders(b"b") is None


def test_the_last_change_tells_who_reaches_a_root() -> None:
    """An engine that comes to a root later reaches what was there before."""
    blocks = PublishedBlocks()
    chain_of("ab", blocks, "disk", "e1")
    chain_of("c", blocks, "disk", "e1", "e2")
    assert blocks.holders(b"a") == [("e1", "e2")]


def test_bounded() -> None:
    """Beyond the bound the oldest are forgotten; from then on absence proves nothing (I4)."""
    blocks = PublishedBlocks(blocks_max=3)
    chain_of("ab", blocks, "", "e1")
    blocks.complete()
    blocks.evicted(b"b", b"a", "", ["e1"])
    blocks.published(b"c", b"b", RAM, "", ["e2"])
    assert blocks.holders(b"b") == [("e1",)]
    blocks.published(b"d", b"c", RAM, "", ["e2"])
    assert len(blocks) == 3
    assert blocks.holders(b"a") is None
    assert blocks.holders(b"b") is None
    blocks.check_integrity()


@pytest.mark.parametrize("complete", [True, False])
@given(seed=st.integers(0, 2**32))
def test_random_changes_agree_with_a_plain_model(complete: bool, seed: int) -> None:
    """Copies come and go, also twice and also ones that were never told; the model is a dictionary of sets."""
    random = Random(seed)
    blocks, model = PublishedBlocks(), {name: set[str]() for name in "abcd"}
    told: set[str] = set()
    if complete:
        blocks.complete()
    for _ in range(60):
        name = random.choice("abcd")
        before = b"root" if name == "a" else bytes([ord(name) - 1])
        place = random.choice(["", "disk"])
        engine = "e1" if place else random.choice(["e1", "e2"])
        where = place or engine
        told.add(name)
        if random.random() < 0.5:
            blocks.published(name.encode(), before, DISK if place else RAM, place, [engine])
            model[name].add(where)
        else:
            blocks.evicted(name.encode(), before, place, [engine])
            model[name].discard(where)
        blocks.check_integrity()
        for end in "abcd":
            if end not in told:
                assert blocks.holders(end.encode()) is None
                continue
            # The chain is followed as far as it is known.
            reach = [end]
            while reach[-1] != "a" and chr(ord(reach[-1]) - 1) in told:
                reach.append(chr(ord(reach[-1]) - 1))
            places = {where for name in reach for where in model[name]}
            found = blocks.holders(end.encode())
            if not places:
                assert found == ([] if complete else None)
            else:
                assert found is not None
                assert {name for group in found for name in group} == {
                    "e1" if where == "disk" else where for where in places
                }


def test_a_block_that_is_everywhere() -> None:
    """The first places are remembered, the others counted: it is not gone before the last copy is."""
    blocks = PublishedBlocks()
    blocks.complete()
    engines = [f"e{number}" for number in range(PLACES_MAX + 2)]
    for engine in engines:
        chain_of("a", blocks, "", engine)
    assert blocks.holders(b"a") == [tuple(engines[:PLACES_MAX])]
    for engine in engines[:-1]:
        blocks.evicted(b"a", b"root", "", [engine])
        assert blocks.holders(b"a") != []
    assert blocks.holders(b"a") is None
    blocks.evicted(b"a", b"root", "", [engines[-1]])
    assert blocks.holders(b"a") == []
    blocks.check_integrity()


def test_a_chain_is_followed_so_far() -> None:
    """Deeper than the bound nothing is said to be gone; and no more groups are named than the bound."""
    blocks = PublishedBlocks()
    blocks.complete()
    names = [chr(0x100 + number) for number in range(DEPTH_MAX + 1)]
    for at, name in enumerate(names):
        parent = names[at - 1].encode() if at else b"root"
        blocks.published(name.encode(), parent, RAM, "", [name])
    assert blocks.holders(names[-1].encode()) == [(name,) for name in names[: -GROUPS_MAX - 1 : -1]]
    for at, name in enumerate(names):
        parent = names[at - 1].encode() if at else b"root"
        blocks.evicted(name.encode(), parent, "", [name])
    assert blocks.holders(names[-1].encode()) is None
    assert blocks.holders(names[-2].encode()) == []
