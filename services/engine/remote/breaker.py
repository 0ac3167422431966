"""Leaves a provider alone that fails again and again (S3.11, S3.12; W23, W24). Pure.

    closed -> open          `failure_threshold` failures in a row
    open -> half open       the time is over; made when somebody looks
    half open -> closed     the provider answers a probe
    half open -> open       a probe fails; twice as long as before, up to ten times `open_s`

Each state has a number. A permit remembers it, so what a call finds out counts only in the state in which it began: a late success of
an old call closes nothing. Nothing stays held: who got a permit ends it, cancelled or not, and a probe that takes longer than
`open_s` no longer keeps others from probing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final

from caravan.engine.v1 import remote_service_pb2 as pb

from services.engine.remote.failure import CIRCUIT_FAILURES, Failure, ProviderError

GROWTH_MAX: Final = 10
"""An open time is at most so many times the first."""
_NO_ANSWER: Final = frozenset({Failure.RATE_LIMITED, Failure.CIRCUIT_OPEN})
_PROBING_RETRY_S: Final = 1.0


class State(IntEnum):
    """Whether calls are made; the numbers are those of BreakerState."""

    CLOSED = pb.BREAKER_STATE_CLOSED
    OPEN = pb.BREAKER_STATE_OPEN
    HALF_OPEN = pb.BREAKER_STATE_HALF_OPEN


@dataclass(frozen=True, slots=True)
class BreakerConfig:
    """When to open, and for how long at first. A threshold of 0: never."""

    failure_threshold: int = 10
    open_s: float = 30.0
    half_open_max_probes: int = 1


@dataclass(frozen=True, slots=True)
class Transition:
    """A change of state. `why`: failures, time, probe_answered, probe_failed, forced or force_ended."""

    before: State
    after: State
    why: str


class CircuitOpenError(ProviderError):
    """No call was made. `retry_after_s` is when one may be again; `forced`: an operator wants none."""

    def __init__(self, retry_after_s: float, *, forced: bool = False) -> None:
        super().__init__(
            Failure.CIRCUIT_OPEN,
            "The operator has suspended calls to the provider of the model."
            if forced
            else "The provider of the model has failed too often lately, and is left alone for a while.",
            retry_after_s=retry_after_s,
        )


class Result(Enum):
    """What a call finds out about the provider."""

    ANSWERING = "answering"
    SUCCESS = "success"
    FAILURE = "failure"
    NOTHING = "nothing"


class Permit:
    """The right to make one call. The first of `succeed`, `fail`, `abandon` and `end` counts; later ones change nothing."""

    __slots__ = ("_breaker", "_ended", "generation")

    def __init__(self, breaker: Breaker, generation: int) -> None:
        self._breaker = breaker
        self._ended = False
        self.generation = generation
        """The number of the state that the call counts in."""

    def answering(self, now: float) -> None:
        """The provider has begun to answer: enough to close a half-open breaker, long before a long answer ends.

        What becomes of the answer then counts like that of any other call.
        """
        if not self._ended:
            self._breaker.count(self, Result.ANSWERING, now)

    def succeed(self, now: float) -> None:
        """The answer is complete."""
        self._end(Result.SUCCESS, now)

    def fail(self, now: float) -> None:
        """The provider is not well."""
        self._end(Result.FAILURE, now)

    def abandon(self, now: float) -> None:
        """Nothing was found out: the call was cancelled, or never made."""
        self._end(Result.NOTHING, now)

    def end(self, failure: Failure | None, now: float) -> None:
        """How the call ended; None: well.

        A provider that finds a mistake in the request or the credential is there, so that ends a half-open state; but it is no
        success that would outweigh failures. One that asks for fewer requests tells nothing.
        """
        if failure is None:
            self.succeed(now)
        elif failure in CIRCUIT_FAILURES:
            self.fail(now)
        else:
            if failure not in _NO_ANSWER:
                self.answering(now)
            self.abandon(now)

    def _end(self, result: Result, now: float) -> None:
        if not self._ended:
            self._ended = True
            self._breaker.count(self, result, now)


class Breaker:
    """The breaker of one endpoint. Times are monotonic seconds and never go back. `on_change` is called in the new state."""

    def __init__(self, config: BreakerConfig, on_change: Callable[[Transition], None]) -> None:
        self._config = config
        self._on_change = on_change
        self._state = State.CLOSED
        self._forced = False
        self._until = math.inf
        self._generation = 0
        self._failures = 0
        self._openings = 0
        self._probes: dict[Permit, float] = {}

    def acquire(self, now: float) -> Permit:
        """The permit for one call. Raises CircuitOpenError."""
        state = self.state(now)
        if state is State.OPEN:
            open_s = self._remaining(now) or self._config.open_s
            raise CircuitOpenError(open_s, forced=self._forced)
        permit = Permit(self, self._generation)
        if state is State.HALF_OPEN:
            overdue = [p for p, since in self._probes.items() if now - since >= self._config.open_s]
            for probe in overdue:
                del self._probes[probe]
            if len(self._probes) >= self._config.half_open_max_probes:
                raise CircuitOpenError(min(_PROBING_RETRY_S, self._config.open_s))
            self._probes[permit] = now
        return permit

    def state(self, now: float) -> State:
        """The state by now."""
        if now >= self._until:
            if self._forced:
                self._enter(State.CLOSED, "force_ended")
            else:
                self._enter(State.HALF_OPEN, "time")
        return self._state

    def status(self, now: float) -> pb.BreakerStatus:
        """What an operator sees."""
        status = pb.BreakerStatus(
            state=self.state(now).value, forced=self._forced, failures=self._failures
        )
        remaining = self._remaining(now)
        if remaining is not None:
            status.remaining.FromMicroseconds(round(remaining * 1e6))
        return status

    def force_open(self, now: float, duration_s: float | None) -> None:
        """No calls are made, for a while or (None) until it is told otherwise."""
        self._force(State.OPEN, now, duration_s)

    def force_closed(self, now: float, duration_s: float | None) -> None:
        """Calls are made, whatever fails, for a while or (None) until it is told otherwise."""
        self._force(State.CLOSED, now, duration_s)

    def automatic(self, now: float) -> None:
        """It goes by failures again, and starts closed."""
        self.state(now)
        self._openings = 0
        self._enter(State.CLOSED, "forced")

    def count(self, permit: Permit, result: Result, now: float) -> None:
        """What the holder of a permit found out. Permits call it."""
        self._probes.pop(permit, None)
        if permit.generation != self._generation or self._forced:
            return
        if result is Result.FAILURE:
            self._failures += 1
            if self._state is State.HALF_OPEN:
                self._open(now, "probe_failed")
            elif 0 < self._config.failure_threshold <= self._failures:
                self._open(now, "failures")
        elif result is not Result.NOTHING and self._state is State.HALF_OPEN:
            self._enter(State.CLOSED, "probe_answered")
            permit.generation = self._generation
        if result is Result.SUCCESS:
            self._failures = 0
            self._openings = 0

    # --- how -----------------------------------------------------------------------------------------------------

    def _open(self, now: float, why: str) -> None:
        self._openings += 1
        self._enter(State.OPEN, why, until=now + self._open_time())

    def _force(self, state: State, now: float, duration_s: float | None) -> None:
        self.state(now)
        self._openings = 0
        until = math.inf if duration_s is None else now + duration_s
        self._enter(state, "forced", until=until, forced=True)

    def _enter(
        self, state: State, why: str, *, until: float = math.inf, forced: bool = False
    ) -> None:
        before, self._state = self._state, state
        self._until = until
        self._forced = forced
        self._generation += 1
        self._probes.clear()
        if state is State.CLOSED:
            self._failures = 0
        if before is not state:
            self._on_change(Transition(before, state, why))

    def _open_time(self) -> float:
        # The count is cut before it is an exponent: a provider may be away for weeks.
        growth = 1 << min(max(self._openings - 1, 0), GROWTH_MAX)
        return self._config.open_s * min(growth, GROWTH_MAX)

    def _remaining(self, now: float) -> float | None:
        return None if math.isinf(self._until) else max(0.0, self._until - now)
