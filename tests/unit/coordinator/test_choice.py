"""Which engine a request gets that avoids some, and who of those that lost their engine is next."""

from __future__ import annotations

from random import Random

import pytest
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator.ahead import AheadLine
from services.coordinator.choice import EngineChoice
from services.coordinator.engines import EngineRecord, EngineRegistry
from services.coordinator.policies import NAMES, policy_factory
from services.coordinator.waiting import Want

LOAD = engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_IDLE)
MODEL = engine_pb.ModelInfo(name="demo", max_sequences=8)


def engines(count: int) -> list[EngineRecord]:
    """Idle engines, whose lives are `life-N`."""
    registry = EngineRegistry(8)
    return [
        registry.add(
            f"engine-{n}", n, "h:1", MODEL, LOAD, incarnation=f"life-{n}", revision="", now=0.0
        )
        for n in range(count)
    ]


def want(*avoid: int) -> Want:
    """A request of a conversation that avoids those lives."""
    lives = frozenset(f"life-{n}" for n in avoid)
    return Want("r", "g", "demo", "l", 0.0, session_id="s", affinity=(b"p",), avoid=lives)


@pytest.mark.parametrize("policy", NAMES)
def test_no_policy_ever_chooses_what_is_avoided(policy: str) -> None:
    """Whatever is avoided, suspect or without room: the choice is among the others, the trusted ones first."""
    random = Random(5)
    choice = EngineChoice(policy_factory(policy, random.random, 1.25))
    known = engines(6)
    room: set[int] = set()
    for _ in range(2000):
        number = random.randrange(6)
        engine = known[number]
        engine.is_suspect = random.random() < 0.3
        if random.random() < 0.7:
            choice.offer(engine)
            room.add(number)
        else:
            choice.withdraw(engine)
            room.discard(number)
        choice.check_integrity([known[n] for n in room])
        avoid = set(random.sample(range(6), random.randrange(4)))
        allowed = room - avoid
        assert choice.has_room_for(want(*avoid).avoid) == bool(allowed)
        if allowed:
            chosen = choice.choose(want(*avoid), 0.5)
            trusted = {n for n in allowed if not known[n].is_suspect}
            assert chosen.session in (trusted or allowed)
            choice.check_integrity([known[n] for n in room])


def test_a_conversation_comes_back_to_the_engine_that_it_did_not_avoid() -> None:
    """An avoided engine is back in its policy after the choice, and keeps what is known of it."""
    choice = EngineChoice(policy_factory("affinity", Random(1).random, 1.25))
    one, two = engines(2)
    choice.offer(one)
    choice.offer(two)
    assert choice.choose(want(0), 0.1) is two
    assert choice.choose(want(), 0.1) is two
    assert choice.choose(want(1), 0.1) is one


def test_who_came_first_is_next_among_those_with_room() -> None:
    """A line that must wait does not hold up the others; a line that is empty is forgotten."""
    line = AheadLine()
    a, b = frozenset({"a"}), frozenset({"b"})
    for key, avoid in (("1", a), ("2", b), ("3", a), ("4", frozenset[str]())):
        line.add(key, avoid)
    everybody = lambda _: True  # noqa: E731
    assert line.first(everybody) == "1"
    assert line.first(lambda avoid: avoid != a) == "2"
    line.discard("1")
    assert line.first(lambda avoid: avoid == a) == "3"
    for key in ("2", "3", "never there"):
        line.discard(key)
    assert line.first(bool) is None
    assert (line.first(everybody), len(line), len(line._lines)) == ("4", 1, 1)


def test_who_avoids_one_more_keeps_its_place() -> None:
    """A request that may not go to an engine which joins later stays before those that came after it."""
    line = AheadLine()
    for key, avoid in (("first", "a"), ("second", "ab"), ("third", "ab"), ("last", "a")):
        line.add(key, frozenset(avoid))
    for key in ("first", "last"):
        line.change(key, frozenset("ab"))
    order = []
    while (found := line.first(lambda avoid: avoid == {"a", "b"})) is not None:
        order.append(found)
        line.discard(found)
    assert order == ["first", "second", "third", "last"]
    assert len(line) == 0
