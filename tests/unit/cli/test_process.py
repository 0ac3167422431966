"""The end of a child and of what it leaves, with real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from services.cli import process
from services.cli.plan import ProcessPlan
from tests.support.waiting import wait_for

LEAVES_ONE = """
import subprocess, sys, time
sleeper = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(99)"
left = subprocess.Popen([sys.executable, "-c", sleeper], stdout=subprocess.PIPE)
left.stdout.readline()
print(left.pid, flush=True)
"""
QUIET = "import time; time.sleep(99)"


def _start(tmp_path: Path, code: str) -> process.Child:
    plan = ProcessPlan("p", "engine", (sys.executable, "-c", code), {}, "p:1", "http://p")
    return process.start(plan, os.environ, tmp_path / "p.log", first=True)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_what_a_child_leaves_is_killed_before_its_number_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the child is still waited for, its group can be nobody else's; afterwards nothing is signalled any more."""
    killed: list[tuple[int, str]] = []

    def kill_group(group: int, number: int) -> None:
        killed.append((group, psutil.Process(group).status()))
        really_kill(group, number)

    really_kill = os.killpg
    monkeypatch.setattr(os, "killpg", kill_group)
    child = _start(tmp_path, LEAVES_ONE)
    assert await child.wait() == 0
    assert killed == [(child.pid, psutil.STATUS_ZOMBIE)]
    left = int((tmp_path / "p.log").read_text())
    await asyncio.to_thread(wait_for, lambda: not _runs(left), "it is gone")
    assert not psutil.pid_exists(child.pid)
    child.kill()
    child.ask_to_end()
    assert await child.end(0.1) == 0
    assert len(killed) == 1


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_the_code_tells_how_a_child_ended(tmp_path: Path, how: signal.Signals) -> None:
    """Also to several who wait, of whom one gives up."""
    child = _start(tmp_path, QUIET)
    waits = [asyncio.create_task(child.wait()) for _ in range(2)]
    await asyncio.sleep(0)
    waits[0].cancel()
    child.ask_to_end() if how == signal.SIGTERM else child.kill()
    assert await waits[1] == await child.wait() == -how
