"""How many threads compute, so that a busy machine does not stop them. Pure.

The threads of llama.cpp meet at some hundred barriers per token. When another process holds a core, the thread that lost
it holds up all others; an engine is therefore faster, and far smoother, on the cores that nobody else uses: beside two
busy processes on two cores, one thread gave 36 tokens/s and a p99 step of 35 ms, two gave 22 and 57 (`python -m
bench.neighbour`).
"""

from __future__ import annotations

from services.runtime.processor import ProcessorUsage

INTERVAL_S = 0.25
"""Time between looks. The kernel counts in 10 ms, so this is exact to 4 %."""

STALE_S = 2.0
"""An engine that was idle so long learns nothing from what was before."""

YIELD_CORES = 0.45
"""So much of a core may others use before it is left to them: about where one thread less is as fast."""

RETURN_CORES = 0.25
"""So little of a core must others use before it is taken again. Below YIELD_CORES, so that it does not go to and fro."""


class FreeCores:
    """Decides on at most `most` threads, on `cores` cores; begins with all."""

    def __init__(self, most: int, cores: int) -> None:
        if not 1 <= most <= cores:
            raise ValueError("between one thread and one per core")
        self._most = most
        self._cores = cores
        self._last: ProcessorUsage | None = None
        self.threads = most

    def due(self, now: float) -> bool:
        """Whether to look again; `now` is of the clock of ProcessorUsage.at."""
        return self._last is None or now - self._last.at >= INTERVAL_S

    def observe(self, usage: ProcessorUsage) -> int:
        """Takes what was used up to now; returns the threads to use from here on."""
        last, self._last = self._last, usage
        if last is None or not 0 < usage.at - last.at <= STALE_S:
            return self.threads
        others = (usage.everybody - last.everybody) - (usage.own - last.own)
        free = self._cores - max(0.0, others) / (usage.at - last.at)
        if (fewer := int(free + YIELD_CORES)) < self.threads:
            self.threads = max(1, fewer)
        elif (more := int(free + RETURN_CORES)) > self.threads:
            self.threads = min(self._most, more)
        return self.threads
