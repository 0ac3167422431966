"""How long a provider may take, phase by phase: to be reached, to begin its answer, and between two bytes of it (W28)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Final

from services.engine.remote.failure import Failure, ProviderError
from services.engine.remote.provider import Provider
from services.runtime.clock import Clock


class Phase(Enum):
    """What is waited for; the value is `waited_for` in the error table."""

    CONNECT = "connect"
    FIRST_BYTE = "first_byte"
    BETWEEN_BYTES = "between_bytes"


_MISSED: Final[Mapping[Phase, str]] = {
    Phase.CONNECT: "could not be reached",
    Phase.FIRST_BYTE: "did not begin its answer",
    Phase.BETWEEN_BYTES: "did not go on with its answer",
}


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Limits in seconds, None for none. There is no limit for a whole answer: a long one is not a stuck one."""

    connect_s: float | None = 5.0
    first_byte_s: float | None = 60.0
    between_bytes_s: float | None = 30.0

    def of(self, phase: Phase) -> float | None:
        """The limit of a phase."""
        if phase is Phase.CONNECT:
            return self.connect_s
        return self.first_byte_s if phase is Phase.FIRST_BYTE else self.between_bytes_s


class PhaseTimer:
    """Limits what one call waits for at the moment: what runs within `async with timer` ends with the time of the phase.

    A phase may span several such waits, and a phase that begins within one takes it over. Belongs to the task that waits.
    """

    def __init__(self, timeouts: Timeouts, provider: Provider, clock: Clock) -> None:
        self.timeouts = timeouts
        self._provider = provider
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._limit: asyncio.Timeout | None = None
        self.enter(Phase.CONNECT)

    def enter(self, phase: Phase) -> None:
        """From now on this is waited for."""
        self._phase = phase
        self._began = self._clock.monotonic()
        limit_s = self.timeouts.of(phase)
        self._ends = None if limit_s is None else self._loop.time() + limit_s
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(self._ends)

    async def __aenter__(self) -> None:
        self._limit = asyncio.timeout_at(self._ends)
        await self._limit.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Raises ProviderError (TIMEOUT) where the time was over."""
        limit, self._limit = self._limit, None
        assert limit is not None
        try:
            await limit.__aexit__(kind, error, trace)
        except TimeoutError:
            raise self._overdue() from None

    def _overdue(self) -> ProviderError:
        elapsed_ms = round((self._clock.monotonic() - self._began) * 1000)
        return ProviderError(
            Failure.TIMEOUT,
            f"{self._provider.title} {_MISSED[self._phase]} within {self.timeouts.of(self._phase):g} s.",
            waited_for=self._phase.value,
            elapsed_ms=str(elapsed_ms),
        )
