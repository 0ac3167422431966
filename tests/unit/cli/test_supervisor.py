"""Supervision of real processes, small ones."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from services.cli import ports
from services.cli.backoff import BackoffPolicy
from services.cli.plan import Kind, Plan, ProcessPlan, UpOptions
from services.cli.state_dir import Endpoints
from services.cli.supervisor import Supervisor
from services.runtime import lifeline
from services.runtime.clock import SystemClock
from tests.support.waiting import wait_for

WAITS = "import signal; print('up', flush=True); signal.sigwait({signal.SIGTERM})"
STUBBORN = (
    "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True); signal.pause()"
)
QUICK = BackoffPolicy(first=0.01, most=0.05, stable=60)


def _process(name: str, kind: Kind, code: str) -> ProcessPlan:
    # SIGTERM is blocked for WAITS, so that sigwait sees it.
    block = (
        "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {15} if 'sigwait' in CODE else ())"
    )
    argv = (sys.executable, "-c", f"CODE = {code!r}\n{block}\nexec(CODE)")
    return ProcessPlan(name, kind, argv, {}, f"{name}:1", f"http://{name}")


def _supervisor(
    tmp_path: Path, *processes: ProcessPlan, said: list[str] | None = None
) -> Supervisor:
    options = UpOptions(1, (), 1, tmp_path)
    plan = Plan(options, ports.default_ports(1), tmp_path / "e", tmp_path / "a.log", processes)
    say = (said if said is not None else []).append
    return Supervisor(
        plan,
        os.environ,
        Endpoints(tmp_path),
        clock=SystemClock(),
        draw=lambda: 0.5,
        say=say,
        policy=QUICK,
    )


async def _until(look: Callable[[], object], what: str) -> None:
    await asyncio.to_thread(wait_for, look, what)


async def _open_door() -> None:
    return None


def _pids(tmp_path: Path) -> dict[str, int]:
    path = tmp_path / "endpoints.json"
    if not path.exists():
        return {}
    return {p["name"]: p["pid"] for p in json.loads(path.read_text())["processes"]}


def _is_up(supervisor: Supervisor, name: str, times: int = 1) -> bool:
    log = supervisor.log_of(name)
    return log.exists() and log.read_text().count("up\n") == times


async def _listed(tmp_path: Path, supervisor: Supervisor, times: int = 1) -> int:
    """The number of the gateway's process, once it has started so often: its first word may come before its entry."""
    await _until(lambda: _is_up(supervisor, "gateway", times), "the process runs")
    await _until(lambda: "gateway" in _pids(tmp_path), "the process is listed")
    return _pids(tmp_path)["gateway"]


async def test_what_dies_comes_back(tmp_path: Path) -> None:
    """A killed process is started again, its death is told, and endpoints.json has its new number."""
    said: list[str] = []
    supervisor = _supervisor(tmp_path, _process("gateway", "gateway", WAITS), said=said)
    changes: list[bool] = []
    supervisor.on_change = lambda: changes.append(supervisor.runs("gateway"))
    supervisor.start()
    before = await _listed(tmp_path, supervisor)
    os.kill(before, signal.SIGKILL)
    assert await _listed(tmp_path, supervisor, times=2) != before
    assert "gateway was ended by SIGKILL" in said[0]
    assert changes == [True, False, True]
    await supervisor.stop(5, _open_door)
    assert _pids(tmp_path) == {}


async def test_a_program_that_cannot_be_run_is_tried_again(tmp_path: Path) -> None:
    """A missing program is told, not raised, and waited for like a death."""
    said: list[str] = []
    missing = ProcessPlan("envoy", "envoy", (str(tmp_path / "none"),), {}, "a", "b")
    supervisor = _supervisor(tmp_path, missing, said=said)
    supervisor.start()
    await _until(lambda: len(said) >= 2, "two tries")
    assert "cannot be run" in said[0]
    await supervisor.stop(5, _open_door)


async def test_a_full_disk_does_not_end_supervision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When endpoints.json cannot be written that is told, and processes still come back."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Endpoints, "_write", full)
    said: list[str] = []
    supervisor = _supervisor(tmp_path, _process("gateway", "gateway", WAITS), said=said)
    supervisor.start()
    await _until(lambda: _is_up(supervisor, "gateway"), "the process runs")
    os.kill(supervisor._children["gateway"].pid, signal.SIGKILL)
    await _until(lambda: _is_up(supervisor, "gateway", 2), "it runs again")
    assert "No space left" in said[0]
    await supervisor.stop(5, _open_door)


async def test_the_end_comes_in_order(tmp_path: Path) -> None:
    """Envoy goes first, the coordinator last, and the door is closed before either."""
    order: list[str] = []
    kinds: tuple[Kind, ...] = ("coordinator", "engine", "gateway", "envoy")
    supervisor = _supervisor(tmp_path, *(_process(kind, kind, WAITS) for kind in kinds))
    supervisor.start()
    for kind in kinds:
        await _until(lambda name=kind: _is_up(supervisor, name), f"{kind} runs")  # type: ignore[misc]
    await _until(lambda: len(_pids(tmp_path)) == len(kinds), "all are listed")

    async def close_door() -> None:
        assert len(_pids(tmp_path)) == 4
        order.append("door")

    async def watch() -> None:
        left = set(kinds)
        while left:
            for name in sorted(left - set(_pids(tmp_path))):
                order.append(name)
                left.remove(name)
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    await supervisor.stop(5, close_door)
    await watching
    assert order == ["door", "envoy", "gateway", "engine", "coordinator"]


async def test_who_does_not_listen_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ignores SIGTERM is killed after the grace; nothing is left and nothing comes back."""
    monkeypatch.setattr("services.cli.supervisor._END_MARGIN_S", 0.1)
    supervisor = _supervisor(tmp_path, _process("gateway", "gateway", STUBBORN))
    supervisor.start()
    pid = await _listed(tmp_path, supervisor)
    await supervisor.stop(0.1, _open_door)
    assert not psutil.pid_exists(pid)


async def test_kill_all_ends_a_running_stop(tmp_path: Path) -> None:
    """The second Ctrl-C does not wait for the grace."""
    supervisor = _supervisor(tmp_path, _process("gateway", "gateway", STUBBORN))
    supervisor.start()
    await _until(lambda: _is_up(supervisor, "gateway"), "the process runs")
    stopping = asyncio.create_task(supervisor.stop(600, _open_door))
    await asyncio.sleep(0)
    supervisor.kill_all()
    async with asyncio.timeout(5):
        await stopping
    assert _pids(tmp_path) == {}


async def test_a_stop_while_waiting_to_restart_ends_at_once(tmp_path: Path) -> None:
    """A process that waits for its next try is not started any more."""
    said: list[str] = []
    supervisor = _supervisor(
        tmp_path, _process("gateway", "gateway", "raise SystemExit(3)"), said=said
    )
    supervisor._policy = BackoffPolicy(first=600, most=600, stable=60)
    supervisor.start()
    await _until(lambda: said, "it died")
    async with asyncio.timeout(5):
        await supervisor.stop(5, _open_door)
    assert supervisor.codes == {"gateway": 3}
    assert len(said) == 1


def test_the_lifeline_ends_what_is_marked() -> None:
    """When the parent's end of the pipe closes, marked processes end, stubborn ones too; others live."""
    mark = f"CARAVAN_TEST_MARK=m{os.getpid()}"
    name, _, value = mark.partition("=")
    keeper = [sys.executable, "-I", "-S", lifeline.__file__, mark]
    child = [sys.executable, "-c", STUBBORN]
    with (
        subprocess.Popen(child, env={**os.environ, name: value}, stdout=subprocess.PIPE) as marked,
        subprocess.Popen(child, env=os.environ, stdout=subprocess.PIPE) as other,
        subprocess.Popen(keeper, stdin=subprocess.PIPE) as line,
    ):
        try:
            for process in (marked, other):
                assert process.stdout is not None
                assert process.stdout.readline() == b"up\n"
            assert lifeline.marked(mark) == [marked.pid]
            assert line.stdin is not None
            line.stdin.close()
            assert marked.wait(10) == -signal.SIGKILL
            assert line.wait(10) == 0
            assert other.poll() is None
        finally:
            marked.kill()
            other.kill()


def test_the_lifeline_leaves_in_peace() -> None:
    """A parent that has ended its processes itself says so, and nothing is searched for."""
    keeper = [sys.executable, "-I", "-S", lifeline.__file__, "CARAVAN_TEST_MARK=none"]
    done = subprocess.run(keeper, input=b".", timeout=10, check=False)
    assert done.returncode == 0


def _grouped_by_session() -> bool:
    switch = Path("/proc/sys/kernel/sched_autogroup_enabled")
    return switch.exists() and switch.read_text().strip() == "1"


async def test_niceness_counts_between_the_children(tmp_path: Path) -> None:
    """A child with a niceness has it, and so has its session where the kernel groups by session."""
    nice = replace(_process("gateway", "gateway", WAITS), niceness=7)
    supervisor = _supervisor(tmp_path, nice)
    supervisor.start()
    pid = await _listed(tmp_path, supervisor)
    await _until(lambda: os.getpriority(os.PRIO_PROCESS, pid) == 7, "it is nice")
    if _grouped_by_session():
        group = Path(f"/proc/{pid}/autogroup")
        await _until(lambda: group.read_text().rstrip().endswith("nice 7"), "so is its session")
    await supervisor.stop(5, _open_door)


async def test_what_is_not_needed_does_not_come_back(tmp_path: Path) -> None:
    """It runs until it ends by itself, and is forgotten then; one that is needed again in time comes back."""
    said: list[str] = []
    supervisor = _supervisor(tmp_path, said=said)
    for name in ("engine-0", "engine-1"):
        supervisor.add(_process(name, "engine", WAITS))
    await _until(lambda: _is_up(supervisor, "engine-0"), "the first runs")
    await _until(lambda: _is_up(supervisor, "engine-1"), "the second runs")
    await _until(lambda: len(_pids(tmp_path)) == 2, "both are listed")
    pids = _pids(tmp_path)
    for name in pids:
        supervisor.keep(name, needed=False)
    supervisor.keep("engine-1", needed=True)
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    await _until(lambda: not supervisor.knows("engine-0"), "the first is forgotten")
    await _until(lambda: _is_up(supervisor, "engine-1", 2), "the second runs again")
    assert "engine-0 was ended by SIGKILL; it is needed no more" in said
    supervisor.add(_process("engine-0", "engine", WAITS))
    await _until(lambda: _is_up(supervisor, "engine-0"), "its name can be used again")
    await supervisor.stop(5, _open_door)


async def test_what_waits_to_come_back_is_forgotten_at_once(tmp_path: Path) -> None:
    """A process that dies again and again is not waited for when nobody needs it."""
    said: list[str] = []
    supervisor = _supervisor(tmp_path, said=said)
    supervisor._policy = BackoffPolicy(first=600, most=600, stable=60)
    supervisor.add(_process("engine-0", "engine", "raise SystemExit(3)"))
    await _until(lambda: said, "it died")
    supervisor.keep("engine-0", needed=False)
    async with asyncio.timeout(5):
        while supervisor.knows("engine-0"):  # noqa: ASYNC110 - its end has no event
            await asyncio.sleep(0)
    assert (supervisor.codes, supervisor.deaths) == ({}, {})
    await supervisor.stop(5, _open_door)


async def test_an_end_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process is ended among others, and killed where it does not listen; asking again does no harm."""
    monkeypatch.setattr("services.cli.supervisor._END_MARGIN_S", 0.1)
    supervisor = _supervisor(tmp_path)
    supervisor.add(_process("engine-0", "engine", STUBBORN))
    supervisor.add(_process("engine-1", "engine", WAITS))
    await _until(lambda: _is_up(supervisor, "engine-0"), "the first runs")
    await _until(lambda: _is_up(supervisor, "engine-1"), "the second runs")
    await _until(lambda: len(_pids(tmp_path)) == 2, "both are listed")
    for _ in range(3):
        supervisor.end("engine-0", 0.1)
    await _until(lambda: not supervisor.knows("engine-0"), "it is gone")
    assert list(_pids(tmp_path)) == ["engine-1"]
    await supervisor.stop(5, _open_door)
