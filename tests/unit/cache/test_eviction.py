"""Which copies go first: use, age, cost and leaves (W32), against a plain sort."""

from __future__ import annotations

import random

import pytest

from services.cache.eviction import (
    ATTENTION_TOKENS,
    FREQUENCY_MAX,
    HALF_LIFE_S,
    EvictionOrder,
    touch,
    worth,
)
from services.cache.index import Index
from services.cache.places import Place
from services.cache.rows import Copy, CopyState, Tier
from tests.support.cache_values import facts


def place_with(*names: object, now: float = 0.0) -> tuple[Index, Place, dict[object, Copy]]:
    """A root with blocks that have nothing to do with each other."""
    index, place = Index(), Place(Tier.DISK, 1000, root_id="disk")
    copies = {
        name: index.add(facts(name), place, CopyState.AVAILABLE, seen=1, size=1, now=now)
        for name in names
    }
    return index, place, copies


def drop_next(index: Index, place: Place) -> Copy | None:
    """Drops what goes next."""
    copy = place.order.take()
    if copy is not None:
        place.order.dropped(copy)
        index.start_eviction(copy)
        index.remove(copy)
    return copy


def test_what_was_used_goes_later() -> None:
    """One use is worth more than none, two more than one."""
    index, place, copies = place_with("a", "b", "c")
    touch([copies["a"], copies["a"], copies["b"]], 1.0)
    assert [drop_next(index, place) for _ in range(4)] == [
        copies["c"],
        copies["b"],
        copies["a"],
        None,
    ]


def test_using_a_block_never_makes_it_go_earlier() -> None:
    """Also when it was popular before and idle for long (W32: upstream demotes what it uses)."""
    _, place, copies = place_with("a", "b")
    touch([copies["a"]] * 50, 1.0)
    before = copies["a"].priority
    touch([copies["a"]], 1.0 + 20 * HALF_LIFE_S)
    assert copies["a"].priority >= before
    assert place.order.first() is copies["b"]


def test_old_popularity_fades() -> None:
    """After some half-lives a block that was popular once has no more than one that is used now."""
    _, _, copies = place_with("once", "now")
    touch([copies["once"]] * 1000, 0.0)
    assert copies["once"].frequency <= FREQUENCY_MAX
    later = 10 * HALF_LIFE_S
    touch([copies["once"], copies["now"]], later)
    touch([copies["now"]], later)
    assert copies["once"].frequency < copies["now"].frequency


def test_the_clock_lets_unused_blocks_sink() -> None:
    """What is dropped raises the clock, so new blocks overtake old ones that nobody uses any more."""
    index, place, copies = place_with("old")
    touch([copies["old"]] * 3, 0.0)
    for number in range(20):
        index.add(facts(number), place, CopyState.AVAILABLE, seen=1, size=1, now=1.0)
        if drop_next(index, place) is copies["old"]:
            break
    else:
        raise AssertionError("it stayed for ever")
    assert number > 0, "three uses counted for nothing"


def test_later_blocks_cost_more() -> None:
    """A token far from the start costs more to compute, so its block is worth more bytes."""
    assert worth(0) == 1.0
    assert worth(ATTENTION_TOKENS) == 2.0
    index, place = Index(), Place(Tier.DISK, 10, root_id="disk")
    far, near = (
        index.add(facts(end, end=end), place, CopyState.AVAILABLE, seen=1, size=1, now=0)
        for end in (32_768, 256)
    )
    assert place.order.first() is near
    assert far.priority > near.priority


def test_earlier_uses_count_after_a_restart() -> None:
    """The hits of the file are its first frequency, up to the same limit."""
    index, place = Index(), Place(Tier.DISK, 10, root_id="disk")
    copies = [
        index.add(facts(hits, hits=hits), place, CopyState.AVAILABLE, seen=1, size=1, now=0)
        for hits in (7, 0, 10**6)
    ]
    assert [copy.frequency for copy in copies] == [8.0, 1.0, FREQUENCY_MAX]
    assert place.order.first() is copies[1]


def test_only_leaves_go_and_parents_follow() -> None:
    """A chain goes from its end, whatever its priorities say; a chain with a pinned end stays."""
    index, place = Index(), Place(Tier.DISK, 10, root_id="disk")
    chain = [
        index.add(
            facts(at, at - 1 if at else "?", end=256 * (at + 1)),
            place,
            CopyState.AVAILABLE,
            seen=1,
            size=1,
            now=0,
        )
        for at in (2, 0, 1)  # In any order, as an inventory tells.
    ]
    third, first, second = chain
    touch([third] * 5, 1.0)
    index.pin([third])
    assert place.order.take() is None
    index.unpin([third])
    assert [drop_next(index, place) for _ in range(3)] == [third, second, first]


@pytest.mark.parametrize("seed", range(5))
def test_the_lazy_heap_agrees_with_a_sort(seed: int) -> None:
    """After any mixture of arrivals, uses, pins and removals, the next to go has the lowest priority of those that may."""
    rng = random.Random(seed)
    index, place, _ = place_with()
    pinned: list[Copy] = []
    for step in range(600):
        copies = list(place.copies)
        what = rng.random()
        if what < 0.4 or not copies:
            parent = rng.choice(copies).row.key if copies and rng.random() < 0.5 else "none"
            index.add(
                facts(step, parent, end=rng.randrange(1, 9) * 256),
                place,
                CopyState.AVAILABLE,
                seen=1,
                size=1,
                now=step,
            )
        elif what < 0.6:
            touch(rng.choices(copies, k=3), step)
        elif what < 0.7:
            pinned.append(rng.choice(copies))
            index.pin(pinned[-1:])
        elif what < 0.8 and pinned:
            index.unpin([pinned.pop()])
        elif what < 0.9:
            index.remove(rng.choice(copies))
        expected = min((c.priority for c in place.copies if c.may_go), default=None)
        following = place.order.first()
        assert (following.priority if following else None) == expected
        if what >= 0.9:
            drop_next(index, place)
        assert len(place.order) <= 2 * len(place.copies) + 64


def test_skipped_entries_do_not_pile_up() -> None:
    """RAM comes and goes without evictions; the order stays as small as what is there."""
    index, place, _ = place_with()
    for number in range(5000):
        copy = index.add(facts(number), place, CopyState.AVAILABLE, seen=1, size=1, now=0)
        index.remove(copy)
    assert len(place.order) < 200


def test_an_empty_order_has_nothing_to_give() -> None:
    """Nothing goes from nothing."""
    order = EvictionOrder()
    assert order.first() is None
    assert order.take() is None
