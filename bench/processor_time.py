"""What processes cost: CPU seconds of a process and all below it, and a core of its own for one of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil


def tree_cpu_s(pid: int) -> float:
    """CPU seconds, user and system, of a process and its descendants since they started, ended children included."""
    root = psutil.Process(pid)
    spent = 0.0
    for process in [root, *root.children(recursive=True)]:
        # One that ends just now is counted by the next look at its parent.
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            spent += times.user + times.system + times.children_user + times.children_system
    return spent


@contextlib.contextmanager
def core_of_its_own(pid: int, others: Iterable[int]) -> Iterator[int]:
    """Keeps all threads of `pid` on the last core, and those of this process and `others` off it; yields the core.

    On a machine with one core all share it. The end of the block lets them run everywhere again.
    """
    everywhere = os.sched_getaffinity(0)
    core = max(everywhere)
    rest = everywhere - {core} or everywhere
    others = [os.getpid(), *others]
    _pin(pid, {core})
    for other in others:
        _pin(other, rest)
    try:
        yield core
    finally:
        for process in [pid, *others]:
            _pin(process, everywhere)


def _pin(pid: int, cores: set[int]) -> None:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)
