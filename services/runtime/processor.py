"""How busy the processor is, and how much of that is this process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")
# user, nice, system, irq, softirq: where /proc/stat(5) has them. idle and iowait are free; steal is not ours to yield to.
_BUSY_COLUMNS = (1, 2, 3, 6, 7)


@dataclass(frozen=True, slots=True)
class ProcessorUsage:
    """Processor time used up to `at`, in seconds: by everybody on the counted cores, and by this process."""

    at: float
    everybody: float
    own: float


def busy_seconds(stat: str, cores: frozenset[int], ticks_per_s: int) -> float:
    """Time that the cores were busy, from the text of /proc/stat. Pure."""
    ticks = 0
    for line in stat.splitlines():
        if not line.startswith("cpu"):
            break  # the lines of the cores come first
        columns = line.split()
        name = columns[0][3:]
        if name and int(name) in cores:
            ticks += sum(int(columns[column]) for column in _BUSY_COLUMNS)
    return ticks / ticks_per_s


def usage_reader(cores: frozenset[int]) -> Callable[[], ProcessorUsage] | None:
    """Reads the usage of these cores; None where the system does not tell (it is Linux that has /proc/stat)."""
    if not _STAT.exists():
        return None
    ticks_per_s = os.sysconf("SC_CLK_TCK")

    def read() -> ProcessorUsage:
        everybody = busy_seconds(_STAT.read_text(encoding="ascii"), cores, ticks_per_s)
        return ProcessorUsage(time.monotonic(), everybody, time.process_time())

    return read


def allowed_cores() -> frozenset[int]:
    """The cores that this process may run on."""
    return frozenset(os.sched_getaffinity(0))
