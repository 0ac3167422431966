"""One child process: its own session, its log, the way it is ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from services.cli import log_files
from services.cli.plan import ProcessPlan


class Child:
    """A running process and all that it starts. When it ends, what it leaves in its group is killed.

    Its number, which is also that of its group, is nobody else's until it is waited for. So the group is killed before that,
    and nothing is signalled afterwards; asyncio's own subprocesses are waited for too early, in the background.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        """`process` leads a group of its own, and nobody else waits for it. To be called on the event loop."""
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._code: asyncio.Future[int] = self._loop.create_future()
        self._handle = os.pidfd_open(process.pid)
        self._loop.add_reader(self._handle, self._ended)

    @property
    def pid(self) -> int:
        """Its id, and that of its session and process group."""
        return self._process.pid

    def _ended(self) -> None:
        self.kill()
        self._loop.remove_reader(self._handle)
        os.close(self._handle)
        self._code.set_result(self._process.wait())

    async def wait(self) -> int:
        """Its exit code, once it has ended; a negative one is a signal."""
        return await asyncio.shield(self._code)

    def ask_to_end(self) -> None:
        """SIGTERM to the process itself, which ends its own children."""
        if not self._code.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the process and everything in its group."""
        if not self._code.done():
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


def start(plan: ProcessPlan, environment: Mapping[str, str], log: Path, *, first: bool) -> Child:
    """Starts the process in a session of its own, so that Ctrl-C in the terminal reaches `caravan up` alone.

    `first` begins a new log. Raises OSError if the program cannot be run.
    """
    descriptor = log_files.open_log(log) if first else log_files.reopen_log(log)
    try:
        process = subprocess.Popen(
            plan.argv,
            env=dict(environment) | dict(plan.environment),
            stdin=subprocess.DEVNULL,
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
