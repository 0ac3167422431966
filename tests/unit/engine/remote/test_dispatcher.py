"""Requests and workers brought together: one ending for each request, and no worker lost, in any order of events."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter

import pytest
from caravan.core.v1 import generation_pb2, scheduling_pb2

from services.engine.remote.dispatcher import Dispatcher, Job
from services.engine.remote.request import Request, Work
from services.engine.remote.request_queue import RequestQueue
from services.engine.remote.wire import WireRequest
from services.engine.remote.workers import WorkerPool
from services.runtime.clock import ManualClock
from services.runtime.errors import CaravanError
from services.runtime.telemetry import NoTracing

WORKERS = 3
SCHEDULES = 60


class Attempts:
    """Calls that end as the test says: by a result, an error, or a cancel that comes from nowhere."""

    def __init__(self, desk: Desk, request: Request) -> None:
        self._desk = desk
        self._request = request
        self.result = self._new_result()
        self.closing: asyncio.Future[None] | None = None
        """What the end of a call has to wait for."""
        self.closed = 0

    def _new_result(self) -> asyncio.Future[float | Exception | None]:
        return asyncio.get_running_loop().create_future()

    async def attempt(self) -> float | None:
        self._desk.called.append(self._request.request_id)
        self.result = self._new_result()
        try:
            result = await self.result
        finally:
            if self.closing is not None:
                await self.closing
            self.closed += 1
        if isinstance(result, Exception):
            raise result
        if result is None:
            self._request.end(generation_pb2.FINISH_REASON_STOP, 0.0)
        return result

    @property
    def is_waiting(self) -> bool:
        return self._request.task is not None and not self.result.done()


class Desk:
    """A dispatcher, and what it was given."""

    def __init__(self, *, workers: int = WORKERS, queued_max: int = 100) -> None:
        self.clock = ManualClock()
        self.called: list[str] = []
        self.cancelled: Counter[str] = Counter()
        self.jobs: list[tuple[Job, Attempts]] = []
        self.pool = WorkerPool(workers)
        self.crashes = 0
        self.dispatcher = Dispatcher(
            RequestQueue[Job](queued_max, "chat"),
            self.pool,
            self.clock,
            queues=True,
            full=lambda: CaravanError("CAPACITY_EXHAUSTED", "full"),
            on_cancelled=self._was_cancelled,
            on_crash=self._has_crashed,
        )

    def _was_cancelled(self, request: Request) -> None:
        self.cancelled[request.request_id] += 1
        request.end(generation_pb2.FINISH_REASON_CANCELLED, 0.0)

    def _has_crashed(self) -> None:
        self.crashes += 1

    def submit(self, name: str, deadline: float = math.inf) -> tuple[Request, Attempts]:
        request = Request(name, self.clock.monotonic())
        work = Work(
            call=WireRequest("chat", b""),
            tenant="",
            priority=scheduling_pb2.PRIORITY_NORMAL,
            deadline=deadline,
            prompt_tokens=0,
            tokens=0,
            gather_s=0.0,
            span=NoTracing().start("test", None),
        )
        attempts = Attempts(self, request)
        job = Job(request, work, attempts)
        self.dispatcher.submit(job)
        self.jobs.append((job, attempts))
        return request, attempts

    async def settle(self) -> None:
        """Lets everything happen that can."""
        for _ in range(5):
            await asyncio.sleep(0)


async def ending(request: Request) -> str:
    """How a request ended; it must have."""
    assert request.outbox.ended
    update = await request.outbox.take()
    if update.error is not None:
        return update.error.reason
    assert update.ending is not None
    return generation_pb2.FinishReason.Name(update.ending.reason).removeprefix("FINISH_REASON_")


async def test_a_worker_that_crashes_ends_its_request_and_is_replaced() -> None:
    """By an error of the code (W16), or by a cancel that nobody of ours has sent: neither may leave a caller without an end."""
    desk = Desk(workers=1)
    first, attempts = desk.submit("defect")
    second, others = desk.submit("stray cancel")
    third, last = desk.submit("well")
    await desk.settle()
    attempts.result.set_result(RuntimeError("a defect"))
    await desk.settle()
    others.result.cancel()
    await desk.settle()
    last.result.set_result(None)
    await desk.settle()
    assert [await ending(r) for r in (first, second, third)] == ["INTERNAL", "INTERNAL", "STOP"]
    assert (desk.pool.replaced, desk.crashes, desk.pool.busy) == (2, 2, 0)


async def test_a_request_between_two_attempts_holds_no_worker_and_keeps_its_place() -> None:
    """Others are served meanwhile; back again, it goes before those that came later."""
    desk = Desk(workers=1)
    _, attempts = desk.submit("first")
    await desk.settle()
    for name in ("second", "third"):
        desk.clock.advance(1.0)
        desk.submit(name)
    attempts.result.set_result(0.0)
    await desk.settle()
    await asyncio.sleep(0.001)
    assert desk.called == ["first", "second"]
    desk.jobs[1][1].result.set_result(None)
    await desk.settle()
    assert desk.called == ["first", "second", "first"]
    await desk.dispatcher.stop()


@pytest.mark.parametrize("where", ["before its first step", "called", "queued", "between attempts"])
async def test_a_cancel_reaches_a_request_wherever_it_is(where: str) -> None:
    """It ends once, and what it held is free."""
    desk = Desk(workers=1)
    if where == "queued":
        desk.submit("other")
    request, attempts = desk.submit("cancelled")
    if where != "before its first step":
        await desk.settle()
    if where == "between attempts":
        attempts.result.set_result(100.0)
        await desk.settle()
        assert request.timer is not None
    desk.dispatcher.cancel(request)
    desk.dispatcher.cancel(request)
    await desk.settle()
    assert desk.cancelled == {"cancelled": 1}
    assert await ending(request) == "CANCELLED"
    assert desk.dispatcher.waiting == 0
    assert desk.pool.busy == (where == "queued")
    await desk.dispatcher.stop()


async def test_a_second_cancel_does_not_break_off_what_the_first_one_closes() -> None:
    """By CancelRequest, then by the end of the caller's call: the provider's connection is closed in between."""
    desk = Desk(workers=1)
    request, attempts = desk.submit("cancelled")
    attempts.closing = asyncio.get_running_loop().create_future()
    await desk.settle()
    for _ in range(2):
        desk.dispatcher.cancel(request)
        await desk.settle()
    assert desk.pool.busy == 1
    attempts.closing.set_result(None)
    await desk.settle()
    assert attempts.closed == 1
    assert desk.cancelled == {"cancelled": 1}
    assert desk.pool.busy == 0


async def test_the_start_of_another_attempt_is_told() -> None:
    """The coordinator sees an engine at work, not one that idles since the attempt before."""
    desk = Desk(workers=1)
    _, attempts = desk.submit("again")
    await desk.settle()
    attempts.result.set_result(0.0)
    await desk.settle()
    await asyncio.sleep(0.001)
    assert desk.pool.busy == 1
    await desk.dispatcher.stop()


async def test_a_deadline_that_passes_in_the_queue_ends_a_request() -> None:
    """Without a call (W17)."""
    desk = Desk(workers=1)
    desk.submit("other")
    request, _ = desk.submit("late", deadline=desk.clock.now + 5)
    desk.clock.advance(5)
    desk.dispatcher.dispatch()
    assert await ending(request) == "DEADLINE_EXCEEDED"
    await desk.settle()
    assert desk.called == ["other"]
    await desk.dispatcher.stop()


class Schedule:
    """Requests that come, are cancelled, fail, are tried again and crash, as a seed says."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.desk = Desk(queued_max=8)
        self.refused = 0

    async def run(self) -> None:
        """Ends with nothing left, and with one ending for each request."""
        desk = self.desk
        for number in range(80):
            self.step(number)
            if self.random.random() < 0.7:
                await asyncio.sleep(0)
            # Crashes may have sent all workers to rest.
            desk.clock.advance(self.random.choice((0.0, 0.1, 30.0)))
            desk.dispatcher.dispatch()
            assert desk.pool.busy <= WORKERS
            assert desk.pool.busy == sum(job.request.task is not None for job, _ in desk.jobs)
        if self.random.random() < 0.5:
            await self.finish_all()
        await desk.dispatcher.stop()
        await desk.settle()
        assert desk.pool.busy == desk.dispatcher.waiting == 0
        assert not desk.dispatcher._jobs
        for job, _ in desk.jobs:
            assert await ending(job.request)
            assert desk.cancelled[job.request.request_id] <= 1

    def step(self, number: int) -> None:
        """One thing that happens."""
        desk, running = self.desk, [a for _, a in self.desk.jobs if a.is_waiting]
        what = self.random.choice(("submit", "submit", "end", "again", "crash", "cancel"))
        if what == "submit":
            try:
                desk.submit(f"r{number}", desk.clock.now + self.random.choice((5.0, 1e9)))
            except CaravanError:
                self.refused += 1
        elif what == "cancel" and desk.jobs:
            desk.dispatcher.cancel(self.random.choice(desk.jobs)[0].request)
        elif running and what == "crash":
            attempts = self.random.choice(running)
            if self.random.random() < 0.5:
                attempts.result.cancel()
            else:
                attempts.result.set_result(RuntimeError("a defect"))
        elif running:
            wait_s = None if what == "end" else self.random.choice((0.0, 0.0, 50.0))
            self.random.choice(running).result.set_result(wait_s)

    async def finish_all(self) -> None:
        """All calls end well, as they come; those that wait long for an attempt are left."""
        while True:
            await self.desk.settle()
            running = [a for _, a in self.desk.jobs if a.is_waiting]
            if not running:
                return
            for attempts in running:
                attempts.result.set_result(None)
            self.desk.clock.advance(60.0)
            self.desk.dispatcher.dispatch()


async def test_every_request_has_one_ending_in_any_schedule(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """I1 and I6, whatever happens in which order; the seed is told."""
    caplog.set_level("CRITICAL")
    for seed in range(SCHEDULES):
        try:
            await Schedule(seed).run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed} fails") from error
