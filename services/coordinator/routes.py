"""Routes and releases as they come in, by calls and on sessions of gateways alike: checked, traced, counted, answered once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TypeAlias

from caravan.coordinator.v1 import coordinator_service_pb2 as pb

from services.coordinator import checks, messages
from services.coordinator.effects import Effects, Grant
from services.coordinator.leases import Ended
from services.coordinator.metrics import CoordinatorMetrics
from services.coordinator.state import CoordinatorState
from services.coordinator.waiting import Want
from services.runtime.clock import Clock, IdSource
from services.runtime.errors import CaravanError
from services.runtime.telemetry import Metadata, RequestSpan, Tracing

_LOG = logging.getLogger(__name__)
Answer: TypeAlias = pb.RouteResponse | CaravanError
"""What becomes of a route."""


class Asked:
    """A route that was asked for. `tell` gets the answer, once, unless the asker leaves before."""

    __slots__ = ("model", "span", "tell", "timer", "want")

    def __init__(self, model: str, span: RequestSpan, tell: Callable[[Answer], None]) -> None:
        self.model = model
        self.span = span
        self.tell = tell
        self.want: Want | None = None
        """None: it could not be checked."""
        self.timer: asyncio.TimerHandle | None = None
        """Runs while it waits."""


class Routes:
    """The routes that wait for a lease, by request, and the way by which routes and releases reach the state.

    `perform` does what the state asks for; it hands answers of routes that waited to `answer`.
    """

    def __init__(
        self,
        state: CoordinatorState,
        metrics: CoordinatorMetrics,
        tracing: Tracing,
        clock: Clock,
        ids: IdSource,
        *,
        perform: Callable[[Effects], None],
    ) -> None:
        self._state = state
        self._metrics = metrics
        self._tracing = tracing
        self._clock = clock
        self._ids = ids
        self._perform = perform
        self._waiting: dict[str, Asked] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def ask(
        self,
        request: pb.RouteRequest,
        gateway_id: str,
        metadata: Metadata | None,
        tell: Callable[[Answer], None],
    ) -> Asked:
        """Asks for a lease. `tell` is called within this call where the answer is known at once.

        `metadata` may have the W3C context of the request.
        """
        span = self._tracing.start(
            "route",
            metadata,
            gen_ai__request__model=request.model,
            caravan__request_id=request.request_id,
        )
        asked = Asked(request.model, span, tell)
        try:
            granted = self._route(asked, request, gateway_id)
        except CaravanError as error:
            self._end(asked, error)
        except Exception:
            # A defect that one request meets must not end the session of a gateway, with all that it holds.
            _LOG.exception("route %s failed unexpectedly", request.request_id)
            self._end(
                asked,
                CaravanError("INTERNAL", "An internal error occurred; the log has the details."),
            )
            self._withdraw(asked)
        else:
            if granted is not None:
                self._end(asked, granted)
        return asked

    def _route(self, asked: Asked, request: pb.RouteRequest, gateway_id: str) -> Grant | None:
        """A lease, or None where it waits for one from now on. Raises CaravanError."""
        want = asked.want = checks.checked_want(
            request,
            gateway_id,
            lease_id=self._ids("lease"),
            wait_s=self._state.default_wait_s(request.model),
            priority=self._state.default_priority(request.model),
            now=self._clock.monotonic(),
        )
        granted = self._state.route(want)
        if granted is None:
            waiting = self._state.waiting.of_request(want.request_id)
            assert waiting is not None  # It waits, with the time that it got.
            loop = asyncio.get_running_loop()
            asked.timer = loop.call_later(waiting.wait_s, self.expire)
            self._waiting[want.request_id] = asked
        return granted

    def expire(self) -> None:
        """Refuses who has waited too long."""
        self._perform(self._state.expire_waiting(self._clock.monotonic()))

    def answer(self, request_id: str, answer: Grant | CaravanError) -> None:
        """A route that waited has its answer. Of one whose asker has left meanwhile nobody is told."""
        asked = self._waiting.pop(request_id, None)
        if asked is not None:
            self._end(asked, answer)

    def leave(self, asked: Asked) -> None:
        """Its asker is gone, perhaps in the moment of its grant, which is given back then (W61)."""
        if asked.want is not None and self._waiting.get(asked.want.request_id) is asked:
            self._stop(asked, "CANCELLED")
        self._withdraw(asked)

    def _withdraw(self, asked: Asked) -> None:
        want = asked.want
        if want is None:
            return
        if self._waiting.get(want.request_id) is asked:
            del self._waiting[want.request_id]
        elif self._state.leases.find(want.lease_id) is not None:
            self._metrics.count_release(pb.OUTCOME_CANCELLED)
        self._perform(self._state.leave(want, self._clock.monotonic()))

    def release(self, request: pb.ReleaseRequest) -> bool:
        """Ends a lease; whether it was held until now. Raises CaravanError: MISSING_FIELD, INVALID_VALUE."""
        lease_id = checks.checked_id("lease_id", request.lease_id)
        finish_key = checks.checked_key("finish_key", request.finish_key)
        ended = checks.ENDED.get(request.outcome, Ended.UNTOLD)
        # One that was swept, and is put aside until its engine or gateway comes back, has been counted as that.
        was_held = self._state.leases.find(lease_id) is not None
        effects = self._state.release(lease_id, self._clock.monotonic(), ended, finish_key)
        if effects is None:
            return False
        if was_held:
            self._metrics.count_release(request.outcome)
        self._perform(effects)
        return True

    def _end(self, asked: Asked, answer: Grant | CaravanError) -> None:
        if isinstance(answer, CaravanError):
            self._metrics.count_refusal(answer.reason)
            self._stop(asked, answer.reason)
            asked.tell(answer)
            return
        lease = answer.lease
        asked.span.set(caravan__engine_id=lease.engine_id, caravan__lease_id=lease.lease_id)
        self._metrics.count_grant(
            lease.granted_at - lease.arrived_at, fell_back=lease.model != asked.model
        )
        self._stop(asked, None)
        asked.tell(messages.to_route(answer))

    @staticmethod
    def _stop(asked: Asked, failure: str | None) -> None:
        if asked.timer is not None:
            asked.timer.cancel()
        asked.span.end(failure)
