"""Affinity by what is saved where: who stands in for a busy engine, and which prefixes bind nobody any more."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator.affinity import HOLDERS_MAX, SLACK, Affinity, Whereabouts
from services.coordinator.engines import EngineRecord
from services.coordinator.published import PublishedBlocks
from services.coordinator.routing import PowerOfTwo
from services.coordinator.waiting import Want

CAPACITY = 10
MEAN = 0.4
BOUND = 5 + SLACK
"""With this mean load and the factor of 1.25."""
RAM, DISK = 1, 3


class World:
    """Engines whose load a test sets, and a policy that hears of saved blocks."""

    def __init__(self, engines: str = "abcd", seed: int = 1) -> None:
        self.published = PublishedBlocks()
        self.published.complete()
        self.whereabouts = Whereabouts(published=self.published)
        random = Random(seed)
        self.policy = Affinity(PowerOfTwo(random.random), self.whereabouts, 1.25)
        self.engines = {name: self._engine(name) for name in engines}
        for engine in self.engines.values():
            self.policy.offer(engine)

    def _engine(self, name: str) -> EngineRecord:
        model = engine_pb.ModelInfo(name="demo", max_sequences=CAPACITY)
        return EngineRecord(
            name, 1, "h:1", model, engine_pb.EngineLoad(), CAPACITY, 0.0, is_serving=True
        )

    def choose(self, *prefixes: bytes) -> str:
        """The engine of a prompt with these prefixes."""
        want = Want("r", "g", "demo", "l", 0.0, affinity=prefixes)
        return self.policy.choose(want, MEAN).engine_id

    def load(self, **held: int) -> None:
        """Sets how many requests engines hold."""
        for name, count in held.items():
            self.engines[name].held = count

    def home(self, prefix: bytes, engine: str, key: bytes) -> None:
        """A request with the prefix was served there, and left this key."""
        self.load(**dict.fromkeys(set(self.engines) - {engine}, CAPACITY))
        while self.choose(prefix) != engine:
            self.whereabouts.prefixes.drop(prefix)
        self.policy.note_finish((prefix,), key)
        self.load(**dict.fromkeys(self.engines, 0))


@pytest.fixture
def world() -> Iterator[World]:
    """Engine `a` has served the prefix `p` and left the key `k`."""
    world = World()
    world.home(b"p", "a", b"k")
    yield world
    world.published.check_integrity()


def test_who_served_it_goes_first(world: World) -> None:
    """Its cells may still hold the state; others that reach the block are less loaded, and not taken."""
    world.published.published(b"k", b"root", DISK, "disk", ["a", "b", "c"])
    world.load(a=BOUND - 1)
    assert world.choose(b"p") == "a"


def test_ram_of_another_before_a_shared_root(world: World) -> None:
    """Where the last server is too busy."""
    world.published.published(b"k", b"root", DISK, "disk", ["a", "b", "c"])
    world.published.published(b"k", b"root", RAM, "", ["d"])
    world.load(a=BOUND, d=BOUND - 1)
    assert world.choose(b"p") == "d"


def test_the_least_loaded_of_those_that_share_a_root(world: World) -> None:
    """The bounded-load rule chooses among them, and engines out of reach are no candidates."""
    world.published.published(b"k", b"root", DISK, "disk", ["a", "b", "c"])
    world.load(a=BOUND, b=3, c=2)
    assert world.choose(b"p") == "c"
    world.load(a=BOUND, b=BOUND, c=BOUND, d=BOUND + 1)
    # All that reach it are too busy: it is anybody's, by load alone.
    assert {world.choose(b"p" + bytes([n])) for n in range(40)} <= set("abcd")


def test_what_is_left_of_the_chain(world: World) -> None:
    """The block itself is gone, but the system prompt before it is in the RAM of another engine."""
    world.published.published(b"k", b"s", RAM, "", ["a"])
    world.published.published(b"s", b"root", RAM, "", ["b"])
    world.published.evicted(b"k", b"s", "", ["a"])
    world.load(a=BOUND)
    assert world.choose(b"p") == "b"


def test_a_prefix_whose_state_is_gone_binds_nobody(world: World) -> None:
    """Nothing is known: the last server; there: the last server; evicted everywhere: the less loaded of two."""
    world.load(a=1)
    assert world.choose(b"p") == "a"
    world.published.published(b"k", b"root", RAM, "", ["a"])
    assert world.choose(b"p") == "a"
    others = World("ab")
    others.home(b"p", "a", b"k")
    others.published.published(b"k", b"root", RAM, "", ["a"])
    others.published.evicted(b"k", b"root", "", ["a"])
    others.load(a=1)
    assert others.choose(b"p") == "b"
    # From here on it is where it was computed anew, although the old key is still known to be gone.
    others.load(a=0, b=BOUND - 1)
    assert others.choose(b"p") == "b"


def test_a_shorter_prefix_is_tried_where_the_longest_is_gone(world: World) -> None:
    """The system prompt is still somewhere when the conversation is not."""
    world.home(b"s", "b", b"sys")
    world.published.published(b"k", b"root", RAM, "", ["a"])
    world.published.evicted(b"k", b"root", "", ["a"])
    world.load(b=1)
    assert world.choose(b"s", b"p") == "b"


def test_an_engine_that_died_is_replaced_by_one_that_reaches_its_files(world: World) -> None:
    """Its RAM is gone with it; the folder is not."""
    world.published.published(b"k", b"root", DISK, "disk", ["a", "c"])
    world.policy.withdraw(world.engines["a"])
    world.load(c=2)
    assert world.choose(b"p") == "c"


def test_without_the_cache_service_all_is_as_before(world: World) -> None:
    """The watch broke: the last server is taken within the bound, and by load beyond it (I7)."""
    world.published.published(b"k", b"root", RAM, "", ["b"])
    world.published.evicted(b"k", b"root", "", ["b"])
    world.published.clear()
    world.load(a=BOUND - 1)
    assert world.choose(b"p") == "a"


def test_a_choice_is_bounded() -> None:
    """However many engines share a root, a few are compared, and all of them get their turn."""
    names = [chr(0x100 + n) for n in range(10 * HOLDERS_MAX)]
    world = World("".join(names))
    world.home(b"p", names[0], b"k")
    world.published.published(b"k", b"root", DISK, "disk", names)
    world.load(**{names[0]: BOUND})
    seen = 0

    def counting(engine_id: str) -> EngineRecord | None:
        nonlocal seen
        seen += 1
        return found(engine_id)

    others = world.policy._others
    found, others.find = others.find, counting  # type: ignore[method-assign]
    chosen = set()
    for _ in range(50):
        world.whereabouts.prefixes.get(b"p").engine_id = names[0]  # type: ignore[union-attr]
        chosen.add(world.choose(b"p"))
    assert seen <= 50 * (1 + HOLDERS_MAX)
    assert len(chosen) > HOLDERS_MAX
