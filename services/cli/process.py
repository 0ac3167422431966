"""One child process: its own session, its log, the way it is ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path

from services.cli import log_files
from services.cli.plan import ProcessPlan


class Child:
    """A running process and all that it starts."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Its id, and that of its session and process group."""
        return self._process.pid

    async def wait(self) -> int:
        """Its exit code, once it has ended; a negative one is a signal."""
        return await self._process.wait()

    def ask_to_end(self) -> None:
        """SIGTERM to the process itself, which ends its own children."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """SIGKILL to the process and everything in its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def end(self, grace_s: float) -> int:
        """Asks it to end, kills it after the grace; returns its exit code."""
        self.ask_to_end()
        try:
            async with asyncio.timeout(grace_s):
                return await self.wait()
        except TimeoutError:
            self.kill()
            return await self.wait()


async def start(
    plan: ProcessPlan, environment: Mapping[str, str], log: Path, *, first: bool
) -> Child:
    """Starts the process in a session of its own, so that Ctrl-C in the terminal reaches `caravan up` alone.

    `first` begins a new log. Raises OSError if the program cannot be run.
    """
    descriptor = log_files.open_log(log) if first else log_files.reopen_log(log)
    try:
        process = await asyncio.create_subprocess_exec(
            *plan.argv,
            env=dict(environment) | dict(plan.environment),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
        )
    finally:
        os.close(descriptor)
    if plan.niceness:
        _set_niceness(process.pid, plan.niceness)
    return Child(process)


def _set_niceness(process_id: int, niceness: int) -> None:
    """At once, while the process has one thread: on Linux the threads it will start inherit it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpriority(os.PRIO_PROCESS, process_id, niceness)
    # Where the kernel groups processes by session, niceness counts within a session only, and each child has its own
    # (sched(7), the autogroup feature).
    with contextlib.suppress(OSError):
        Path(f"/proc/{process_id}/autogroup").write_text(str(niceness), encoding="ascii")
