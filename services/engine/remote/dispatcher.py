"""Brings requests and workers together: who waits, who is served, and what happens when a worker crashes (S3.2, S3.5; W15-W17, W22).

A worker has a request for one attempt. Between two attempts the request waits without one, and comes back to its old place in the
queue: a provider that asks for patience does not keep workers from others. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Protocol

from services.engine.remote.request import Phase, Request, Work
from services.engine.remote.request_queue import RequestQueue
from services.engine.remote.workers import WorkerId, WorkerPool
from services.runtime.clock import Clock
from services.runtime.errors import CaravanError

_LOG = logging.getLogger(__name__)


class Attempts(Protocol):
    """One request's calls of the provider."""

    def attempt(self) -> Coroutine[None, None, float | None]:
        """Makes the next call. Returns None where the request has its end; else it is to be called again after so many
        seconds."""
        ...


class Job:
    """A request with its work and its attempts."""

    __slots__ = ("attempts", "is_dropped", "request", "work")

    def __init__(self, request: Request, work: Work, attempts: Attempts) -> None:
        self.request = request
        self.work = work
        self.attempts = attempts
        self.is_dropped = False
        """Whether nothing more is to be done for it."""


class Dispatcher:
    """`queues` says whether requests may wait for a worker; `on_cancelled` is told of a request whose cancel has taken effect,
    and `on_crash` of a worker's."""

    def __init__(
        self,
        queue: RequestQueue[Job],
        pool: WorkerPool,
        clock: Clock,
        *,
        queues: bool,
        full: Callable[[], CaravanError],
        on_cancelled: Callable[[Request], None],
        on_crash: Callable[[], None],
    ) -> None:
        self.pool = pool
        self._queue = queue
        self._clock = clock
        self._queues = queues
        self._full = full
        self._on_cancelled = on_cancelled
        self._on_crash = on_crash
        self._numbers = itertools.count(1)
        self._jobs: dict[Request, Job] = {}

    @property
    def waiting(self) -> int:
        """Requests that wait for a worker."""
        return len(self._queue)

    def submit(self, job: Job) -> None:
        """Gives the request to a worker, or lets it wait. Raises CAPACITY_EXHAUSTED."""
        now = self._clock.monotonic()
        if not self._start_at_once(job, now):
            if not self._queues:
                raise self._full()
            self._queue.push(job, job.work.priority, now, job.work.deadline)
        self._jobs[job.request] = job

    def cancel(self, request: Request) -> None:
        """Ends what is done for a request: a call is closed, a place in the queue is given up."""
        job = self._jobs.get(request)
        if job is None or job.is_dropped:
            return  # A second cancel would break off what the first one's call still has to close.
        job.is_dropped = True
        if request.task is not None:
            request.task.cancel()  # `_ended` does the rest.
            return
        if request.timer is not None:
            request.timer.cancel()
            request.timer = None
        self._queue.remove(job)
        self._leave(job)
        self._on_cancelled(request)

    def dispatch(self) -> None:
        """Hands over what can be handed over; also to be called now and then, for workers that come back and for deadlines."""
        now = self._clock.monotonic()
        for job in self._queue.expired(now):
            job.request.outbox.fail(deadline_exceeded())
            self._leave(job)
        while len(self._queue):
            dispatch_id = self._new_id()
            worker = self.pool.take(dispatch_id, now)
            if worker is None:
                break
            next_job = self._queue.pop(now)
            if next_job is None:
                self.pool.idle(worker, dispatch_id)
                break
            self._start(worker, dispatch_id, next_job)

    async def stop(self) -> None:
        """Cancels all calls and waits for their end."""
        tasks = [job.request.task for job in self._jobs.values() if job.request.task is not None]
        for request in list(self._jobs):
            self.cancel(request)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _new_id(self) -> str:
        return f"dispatch-{next(self._numbers)}"

    def _start_at_once(self, job: Job, now: float) -> bool:
        """Hands over what need not wait: nobody is before it, and a worker is idle."""
        if len(self._queue):
            return False
        dispatch_id = self._new_id()
        worker = self.pool.take(dispatch_id, now)
        if worker is None:
            return False
        self._start(worker, dispatch_id, job)
        return True

    def _start(self, worker: WorkerId, dispatch_id: str, job: Job) -> None:
        request = job.request
        request.phase = Phase.CALLING
        request.task = asyncio.create_task(job.attempts.attempt(), name=worker)
        # Not at the end of the task's own code: a task that is cancelled before its first step never runs any.
        request.task.add_done_callback(partial(self._ended, worker, dispatch_id, job))

    def _ended(
        self, worker: WorkerId, dispatch_id: str, job: Job, task: asyncio.Task[float | None]
    ) -> None:
        request = job.request
        request.task = None
        error: BaseException | None = None
        if not task.cancelled():
            error = task.exception()
        elif not job.is_dropped:
            # Nobody of ours has cancelled it: a library did, or a defect.
            error = asyncio.CancelledError()
        if error is None:
            self.pool.idle(worker, dispatch_id)
        else:
            _LOG.error("%s crashed and is replaced", worker, exc_info=error)
            self.pool.crashed(worker, dispatch_id, self._clock.monotonic())
            self._on_crash()
            request.outbox.fail(defect())
        wait_s = None if task.cancelled() or error is not None else task.result()
        if job.is_dropped or wait_s is None:
            self._leave(job)
            if job.is_dropped:
                self._on_cancelled(request)
        else:
            request.phase = Phase.QUEUED
            loop = asyncio.get_running_loop()
            request.timer = loop.call_later(wait_s, self._again, job)
        self.dispatch()

    def _again(self, job: Job) -> None:
        request = job.request
        request.timer = None
        if self._start_at_once(job, self._clock.monotonic()):
            return
        try:
            # By its arrival it comes before those who came while it waited.
            self._queue.push(job, job.work.priority, request.arrived, job.work.deadline)
        except CaravanError as error:
            request.outbox.fail(error)
            self._leave(job)

    def _leave(self, job: Job) -> None:
        self._jobs.pop(job.request, None)


def deadline_exceeded() -> CaravanError:
    """The caller's time is over."""
    return CaravanError("DEADLINE_EXCEEDED", "The deadline of the request passed.")


def defect() -> CaravanError:
    """The engine is wrong."""
    return CaravanError("INTERNAL", "The engine failed; its log has the details.")
