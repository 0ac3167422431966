"""Releases until the coordinator has surely taken them."""

from __future__ import annotations

from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.releases import UNCONFIRMED_MAX, Releases


class _World:
    """Releases by number, and how many were counted as failed."""

    def __init__(self) -> None:
        self.failed = 0
        self.releases = Releases(self._count)
        self.number = 0

    def _count(self, releases: int) -> None:
        self.failed += releases

    def add(self) -> str:
        """One more; its id."""
        self.number += 1
        self.releases.add(pb.ReleaseRequest(lease_id=f"lease-{self.number}"))
        return f"lease-{self.number}"

    def write(self) -> list[str]:
        """Ids of what is written now."""
        return [release.lease_id for release in self.releases.take()]


def test_an_answer_confirms_what_was_written_before_its_heartbeat() -> None:
    """Not what was written between a heartbeat and its answer."""
    world = _World()
    world.releases.begin()
    world.add()
    assert world.write() == ["lease-1"]
    world.releases.beat()
    world.add()
    assert world.write() == ["lease-2"]
    world.releases.confirm()
    assert len(world.releases) == 1
    world.releases.end()
    assert world.failed == 1
    world.releases.begin()
    assert world.write() == ["lease-2"]


def test_what_was_not_confirmed_is_written_again_before_what_came_later() -> None:
    """Also what comes while there is no session."""
    world = _World()
    world.add()
    assert world.failed == 1
    world.releases.begin()
    assert world.write() == ["lease-1"]
    world.add()
    world.releases.end()
    assert world.failed == 3
    world.add()
    assert world.failed == 4
    world.releases.begin()
    assert world.write() == ["lease-1", "lease-2", "lease-3"]
    world.releases.beat()
    world.releases.confirm()
    assert len(world.releases) == 0
    world.releases.end()
    assert world.failed == 4


def test_what_ended_the_session_is_not_told_again() -> None:
    """Among what was written is what the coordinator did not take; what was not written is told."""
    world = _World()
    world.releases.begin()
    world.add()
    world.write()
    world.add()
    world.releases.forget()
    world.releases.end()
    world.releases.begin()
    assert world.write() == ["lease-2"]


def test_a_coordinator_that_confirms_nothing_costs_no_memory() -> None:
    """The oldest of those that were written are kept no longer; none that was not written is lost."""
    world = _World()
    world.releases.begin()
    for _ in range(UNCONFIRMED_MAX + 10):
        world.add()
    assert len(world.write()) == UNCONFIRMED_MAX + 10
    assert len(world.releases) == UNCONFIRMED_MAX
    world.releases.end()
    world.releases.begin()
    assert world.write()[0] == "lease-11"


@given(st.lists(st.sampled_from(["add", "write", "beat", "take", "answer", "break"]), max_size=60))
def test_none_is_lost(steps: list[str]) -> None:
    """Whatever breaks when: each is with the coordinator, or waits for a session."""
    world = _World()
    world.releases.begin()
    stream: list[list[str] | None] = []
    """On its way: releases, or a heartbeat."""
    answers = 0
    taken: set[str] = set()
    added: set[str] = set()
    for step in [*steps, "break", "write", "take"]:
        if step == "add":
            added.add(world.add())
        elif step == "write":
            stream.append(world.write())
        elif step == "beat":
            world.releases.beat()
            stream.append(None)
        elif step == "take":
            answers += stream.count(None)
            taken.update(lease_id for message in stream if message for lease_id in message)
            stream.clear()
        elif step == "answer" and answers:
            answers -= 1
            world.releases.confirm()
        elif step == "break":
            stream.clear()
            answers = 0
            world.releases.end()
            world.releases.begin()
    assert taken == added
