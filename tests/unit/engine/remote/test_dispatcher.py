"""Requests and workers: who is served, and that everybody gets one end and gives back what was held."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from caravan.core.v1 import generation_pb2, scheduling_pb2

from services.engine.remote.dispatcher import Dispatcher, Job
from services.engine.remote.request import Phase, Request, Work
from services.engine.remote.request_queue import RequestQueue
from services.engine.remote.wire import WireRequest
from services.engine.remote.workers import WorkerPool
from services.runtime.clock import ManualClock
from services.runtime.errors import CaravanError
from services.runtime.telemetry import NoTracing


@dataclass
class Scripted:
    """Attempts that end as they are told: a number waits so long for another one, an error is a defect."""

    request: Request
    results: list[float | Exception | None]
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    made: int = 0

    async def attempt(self) -> float | None:
        """Waits for the gate, then does the next thing."""
        self.made += 1
        await self.gate.wait()
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        if result is None:
            self.request.end(generation_pb2.FINISH_REASON_STOP, 0)
        return result


@dataclass
class World:
    """A dispatcher, and what it told."""

    clock: ManualClock = field(default_factory=ManualClock)
    cancelled: list[Request] = field(default_factory=list)
    crashes: list[None] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.dispatcher = self.make(2, queues=True)

    def make(self, workers: int, *, queues: bool) -> Dispatcher:
        """A dispatcher whose queue holds ten."""
        return Dispatcher(
            RequestQueue[Job](10, "m"),
            WorkerPool(workers),
            self.clock,
            queues=queues,
            full=lambda: CaravanError("CAPACITY_EXHAUSTED", "full"),
            on_cancelled=self._end,
            on_crash=lambda: self.crashes.append(None),
            on_change=lambda: None,
        )

    def _end(self, request: Request) -> None:
        self.cancelled.append(request)
        request.end(generation_pb2.FINISH_REASON_CANCELLED, 0)

    def submit(self, *results: float | Exception | None, deadline: float = math.inf) -> Scripted:
        """A new request."""
        self.count += 1
        request = Request(f"r{self.count}", self.clock.monotonic())
        attempts = Scripted(request, list(results) or [None])
        span = NoTracing().start("", None)
        work = Work(WireRequest("", b""), "", scheduling_pb2.PRIORITY_NORMAL, deadline, 1, 1, span)
        self.dispatcher.submit(Job(request, work, attempts))
        return attempts


@pytest.fixture
async def world() -> World:
    """Two workers."""
    return World()


async def settle() -> None:
    """Lets tasks and their callbacks run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_workers_are_freed_by_those_who_have_finished(world: World) -> None:
    """A long call on one worker does not hold up what the other one takes (W15)."""
    long, short, third = world.submit(), world.submit(), world.submit()
    await settle()
    assert (long.made, short.made, third.made) == (1, 1, 0)
    short.gate.set()
    await settle()
    assert third.made == 1
    third.gate.set()
    long.gate.set()
    await settle()
    assert world.dispatcher.pool.busy == 0
    assert all(one.request.outbox.ended for one in (long, short, third))


async def test_a_crash_ends_its_request_alone(world: World) -> None:
    """INTERNAL for this one; the worker is replaced and serves the next (W16)."""
    bad, other, next_one = world.submit(RuntimeError("x")), world.submit(), world.submit()
    await settle()
    bad.gate.set()
    await settle()
    update = await bad.request.outbox.take()
    assert update.error is not None
    assert update.error.reason == "INTERNAL"
    assert next_one.made == 1
    assert world.dispatcher.pool.replaced == len(world.crashes) == 1
    for one in (other, next_one):
        one.gate.set()
    await settle()
    assert world.dispatcher.pool.busy == 0


async def test_a_cancel_before_the_first_step_frees_the_worker(world: World) -> None:
    """A task that never ran is noticed too."""
    one = world.submit()
    world.dispatcher.cancel(one.request)
    await settle()
    assert one.made == 0
    assert world.cancelled == [one.request]
    assert world.dispatcher.pool.busy == 0


async def test_expired_requests_are_told(world: World) -> None:
    """The deadline of those who wait is looked at without anybody asking for them."""
    first, second = world.submit(), world.submit()
    late = world.submit(deadline=world.clock.monotonic() + 5)
    world.clock.advance(6)
    world.dispatcher.dispatch()
    update = await late.request.outbox.take()
    assert update.error is not None
    assert update.error.reason == "DEADLINE_EXCEEDED"
    assert world.dispatcher.waiting == 0
    for one in (first, second):
        one.gate.set()
    await settle()
    assert late.made == 0


async def test_without_a_queue_the_busy_refuse(world: World) -> None:
    """And whoever is refused leaves nothing behind."""
    world.dispatcher = world.make(1, queues=False)
    first = world.submit()
    with pytest.raises(CaravanError):
        world.submit()
    first.gate.set()
    await settle()
    world.submit().gate.set()
    await settle()
    assert world.dispatcher.pool.busy == 0


async def test_another_attempt_keeps_the_place_of_its_request(world: World) -> None:
    """Who comes back is served before those who came after it."""
    world.dispatcher = world.make(1, queues=True)
    first = world.submit(0.0, None)
    first.gate.set()
    world.clock.advance(1)
    second, third = world.submit(), world.submit()
    await settle()
    assert first.request.phase is Phase.QUEUED or first.made == 2
    second.gate.set()
    third.gate.set()
    async with asyncio.timeout(5):
        while not third.request.outbox.ended:
            assert not third.made or first.made == 2
            await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_happens_all_end_once(seed: int) -> None:
    """Random arrivals, ends, crashes, retries, cancels and deadlines: one end each, nothing held at the end (I1, I6)."""
    rng = random.Random(seed)
    world = World()
    world.dispatcher = world.make(rng.randint(1, 3), queues=True)
    alive: list[Scripted] = []
    everybody: list[Scripted] = []
    for _ in range(200):
        match rng.randrange(5):
            case 0 | 1:
                last: Exception | None = RuntimeError("x") if rng.random() < 0.1 else None
                results = [0.0] * rng.randrange(3) + [last]
                deadline = world.clock.monotonic() + rng.choice([1, 50, math.inf])
                try:
                    alive.append(world.submit(*results, deadline=deadline))
                except CaravanError:
                    continue
                everybody.append(alive[-1])
            case 2 if alive:
                alive.pop(rng.randrange(len(alive))).gate.set()
            case 3 if alive:
                world.dispatcher.cancel(rng.choice(alive).request)
            case 4:
                world.clock.advance(rng.random() * 3)
                world.dispatcher.dispatch()
        await asyncio.sleep(0)
    for one in everybody:
        one.gate.set()
    async with asyncio.timeout(10):
        while not all(one.request.outbox.ended for one in everybody):
            world.clock.advance(30)  # Workers that rest after crashes come back.
            world.dispatcher.dispatch()
            await asyncio.sleep(0)
    await settle()
    pool = world.dispatcher.pool
    assert pool.busy == world.dispatcher.waiting == 0
    assert max(Counter(id(request) for request in world.cancelled).values(), default=1) == 1
    assert not world.dispatcher._jobs
