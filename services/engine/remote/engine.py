"""An engine in front of a provider, as its servicers and the coordinator see it: its requests, its state, and how it is drained."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from itertools import count, islice

from caravan.coordinator.v1 import coordinator_service_pb2
from caravan.core.v1 import generation_pb2
from caravan.engine.v1 import engine_service_pb2 as pb
from caravan.engine.v1 import remote_service_pb2

from services.engine.drain import Drain
from services.engine.progress import ProgressTimer
from services.engine.rate import Rate
from services.engine.remote import status
from services.engine.remote.dispatcher import Dispatcher, Job
from services.engine.remote.endpoint import Endpoint
from services.engine.remote.estimate import expected_tokens, prompt_tokens
from services.engine.remote.messages import inflight_request
from services.engine.remote.options import EngineOptions
from services.engine.remote.outbox import Outbox
from services.engine.remote.request import Request, Work
from services.engine.remote.request_queue import RequestQueue
from services.engine.remote.run import Run
from services.engine.remote.whole import asks_plain, gather_s
from services.engine.remote.workers import WorkerPool
from services.engine.request_table import RequestTable
from services.runtime.errors import CaravanError
from services.runtime.server import cancel_all
from services.runtime.telemetry import RequestSpan

_LOG = logging.getLogger(__name__)
_RETRY_AFTER_S = 1.0
_TICK_S = 1.0


@dataclass(frozen=True)
class Identity:
    """Who the engine is. `incarnation` is the life of its process, `revision` the deployment's for which it was started."""

    engine_id: str
    incarnation: str
    model_name: str
    revision: str = ""


class RemoteEngine:
    """Lives on the event loop.

    `on_change` is called when it begins or ceases to take requests, `on_serving` is told whether it does, and `on_stopped` is called
    when a drain is over that was to end the process.
    """

    def __init__(
        self, identity: Identity, endpoint: Endpoint, options: EngineOptions, *, progress_s: float
    ) -> None:
        self.identity = identity
        self.endpoint = endpoint
        self.on_change: Callable[[], None] = lambda: None
        self.on_serving: Callable[[bool], None] = lambda _serving: None
        self.on_stopped: Callable[[], None] = lambda: None
        self._options = options
        self._clock = endpoint.clock
        self._failure = ""
        self._progress_s = progress_s
        most = options.workers + options.queue_capacity
        self.inflight = RequestTable(identity.model_name, most, _RETRY_AFTER_S, Request)
        self.dispatcher = Dispatcher(
            # The table bounds those who wait; who comes back for another attempt always finds a place.
            RequestQueue[Job](most, identity.model_name),
            WorkerPool(options.workers),
            self._clock,
            queues=options.patience,
            full=self._full,
            on_cancelled=self._cancelled,
            on_crash=endpoint.metrics.workers_replaced.inc,
        )
        self._drain = Drain(self._move)
        self._background: list[asyncio.Task[None]] = []
        self._empty = asyncio.Event()
        self._empty.set()
        self._rate = Rate()

    def start(self) -> None:
        """Begins to serve."""
        self._in_background(self._tick())
        if self._progress_s:
            # The loop that asks is the one that does the work.
            timer = ProgressTimer(self._progress_s, count(1).__next__, self._streams)
            self._in_background(timer.run())

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(_tell_defect)
        self._background.append(task)

    async def stop(self) -> None:
        """Ends all calls."""
        await self.dispatcher.stop()
        await cancel_all(self._background)

    def tell_health(self) -> None:
        """Tells whether requests are taken."""
        self.on_serving(not self._failure and not self._drain.draining)
        self.on_change()

    def fail(self, why: str) -> None:
        """Nothing can be served, until a credential is there."""
        _LOG.error("no request can be served: %s", why)
        self._failure = why
        self.tell_health()

    def heal(self) -> None:
        """A credential was read."""
        if self._failure:
            self._failure = ""
            self.tell_health()

    # --- requests ------------------------------------------------------------------------------------------------

    def register(self, request_id: str) -> Request:
        """Admits a request. Raises DRAINING, PROVIDER_UNAUTHORIZED, or what the table refuses."""
        if self._drain.draining:
            raise _draining()
        if self._failure:
            raise CaravanError(
                "PROVIDER_UNAUTHORIZED",
                "The credential for the provider of the model cannot be read.",
                provider=self.endpoint.provider,
            )
        request = self.inflight.register(request_id, self._clock.monotonic())
        self._empty.clear()
        return request

    def submit(
        self,
        request: Request,
        generate: pb.GenerateRequest,
        remaining_s: float | None,
        span: RequestSpan,
    ) -> None:
        """Translates and takes a request; events come in its outbox. Raises CaravanError."""
        endpoint = self.endpoint
        options = self._options
        plain = asks_plain(generate, options.timeouts.first_byte_s)
        call = endpoint.wire.request(generate, endpoint.model, plain=plain)
        work = Work(
            call=call,
            tenant=generate.tenant,
            priority=generate.priority,
            deadline=math.inf if remaining_s is None else request.arrived + remaining_s,
            prompt_tokens=prompt_tokens(generate),
            tokens=expected_tokens(
                generate, options.default_max_tokens, options.limits.tokens_per_minute
            ),
            gather_s=gather_s(generate, options.gather_s),
            span=span,
        )
        self.dispatcher.submit(Job(request, work, Run(endpoint, request, work)))

    def cancel(self, request_id: str) -> bool:
        """Ends a request as cancelled; says whether it was in flight."""
        request = self.inflight.lookup(request_id)
        if request is None:
            return False
        self.dispatcher.cancel(request)
        return True

    def release(self, request: Request, tenant: str, outcome: str) -> None:
        """The call of the request has ended, as `outcome` says: the provider's is closed if it still runs."""
        self.dispatcher.cancel(request)
        self.inflight.unregister(request)
        request.tenant, request.outcome = tenant, outcome
        if request.task is None:
            self._account(request)
        if not self.inflight.depth:
            self._empty.set()
            self._look_for_end()

    def _cancelled(self, request: Request) -> None:
        now = self._clock.monotonic()
        request.end(generation_pb2.FINISH_REASON_CANCELLED, now)
        if request.outcome:
            # Its caller left while a worker had it: only now is known what it has used.
            self._account(request)

    def _account(self, request: Request) -> None:
        self.endpoint.accounts.ended(
            request.tenant, request.usage, request.cost_nanousd, request.outcome
        )

    def _full(self) -> CaravanError:
        """The refusal of a request that finds all workers busy, by a deployment whose requests do not wait."""
        if self._options.falls_back:
            # What makes a fallback take it.
            return CaravanError(
                "RATE_LIMITED",
                f"All {self._options.workers} workers of the model are busy.",
                retry_after_s=_RETRY_AFTER_S,
                provider=self.endpoint.provider,
                limit="workers",
            )
        return self.inflight.exhausted()

    def _streams(self) -> Iterator[tuple[Outbox, int]]:
        for request in self.inflight.oldest_first():
            yield request.outbox, 0

    # --- leaving -------------------------------------------------------------------------------------------------

    def drain(self, grace_s: float, *, stop: bool = False, for_good: bool = False) -> None:
        """Takes no new requests; those that still run after `grace_s` seconds end with DRAINING. With `stop`, `on_stopped` is
        called when none is left. One drain `for_good` outlasts all others."""
        self._drain.start(grace_s, stop=stop, for_good=for_good)
        self.on_serving(False)  # noqa: FBT003 - there is nothing else that it could mean
        self.on_change()
        self._look_for_end()

    def undrain(self) -> None:
        """Takes requests again."""
        self._drain.undo()
        self.tell_health()

    async def emptied(self, timeout_s: float) -> bool:
        """Waits until no request is in flight; False if one is left."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def _move(self) -> None:
        for request in self.inflight.oldest_first():
            if not request.outbox.ended:
                self.endpoint.metrics.requests_moved.inc()
                request.outbox.fail(_draining())
            self.dispatcher.cancel(request)

    def _look_for_end(self) -> None:
        if self._drain.stop and not self.inflight.depth:
            self.on_stopped()

    # --- what it tells -------------------------------------------------------------------------------------------

    def model(self) -> pb.ModelInfo:
        """What the engine is."""
        return status.model_info(self.identity.model_name, self.endpoint, self._options)

    def load(self) -> pb.EngineLoad:
        """What the engine does."""
        busy = self.dispatcher.pool.busy
        return pb.EngineLoad(
            phase=self._phase(),
            load_progress=1.0,
            active_sequences=busy,
            queued_requests=max(0, self.inflight.depth - busy),
            tokens_per_second=self._rate.sample(
                self._clock.monotonic(), self.endpoint.accounts.pieces
            ),
            failure=self._failure,
        )

    def requests(self, most: int | None = None) -> list[pb.InflightRequest]:
        """The requests in flight, oldest first, at most `most`."""
        now = self._clock.monotonic()
        return [inflight_request(row, now) for row in islice(self.inflight.oldest_first(), most)]

    def remote_status(self) -> remote_service_pb2.GetRemoteStatusResponse:
        """How it stands with the provider."""
        return status.remote_status(self.endpoint, self._options, self.dispatcher)

    def extend(self, report: coordinator_service_pb2.EngineReport) -> None:
        """Adds what was spent, and what was used of shared limits."""
        report.spend.extend(self.endpoint.accounts.spend.report())
        report.limits.extend(self.endpoint.gate.counters())

    def merge(self, command: coordinator_service_pb2.LimitsCommand) -> None:
        """Learns what others have used of shared limits."""
        self.endpoint.gate.merge(command.counters)

    def _phase(self) -> pb.EnginePhase.ValueType:
        if self._failure:
            return pb.ENGINE_PHASE_FAILED
        if self._drain.draining:
            return pb.ENGINE_PHASE_DRAINING
        return pb.ENGINE_PHASE_GENERATING if self.dispatcher.pool.busy else pb.ENGINE_PHASE_IDLE

    async def _tick(self) -> None:
        while True:
            self.dispatcher.dispatch()
            self.endpoint.metrics.show(self.remote_status())
            await asyncio.sleep(_TICK_S)


def _draining() -> CaravanError:
    """Another engine is to take the request."""
    return CaravanError("DRAINING", "The engine is being drained.", retry_after_s=_RETRY_AFTER_S)


def _tell_defect(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        _LOG.error("a task of the engine has ended", exc_info=task.exception())
