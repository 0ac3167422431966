"""Index.chain: following rows from one to the next finds exactly what asking for every key would find."""

from __future__ import annotations

from itertools import takewhile
from random import Random

import pytest

from services.cache.core import Core, Limits
from services.cache.index import Index
from services.cache.integrity import check_integrity
from services.cache.places import Place
from services.cache.rows import CopyState, Tier
from tests.support.cache_values import facts, key


def _add(index: Index, place: Place, name: str) -> None:
    told = facts(name, name[:-1] or "the empty prompt")
    index.add(told, place, CopyState.AVAILABLE, seen=1, size=1, now=0)


def _names(index: Index, keys: list[bytes]) -> list[bytes]:
    return [row.key for row in index.chain(keys)]


@pytest.mark.parametrize("seed", range(20))
def test_a_chain_is_what_asking_for_every_key_gives(seed: int) -> None:
    """Branches, gaps, blocks that go and come back, keys that do not belong together."""
    rng = Random(seed)
    core = Core(Limits())
    index, place = core.index, core.places.open_root("disk", Tier.DISK, 9999)
    names: list[str] = []
    for _ in range(400):
        name = "".join(rng.choices("ab", weights=(3, 1), k=rng.randint(1, 7)))
        copy = index.find(key(name), place)
        if copy is None:
            _add(index, place, name)
        elif rng.random() < 0.5:
            index.remove(copy)
        names.append(name)
        keys = [key(name[:at]) for at in range(1, len(name) + 1)]
        if rng.random() < 0.1:
            keys = [key(other) for other in rng.choices(names, k=5)]
        assert _names(index, keys) == list(takewhile(index.rows.__contains__, keys))
        check_integrity(core)


def test_a_block_that_was_asked_for_is_followed() -> None:
    """The one that came first, until another is asked for; not one that does not belong there."""
    index, place = Index(), Place(Tier.DISK, 9999, root_id="disk")
    for name in ("a", "ab", "ac", "x"):
        _add(index, place, name)
    rows = {name: index.rows[key(name)] for name in ("a", "ab", "ac")}
    assert rows["a"].follower is rows["ab"]
    _names(index, [key("a"), key("ac")])
    assert rows["a"].follower is rows["ac"]
    _names(index, [key("a"), key("x")])
    assert rows["a"].follower is rows["ac"]
    copy = index.find(key("ac"), place)
    assert copy is not None
    index.remove(copy)
    assert rows["a"].follower is None
