"""A request session owns one request to its end (invariant I1): one terminal event, one release per lease, whatever dies.

The session is a task. The call that serves the client reads its events and may vanish at any moment; `close` tells the session,
which then cancels the engine's call and gives the lease back. Nothing of that runs in the client's call.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import grpc
from caravan.core.v1 import generation_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.gateway.answer import Answer, pieces_of
from services.gateway.background import Background
from services.gateway.engine_calls import (
    EngineCall,
    begin,
    call_error,
    engine_lost,
    wait_for_end,
)
from services.gateway.engines import EnginePool
from services.gateway.fallback import Fallbacks
from services.gateway.leases import Leases
from services.gateway.metrics import GatewayMetrics, Outcome
from services.gateway.migration import GONE
from services.gateway.moves import Moves
from services.gateway.prefix_hashes import prefix_hashes
from services.gateway.relay import Relay
from services.gateway.requests import Api, InferenceRequest
from services.gateway.routes import Lease, Wanted
from services.gateway.stalls import StallWatch
from services.runtime.clock import Clock
from services.runtime.errors import CaravanError
from services.runtime.generate_events import in_order
from services.runtime.telemetry import RequestSpan

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SessionParts:
    """What every session uses. `new_seed` draws 32 bits, `fraction` a number within [0, 1)."""

    leases: Leases
    engines: EnginePool
    stalls: StallWatch
    metrics: GatewayMetrics
    clock: Clock
    background: Background
    new_seed: Callable[[], int]
    fraction: Callable[[], float]
    moves_max: int


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
        self.deployment = ""
        """The one that serves the request: the one asked for, or one of its fallbacks. Empty until there is a lease."""
        self._request = request
        self._span = span
        self._deadline = deadline
        self._parts = parts
        self._relay: Relay[engine_pb.GenerateResponse] = Relay()
        self._arrived = self._last_piece = parts.clock.monotonic()
        self._any_pieces = False
        self._answer = Answer()
        self._moves = Moves(parts.moves_max, parts.fraction, parts.clock, parts.metrics, span)
        self._fallbacks = Fallbacks()
        request.generate.request_id = request_id
        if request.api is not Api.PREFILL and not request.generate.sampling.HasField("seed"):
            # Of each engine its own would give the rest of another answer.
            request.generate.sampling.seed = parts.new_seed()
            request.generate.seed_drawn = True
        self._affinity = prefix_hashes(request.model, request.generate)
        self._task = asyncio.create_task(self._run())

    @property
    def task(self) -> asyncio.Task[None]:
        """Done when nothing is left of the request."""
        return self._task

    async def next(self, silence_s: float | None = None) -> engine_pb.GenerateResponse | None:
        """The next event; None after `silence_s` seconds without one. The last one is `finished`, or this raises CaravanError."""
        return await self._relay.get(silence_s)

    def next_ready(self) -> engine_pb.GenerateResponse | None:
        """The next event, if it has come already."""
        return self._relay.get_ready()

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
            outcome = await self._serve()
        except CaravanError as caught:
            error = self._told(caught)
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
            self._moves.end(outcome)
            took_s = self._parts.clock.monotonic() - self._arrived
            self._parts.metrics.count_request(self._request.api, outcome, took_s)
            self._span.end(failure)
            _LOG.debug("request %s: %s", self.request_id, failure or outcome.value)

    async def _serve(self) -> Outcome:
        """One lease after the other, until an engine has finished the answer or nothing is left to try."""
        while True:
            lease = await self._next_lease()
            outcome = Outcome.FAILED
            try:
                outcome = await self._generate(lease)
                return outcome
            except CaravanError as error:
                outcome = outcome_of(error)
                if error.reason in GONE:
                    # Also of a connection that is dead without knowing it nobody should make use again.
                    await self._parts.engines.forget(lease.address)
                delay_s = self._leave(error, lease)
            except asyncio.CancelledError:
                outcome = Outcome.CANCELLED
                raise
            finally:
                # The coordinator takes it before the route that may be next, for which the id of the request must be free.
                self._parts.leases.release(lease, outcome, self._answer.finish_key)
            await asyncio.sleep(delay_s)

    def _leave(self, error: CaravanError, lease: Lease) -> float:
        """Seconds to wait before the next lease is asked for. Raises the error where the request must end."""
        if self._fallbacks.take(
            error,
            lease.model,
            answered=self._answer.any_output,
            idempotent=lease.idempotent,
        ):
            # A move to the deployment that has failed now has come to nothing.
            self._moves.end(Outcome.FAILED)
            self._answer.fall_back()
            self._parts.metrics.count_fallback(self._fallbacks.failed[lease.model])
            self._span.event(f"{lease.model} failed: {error.reason}")
            return 0.0
        return self._moves.leave(
            error,
            lease,
            began=self._began,
            resumable=self._answer.resumable,
            remaining_s=self._remaining_s(),
        )

    def _told(self, error: CaravanError) -> CaravanError:
        """The error with which the client's call ends, and whose it is."""
        if self._answer.any_output:
            return error
        told = self._fallbacks.told(error)
        if told is not error:
            self.deployment = next(iter(self._fallbacks.failed))
        return told

    async def _next_lease(self) -> Lease:
        """Takes a lease, when it is the turn of the request. One that comes after the session has given up is given back."""
        remaining_s = self._remaining_s()
        if remaining_s == 0:
            raise _deadline_passed()
        try:
            async with asyncio.timeout(remaining_s):
                lease = await self._parts.leases.take(self._wanted(), self._span.headers())
        except TimeoutError:
            raise _deadline_passed() from None
        except CaravanError as error:
            # A client that has been given nothing is told what the coordinator says now.
            raise self._moves.cut_off_by(error) if self._answer.any_events else error from None
        self.engine_id = lease.engine_id
        self.deployment = lease.model
        self._span.set(caravan__engine_id=lease.engine_id, caravan__deployment=lease.model)
        return lease

    def _wanted(self) -> Wanted:
        # What the client has been given of an answer is of the model that it moves with; a deployment that failed gave nothing.
        begun = self._answer.any_events and self._moves.under_way
        return Wanted(
            self.request_id,
            self.deployment if begun else self._request.model,
            self._request.generate.cache.session_id,
            self._affinity,
            self._request.scheduling,
            avoided=self._moves.avoided,
            resumed=self._moves.under_way,
            may_fall_back=not begun,
            failed=self._fallbacks.failed,
        )

    async def _generate(self, lease: Lease) -> Outcome:
        self._began = False
        async with self._parts.engines.use(lease.address) as engine:
            timeout_s = self._remaining_s()
            if timeout_s == 0:
                raise _deadline_passed()
            self._answer.resume(self._request.generate)
            self._request.generate.priority = lease.priority
            call = begin(engine, self._request, timeout_s, self._span.headers())
            if self._request.api is not Api.PREFILL:
                # A prefill is one answer, and silent until then.
                call = self._parts.stalls.watch(call, lease.engine_id)
            try:
                return await self._relay_events(call, lease)
            except grpc.aio.AioRpcError as error:
                raise call_error(error, lease, self._request.model) from None
            finally:
                # The end of the call frees the sequence. grpc.aio does not cancel calls that are merely forgotten.
                call.cancel()

    async def _relay_events(self, call: EngineCall, lease: Lease) -> Outcome:
        while True:
            message = await call.read()
            if message is grpc.aio.EOF:
                # It ended without a terminal event (W3).
                raise engine_lost(lease.engine_id)
            for event in in_order(message):
                kind = event.WhichOneof("event")
                await self._relay_event(event, kind)
                if kind == "finished":
                    self._relay.end()
                    self._note_finished(event.finished)
                    await wait_for_end(call)
                    cancelled = event.finished.reason == generation_pb2.FINISH_REASON_CANCELLED
                    return Outcome.CANCELLED if cancelled else Outcome.FINISHED

    async def _relay_event(self, event: engine_pb.GenerateResponse, kind: str | None) -> None:
        # A request that only waits at its engine is alive too, and may go elsewhere whatever its deployment allows.
        self._began = self._began or kind != "progress"
        if not self._answer.take(event, kind):
            return
        late_start = self._answer.late_start()
        if late_start is not None:
            await self._relay.put(late_start)
        if kind == "delta":
            self._note_pieces(pieces_of(event.delta))
        await self._relay.put(event)

    def _note_pieces(self, pieces: int) -> None:
        if not pieces:
            return
        now = self._parts.clock.monotonic()
        if self._moves.under_way:
            self._moves.arrive()
        if self._any_pieces:
            self._parts.metrics.observe_tokens(now - self._last_piece, pieces)
        else:
            self._any_pieces = True
            self._parts.metrics.observe_first_token(now - self._arrived)
            self._span.event("first_token")
        self._last_piece = now

    def _note_finished(self, finished: engine_pb.Finished) -> None:
        # Where the tokens before were the whole answer, its end is what the next engine brings.
        self._moves.arrive()
        self._parts.metrics.count_prompt(self.deployment, finished)
        self._span.set(
            gen_ai__usage__input_tokens=finished.usage.prompt_tokens,
            gen_ai__usage__output_tokens=finished.usage.completion_tokens,
            caravan__cached_tokens=finished.usage.cached_tokens,
        )

    def _remaining_s(self) -> float | None:
        """What is left of the client's deadline; None: it set none."""
        if self._deadline is None:
            return None
        return max(0.0, self._deadline - self._parts.clock.monotonic())


def _deadline_passed() -> CaravanError:
    return CaravanError("DEADLINE_EXCEEDED", "The deadline of the request has passed.")
