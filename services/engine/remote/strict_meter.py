"""The coordinator's meter behind the gate: every call asks it, so that engines never pass a limit together (strict mode).

A permit that the coordinator has granted is always ended by a call of SettleLimit, also where nobody waits for the grant any more;
what cannot be told ends with the engine's session. While the coordinator is away nothing is let through; a restart of it is waited for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from typing import Final

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc
from caravan.engine.v1 import remote_options_pb2

from services.engine.remote.failure import Failure, ProviderError
from services.runtime.clock import Clock
from services.runtime.rate_limiter import Denial

_LOG = logging.getLogger(__name__)
SHARED: Final = "shared"
"""The name of the limit where the coordinator refuses: it does not say which."""
ANSWER_S: Final = 2.0
"""Longest wait for the coordinator's answer."""
AWAY_RETRY_S: Final = 0.5
AWAY_S: Final = 10.0
"""After so long without any answer a request does not wait for the coordinator any more."""
CALL_S: Final = 10.0
"""Time after which a call to the coordinator is given up. A grant that comes later than ANSWER_S is given back."""
CLOSE_S: Final = 2.0
"""Longest time for what is still to be settled when the engine stops; its session's end does the rest."""
SETTLE_TRIES: Final = 8
SETTLE_FIRST_S: Final = 0.2
"""Pause after the first failure to settle; it doubles."""


class StrictMeter:
    """Asks the coordinator. Raises and returns what Meter says."""

    def __init__(
        self,
        stub: pb_grpc.CoordinatorServiceAsyncStub,
        key: str,
        incarnation: str,
        limits: remote_options_pb2.RateLimits,
        clock: Clock,
    ) -> None:
        self._stub = stub
        self._key = key
        self._incarnation = incarnation
        self._limits = limits
        self._clock = clock
        self._refused_until = 0.0
        self._away: tuple[float, float] | None = None
        """Since when the coordinator has not answered, and when it was last asked in vain."""
        self._tasks: set[asyncio.Task[None]] = set()
        self.changed = asyncio.Event()

    def want(self, tokens: int) -> None:
        """See Meter. The coordinator hears of it when it is asked."""

    def foresee(self, tokens: int, ahead_requests: int, ahead_tokens: int) -> Denial | None:
        """See Meter: what the coordinator has said last."""
        wait_s = self._refused_until - self._clock.monotonic()
        return Denial(SHARED, wait_s) if wait_s > 0 else None

    async def ask(self, tokens: int) -> StrictPermit | Denial:
        """See Meter. Raises ProviderError where the coordinator does not answer."""
        asking = asyncio.ensure_future(self._acquire(tokens))
        try:
            async with asyncio.timeout(ANSWER_S):
                answer = await asyncio.shield(asking)
        except grpc.aio.AioRpcError as error:
            return self._unanswered(error.code().name)
        except TimeoutError:
            self._in_background(self._give_back(asking))
            return self._unanswered("it does not answer")
        except asyncio.CancelledError:
            self._in_background(self._give_back(asking))
            raise
        self._away = None
        if answer.permit_id:
            return StrictPermit(self, answer.permit_id)
        wait_s = answer.retry_after.ToMicroseconds() / 1e6
        self._refused_until = self._clock.monotonic() + wait_s
        return Denial(SHARED, wait_s)

    def _unanswered(self, why: str) -> Denial:
        """Whoever may wait does so while the coordinator may be about to come back. Raises ProviderError after that."""
        now = self._clock.monotonic()
        since = now
        if self._away is not None and now - self._away[1] < AWAY_S:
            since = self._away[0]
        self._away = since, now
        if now - since < AWAY_S:
            return Denial(SHARED, AWAY_RETRY_S)
        raise ProviderError(
            Failure.RATE_LIMITED,
            f"The limit is kept by the coordinator, which cannot be asked: {why}.",
            retry_after_s=AWAY_RETRY_S,
            limit=SHARED,
        )

    async def _acquire(self, tokens: int) -> pb.AcquireLimitResponse:
        request = pb.AcquireLimitRequest(
            key=self._key, incarnation=self._incarnation, limits=self._limits, tokens=tokens
        )
        return await self._stub.AcquireLimit(request, timeout=CALL_S)

    async def _give_back(self, asking: asyncio.Future[pb.AcquireLimitResponse]) -> None:
        try:
            answer = await asking
        except grpc.aio.AioRpcError:
            return  # No answer, no permit.
        if answer.permit_id:
            await self._settle(pb.SettleLimitRequest(permit_id=answer.permit_id, tokens=0))

    def settle(self, request: pb.SettleLimitRequest) -> None:
        """Ends a permit in the background."""
        self._in_background(self._settle(request))
        self.changed.set()

    async def _settle(self, request: pb.SettleLimitRequest) -> None:
        pause_s = SETTLE_FIRST_S
        for _ in range(SETTLE_TRIES):
            try:
                await self._stub.SettleLimit(request, timeout=CALL_S)
            except grpc.aio.AioRpcError as error:
                why = error.code().name
            else:
                self.changed.set()
                return
            await asyncio.sleep(pause_s)
            pause_s *= 2
        _LOG.warning("permit %s could not be settled: %s", request.permit_id, why)

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def counters(self, waiting_requests: int, waiting_tokens: int) -> list[pb.LimitCounter]:
        """See Meter: the coordinator counts."""
        return []

    def merge(self, counters: Iterable[pb.LimitCounter]) -> None:
        """See Meter: the coordinator counts."""

    def pace(self) -> tuple[float, float]:
        """See Meter: all that is configured, for all engines together."""
        return float(self._limits.requests_per_minute), float(self._limits.tokens_per_minute)

    async def close(self) -> None:
        """Waits until the permits that have ended are settled, as far as the coordinator is there."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=CLOSE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)


class StrictPermit:
    """A call that the coordinator has let through."""

    def __init__(self, meter: StrictMeter, permit_id: str) -> None:
        self._meter = meter
        self._permit_id = permit_id

    def settle(self, used: int | None) -> None:
        """See Permit."""
        self._meter.settle(pb.SettleLimitRequest(permit_id=self._permit_id, tokens=used))

    def throttled(self, retry_after_s: float | None) -> None:
        """See Permit."""
        request = pb.SettleLimitRequest(permit_id=self._permit_id, tokens=0)
        request.throttled.FromMicroseconds(round(1e6 * (retry_after_s or 0)))
        self._meter.settle(request)

    def withdraw(self) -> None:
        """See Permit. The contract has no way to say that a request was never made; it counts as one without tokens."""
        self.settle(0)
