"""Where requests wait for a limit: first come, first served, within their time.

The gate asks a meter: the engine's own one (engine_meter.py, approximate mode), or the
coordinator (strict_meter.py). What it lets
through holds a permit, which must be given back on every path: `settle`, `throttled` or `withdraw`; only the first of them counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc
from caravan.engine.v1 import remote_options_pb2, remote_service_pb2

from services.engine.remote.engine_meter import EngineMeter
from services.engine.remote.failure import Failure, ProviderError
from services.engine.remote.lately import Lately
from services.engine.remote.limits import EngineLimits
from services.engine.remote.shared_limits import SharedLimits
from services.engine.remote.strict_meter import StrictMeter
from services.runtime.clock import Clock
from services.runtime.rate_limiter import Denial, Quota

WAITING_MAX: Final = 1024
"""Most requests that wait at a gate; an engine has no more workers."""
ASK_AGAIN_S: Final = 1.0
"""Retry time where nobody knows when a place becomes free."""


class Permit(Protocol):
    """What a meter has let through. Each is ended once."""

    def settle(self, used: int | None) -> None:
        """It has ended; tokens that it used, None: as many as expected."""
        ...

    def throttled(self, retry_after_s: float | None) -> None:
        """The provider has refused it, because there were too many."""
        ...

    def withdraw(self) -> None:
        """It was never sent."""
        ...


class Meter(Protocol):
    """Who says whether a request may go."""

    changed: asyncio.Event
    """Set when asking again may have another answer."""

    def want(self, tokens: int) -> None:
        """A request asks for the first time."""
        ...

    def foresee(self, tokens: int, ahead_requests: int, ahead_tokens: int) -> Denial | None:
        """What it will be told, behind those that wait, as far as can be said."""
        ...

    async def ask(self, tokens: int) -> Permit | Denial:
        """Lets it through, or says why not. Raises ProviderError (RATE_LIMITED) where waiting is no use."""
        ...

    def counters(self, waiting_requests: int, waiting_tokens: int) -> list[pb.LimitCounter]:
        """What to report."""
        ...

    def merge(self, counters: Iterable[pb.LimitCounter]) -> None:
        """Learns what others have used."""
        ...

    def pace(self) -> tuple[float, float]:
        """Requests and tokens in a minute at present; 0: without limit."""
        ...

    async def close(self) -> None:
        """Tells what is still to be told."""
        ...


class RatePermit:
    """The right to make one call. Ending it twice does nothing."""

    def __init__(self, permit: Permit, tokens: int, end: Callable[[int], None]) -> None:
        self._permit: Permit | None = permit
        self._tokens = tokens
        self._end = end

    def settle(self, tokens_used: int | None) -> None:
        """The call has ended, well or not; tokens of its prompt and answer, None: not known, so as many as expected."""
        if (permit := self._take(tokens_used)) is not None:
            permit.settle(tokens_used)

    def throttled(self, retry_after_s: float | None) -> None:
        """The provider has answered 429; the time that it named in seconds, or None."""
        if (permit := self._take(0)) is not None:
            permit.throttled(retry_after_s)

    def withdraw(self) -> None:
        """The call was never made."""
        if (permit := self._take(0)) is not None:
            permit.withdraw()

    def _take(self, used: int | None) -> Permit | None:
        permit, self._permit = self._permit, None
        if permit is not None:
            self._end(0 if used is None else used - self._tokens)
        return permit


class RateGate:
    """The gate of one engine. All its methods are called on one event loop.

    `key` names the limit, `configured` is shown in the status.
    """

    def __init__(
        self, key: str, configured: remote_options_pb2.RateLimits, meter: Meter, clock: Clock
    ) -> None:
        self._key = key
        self._configured = configured
        self._meter = meter
        self._clock = clock
        self._line = asyncio.Lock()  # It wakes who waits in the order of their coming.
        self._waiting = 0
        self._waiting_tokens = 0
        self._running = 0
        self._used = Lately(60.0)

    async def enter(self, tokens: int, remaining_s: float | None, patience: bool) -> RatePermit:
        """A permit for a call that is expected to use so many tokens, prompt and answer.

        With `patience` it waits for it, up to `remaining_s` seconds; None: as long as it takes. Raises ProviderError: RATE_LIMITED,
        with the name of the limit and a retry time, where it may not wait, or not as long as it would have to.
        """
        self._meter.want(tokens)
        if not patience:
            return self._admit(tokens, await self._meter.ask(tokens))
        if self._waiting >= WAITING_MAX:
            raise _limited(Denial("waiting", None), f"{WAITING_MAX} requests wait already")
        denial = self._meter.foresee(tokens, self._waiting, self._waiting_tokens)
        if remaining_s is not None and denial is not None and (denial.wait_s or 0) > remaining_s:
            raise _limited(denial)
        self._waiting += 1
        self._waiting_tokens += tokens
        try:
            async with asyncio.timeout(remaining_s):
                return await self._wait(tokens, remaining_s)
        except TimeoutError:
            late = self._meter.foresee(tokens, self._waiting - 1, self._waiting_tokens - tokens)
            raise _limited(late or denial or Denial("waiting", None)) from None
        finally:
            self._waiting -= 1
            self._waiting_tokens -= tokens

    async def _wait(self, tokens: int, remaining_s: float | None) -> RatePermit:
        until = None if remaining_s is None else self._clock.monotonic() + remaining_s
        async with self._line:
            while True:
                self._meter.changed.clear()
                answer = await self._meter.ask(tokens)
                if not isinstance(answer, Denial):
                    return self._admit(tokens, answer)
                wait_s = ASK_AGAIN_S if answer.wait_s is None else answer.wait_s
                is_known = answer.wait_s is not None
                if is_known and until is not None and self._clock.monotonic() + wait_s > until:
                    raise _limited(answer)
                try:
                    async with asyncio.timeout(wait_s):
                        await self._meter.changed.wait()
                except TimeoutError:
                    continue

    def _admit(self, tokens: int, answer: Permit | Denial) -> RatePermit:
        if isinstance(answer, Denial):
            raise _limited(answer)
        self._running += 1
        self._used.add(1, tokens, self._clock.monotonic())
        return RatePermit(answer, tokens, self._ended)

    def _ended(self, more_tokens: int) -> None:
        self._running -= 1
        self._used.add(0, more_tokens, self._clock.monotonic())

    def counters(self) -> list[pb.LimitCounter]:
        """For the report of each interval: what was used of the shared limit. Empty where it is not shared."""
        return self._meter.counters(self._waiting, self._waiting_tokens)

    def merge(self, counters: Sequence[pb.LimitCounter]) -> None:
        """Takes what the coordinator has told of the others (LimitsCommand), also where it is nothing."""
        self._meter.merge(counters)

    async def close(self) -> None:
        """Tells the coordinator what has ended, as far as it is there; to be called when nothing runs any more."""
        await self._meter.close()

    def status(self) -> remote_service_pb2.LimitStatus:
        """How much is used."""
        now = self._clock.monotonic()
        requests, tokens = self._used.totals(now)
        requests_per_minute, tokens_per_minute = self._meter.pace()
        status = remote_service_pb2.LimitStatus(
            key=self._key,
            configured=self._configured,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            requests_used=requests,
            tokens_used=tokens,
            concurrent_requests=self._running,
        )
        denial = self._meter.foresee(1, self._waiting, self._waiting_tokens)
        if denial is not None:
            wait_s = ASK_AGAIN_S if denial.wait_s is None else denial.wait_s
            status.retry_after.FromMicroseconds(round(wait_s * 1e6))
        return status


def open_rate_gate(
    limits: remote_options_pb2.RateLimits,
    key: str,
    incarnation: str,
    clock: Clock,
    stub: pb_grpc.CoordinatorServiceAsyncStub | None,
) -> RateGate:
    """The gate for what a deployment allows. `key` names the limit among all engines, `incarnation` this life of the engine.

    `stub` is None for an engine without a coordinator: the whole limit is its own then, in both modes.
    """
    quota = Quota(limits.requests_per_minute, limits.tokens_per_minute, limits.concurrent_requests)
    if quota == Quota():
        stub = None  # There is nothing to share.
    meter: Meter
    if limits.strict and stub is not None:
        meter = StrictMeter(stub, key, incarnation, limits, clock)
    else:
        now = clock.monotonic()
        shared = None if stub is None else SharedLimits(key, incarnation, now)
        meter = EngineMeter(EngineLimits(quota, shared, now), clock)
    return RateGate(key, limits, meter, clock)


def _limited(denial: Denial, why: str = "") -> ProviderError:
    wait_s = ASK_AGAIN_S if denial.wait_s is None else denial.wait_s
    return ProviderError(
        Failure.RATE_LIMITED,
        f"The limit '{denial.limit}' allows no more requests for now"
        + (f": {why}." if why else f"; the next one can go in {wait_s:.1f} s."),
        retry_after_s=wait_s,
        limit=denial.limit,
    )
