"""A request session owns one request to its end (invariant I1): one terminal event, one release per lease, whatever dies.

The session is a task. The call that serves the client reads its events and may vanish at any moment; `close` tells the session,
which then cancels the engine's call and gives the lease back. Nothing of that runs in the client's call.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import Final

import grpc
from caravan.core.v1 import generation_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from grpc_status import rpc_status

from services.gateway.background import Background
from services.gateway.coordinator import CoordinatorClient, Lease, Wanted
from services.gateway.engine_calls import EngineCall, begin
from services.gateway.engines import EnginePool
from services.gateway.membership import coordinator_down
from services.gateway.metrics import GatewayMetrics, Outcome
from services.gateway.prefix_hashes import prefix_hashes
from services.gateway.relay import Relay
from services.gateway.requests import InferenceRequest
from services.runtime.clock import Clock
from services.runtime.errors import CaravanError, from_rpc_error
from services.runtime.telemetry import RequestSpan

_LOG = logging.getLogger(__name__)

ATTEMPTS_MAX: Final = 2
"""Leases that one request may take. A second one only while the client has seen nothing and the engine has begun nothing."""
_LAST_READ_S: Final = 1.0

_RETRIED: Final = frozenset({"ENGINE_LOST", "DRAINING", "CAPACITY_EXHAUSTED", "MODEL_LOADING"})


@dataclass(frozen=True, slots=True)
class SessionParts:
    """What every session uses."""

    coordinator: CoordinatorClient
    engines: EnginePool
    metrics: GatewayMetrics
    clock: Clock
    background: Background


def outcome_of(error: CaravanError) -> Outcome:
    """How a request that ended with this error counts."""
    if error.reason == "CANCELLED":
        return Outcome.CANCELLED
    return Outcome.REFUSED if error.row.http_status < 500 else Outcome.FAILED


class RequestSession:
    """One request. `deadline` is in monotonic seconds, None where the client set none."""

    def __init__(
        self,
        request: InferenceRequest,
        request_id: str,
        span: RequestSpan,
        deadline: float | None,
        parts: SessionParts,
    ) -> None:
        self.request_id = request_id
        self.engine_id = ""
        self._request = request
        self._span = span
        self._deadline = deadline
        self._parts = parts
        self._relay: Relay[engine_pb.GenerateResponse] = Relay()
        self._arrived = self._last_tokens = parts.clock.monotonic()
        self._began = False
        self._any_tokens = False
        request.generate.request_id = request_id
        self._wanted = Wanted(
            request_id,
            request.model,
            request.generate.cache.session_id,
            prefix_hashes(request.model, request.generate),
            request.scheduling,
        )
        self._task = asyncio.create_task(self._run())

    @property
    def task(self) -> asyncio.Task[None]:
        """Done when nothing is left of the request but its release."""
        return self._task

    async def next(self, silence_s: float | None = None) -> engine_pb.GenerateResponse | None:
        """The next event; None after `silence_s` seconds without one. The last one is `finished`, or this raises CaravanError."""
        return await self._relay.get(silence_s)

    def next_delta(self) -> engine_pb.Delta | None:
        """The next event, if it has come already and is a delta."""
        event = self._relay.get_if(_is_delta)
        return None if event is None else event.delta

    def close(self) -> None:
        """The client's call is over: unless the request is too, it is cancelled. May be called many times."""
        self._relay.close()
        if not self._relay.over:
            self._task.cancel()

    # --- the task ------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        outcome = Outcome.FAILED
        failure: str | None = None
        try:
            outcome = await self._attempts()
        except CaravanError as error:
            outcome, failure = outcome_of(error), error.reason
            self._relay.end(error)
        except asyncio.CancelledError:
            outcome, failure = Outcome.CANCELLED, "CANCELLED"
            self._relay.end(CaravanError("CANCELLED", "The request was cancelled."))
            raise
        except Exception:
            _LOG.exception("request %s failed unexpectedly", self.request_id)
            failure = "INTERNAL"
            self._relay.end(CaravanError("INTERNAL", "An internal error occurred."))
        finally:
            took_s = self._parts.clock.monotonic() - self._arrived
            self._parts.metrics.count_request(self._request.api, outcome, took_s)
            self._span.end(failure)
            _LOG.debug("request %s: %s", self.request_id, failure or outcome.value)

    async def _attempts(self) -> Outcome:
        for attempt in range(1, ATTEMPTS_MAX + 1):
            lease = await self._route()
            release: asyncio.Task[None] | None = None
            outcome = Outcome.FAILED
            try:
                outcome = await self._generate(lease)
                return outcome
            except CaravanError as error:
                outcome = outcome_of(error)
                if self._began or error.reason not in _RETRIED or attempt == ATTEMPTS_MAX:
                    raise
                _LOG.info("request %s goes to a second engine: %s", self.request_id, error.reason)
                self._parts.metrics.count_retry()
            except asyncio.CancelledError:
                outcome = Outcome.CANCELLED
                raise
            finally:
                # In a task of its own: it happens even if this one is cancelled now.
                release = self._parts.background.spawn(self._release(lease, outcome))
            # The id of the request is free for the next lease only after the release.
            await asyncio.shield(release)
        raise AssertionError("the last attempt returns or raises")

    async def _route(self) -> Lease:
        """Takes a lease, when it is the turn of the request. One that comes after the session has given up is given back."""
        routing = self._parts.background.spawn(
            self._parts.coordinator.route(self._wanted, self._span.headers())
        )
        try:
            await self._routed(routing)
        except (CaravanError, asyncio.CancelledError):
            self._parts.background.spawn(self._give_back(routing))
            raise
        lease = routing.result()
        self.engine_id = lease.engine_id
        self._span.set(caravan__engine_id=lease.engine_id)
        return lease

    async def _routed(self, routing: asyncio.Task[Lease]) -> None:
        """Waits for the answer, for as long as the coordinator is there. Raises DEADLINE_EXCEEDED, SERVICE_UNAVAILABLE."""
        coordinator = self._parts.coordinator
        while not routing.done():
            tick_s = min(coordinator.timeout_s, self._remaining_s(coordinator.timeout_s))
            await asyncio.wait({routing}, timeout=tick_s)
            if not routing.done():
                self._check_deadline()
                if not coordinator.is_joined:
                    raise coordinator_down()

    async def _give_back(self, routing: asyncio.Task[Lease]) -> None:
        # Without the answer nobody could tell whether a grant is on its way; the cancel makes it come at once.
        with contextlib.suppress(CaravanError):
            if not routing.done():
                await self._parts.coordinator.cancel(self.request_id)
        try:
            lease = await routing
        except CaravanError:
            return
        await self._release(lease, Outcome.CANCELLED)

    async def _release(self, lease: Lease, outcome: Outcome) -> None:
        try:
            await self._parts.coordinator.release(lease, outcome)
        except CaravanError as error:
            # The coordinator is away; the lease ends with this gateway's session there.
            self._parts.metrics.count_failed_release()
            _LOG.warning("lease %s was not released: %s", lease.lease_id, error)

    async def _generate(self, lease: Lease) -> Outcome:
        async with self._parts.engines.use(lease.address) as engine:
            self._check_deadline()
            timeout_s = None if self._deadline is None else self._remaining_s(0.0)
            call = begin(engine, self._request, timeout_s, self._span.headers())
            try:
                return await self._relay_events(call, lease)
            except grpc.aio.AioRpcError as error:
                failure = self._engine_error(error, lease)
                if failure.reason == "ENGINE_LOST":
                    self._parts.engines.forget(lease.address)
                raise failure from None
            finally:
                # The end of the call frees the sequence. grpc.aio does not cancel calls that are merely forgotten.
                call.cancel()

    async def _relay_events(self, call: EngineCall, lease: Lease) -> Outcome:
        while True:
            event = await call.read()
            if event is grpc.aio.EOF:
                # It ended without a terminal event (W3).
                raise _engine_lost(lease)
            self._began = True
            kind = event.WhichOneof("event")
            if kind == "delta":
                self._note_tokens(len(event.delta.token_ids))
            await self._relay.put(event)
            if kind == "finished":
                self._relay.end()
                self._note_finished(event.finished)
                await _read_to_end(call)
                cancelled = event.finished.reason == generation_pb2.FINISH_REASON_CANCELLED
                return Outcome.CANCELLED if cancelled else Outcome.FINISHED

    def _engine_error(self, error: grpc.aio.AioRpcError, lease: Lease) -> CaravanError:
        known = from_rpc_error(error, service="engine")
        unreachable = known.reason in {"SERVICE_UNAVAILABLE", "CANCELLED"}
        if unreachable and rpc_status.from_call(error) is None:
            # No words of the engine itself: its process or its listener is gone.
            return _engine_lost(lease)
        return known

    def _note_tokens(self, tokens: int) -> None:
        if not tokens:
            return
        now = self._parts.clock.monotonic()
        if self._any_tokens:
            self._parts.metrics.observe_tokens(now - self._last_tokens, tokens)
        else:
            self._any_tokens = True
            self._parts.metrics.observe_first_token(now - self._arrived)
            self._span.event("first_token")
        self._last_tokens = now

    def _note_finished(self, finished: engine_pb.Finished) -> None:
        self._parts.metrics.count_prompt(self._request.model, finished)
        self._span.set(
            gen_ai__usage__input_tokens=finished.usage.prompt_tokens,
            gen_ai__usage__output_tokens=finished.usage.completion_tokens,
            caravan__cached_tokens=finished.usage.cached_tokens,
        )

    def _remaining_s(self, without: float) -> float:
        if self._deadline is None:
            return without
        return max(0.0, self._deadline - self._parts.clock.monotonic())

    def _check_deadline(self) -> None:
        if self._deadline is not None and self._remaining_s(1.0) <= 0:
            raise CaravanError("DEADLINE_EXCEEDED", "The deadline of the request has passed.")


def _is_delta(event: engine_pb.GenerateResponse) -> bool:
    return event.HasField("delta")


def _engine_lost(lease: Lease) -> CaravanError:
    return CaravanError(
        "ENGINE_LOST",
        "The engine that served the request went away.",
        retry_after_s=1.0,
        engine_id=lease.engine_id,
    )


async def _read_to_end(call: EngineCall) -> None:
    """Lets the engine end its call by itself, so that it does not count a finished request as cancelled."""
    with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError):
        async with asyncio.timeout(_LAST_READ_S):
            while await call.read() is not grpc.aio.EOF:
                pass
