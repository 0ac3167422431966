"""The engines of `caravan up` follow what the coordinator says, with real supervision of small processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from services.cli import ports
from services.cli.backoff import BackoffPolicy
from services.cli.fleet import Wanted
from services.cli.fleet_keeper import FleetKeeper
from services.cli.plan import EnginePlanner, Installation, Plan, ProcessPlan, UpOptions
from services.cli.settings import load_settings
from services.cli.state_dir import Endpoints
from services.cli.supervisor import Supervisor
from services.runtime.clock import SystemClock
from tests.support.waiting import wait_for

CHAT = Wanted("chat", "/v1.gguf", "1", replicas=2)
SLEEPS = (sys.executable, "-c", "import signal; signal.pause()")


class _Sleepers(EnginePlanner):
    """Plans processes that do nothing."""

    def plan(self, *arguments: object) -> ProcessPlan:
        return replace(super().plan(*arguments), argv=SLEEPS)  # type: ignore[arg-type]


class Rig:
    """A keeper, what it is told, and what it says."""

    def __init__(self, folder: Path, free: Callable[[int], bool]) -> None:
        options = UpOptions(9000, (), 1, folder)
        chosen = ports.pick_ports(9000, 0, lambda _: True)
        plan = Plan(options, chosen, folder / "e", folder / "a.log")
        self.said: list[str] = []
        self.supervisor = Supervisor(
            plan,
            os.environ,
            Endpoints(folder),
            clock=SystemClock(),
            draw=lambda: 0.5,
            say=self.said.append,
            policy=BackoffPolicy(first=0.01, most=0.05),
        )
        install = Installation("python", "envoy", folder)
        self.keeper = FleetKeeper(
            self.supervisor,
            _Sleepers(options, load_settings({}), chosen, install, 2),
            ports.EnginePorts(chosen, free),
            SystemClock(),
            self.said.append,
            grace_s=5,
            first=["slow"],
        )

    async def tell(self, *wanted: Wanted) -> None:
        """The coordinator says what it wants."""

        async def told() -> AsyncIterator[tuple[Wanted, ...]]:
            yield wanted

        await self.keeper.follow(told())

    async def running(self, *names: str) -> dict[str, str]:
        """Waits until just these engines run; their addresses."""

        def look() -> bool:
            self.keeper.reconcile()
            return {p.name for p in self.keeper.planned} >= set(names) and all(
                self.supervisor.runs(name) for name in names
            )

        async with asyncio.timeout(20):
            while not look():  # noqa: ASYNC110 - processes have no events here
                await asyncio.sleep(0.01)
        return {planned.name: planned.address for planned in self.keeper.planned}


async def _stop(rig: Rig) -> None:
    async def open_door() -> None:
        return None

    await rig.supervisor.stop(5, open_door)


async def test_engines_follow_the_deployments(tmp_path: Path) -> None:
    """A new revision gets engines beside the former, with other ports; the former are not started again; names come back."""
    rig = Rig(tmp_path, lambda _: True)
    await rig.tell(CHAT)
    before = await rig.running("engine-0", "engine-1")
    assert rig.keeper.rests
    rig.keeper.talks = True
    await rig.tell(replace(CHAT, revision="2", former_engines=2))
    after = await rig.running("engine-2", "engine-3")
    assert set(after) == {"engine-2", "engine-3"}
    assert not rig.keeper.rests  # the former are waited for
    assert not set(before.values()) & set(after.values())
    assert "starting engine-2 for chat (revision 2)" in rig.said
    pids = {name: rig.supervisor._children[name].pid for name in before}
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(
        wait_for, lambda: not any(map(rig.supervisor.knows, before)), "the former are gone"
    )
    await rig.tell(replace(CHAT, revision="2", replicas=3))
    assert (await rig.running("engine-0"))["engine-0"] == before["engine-0"]
    await rig.tell(replace(CHAT, revision="2", replicas=1))
    await asyncio.to_thread(
        wait_for, lambda: not rig.supervisor.knows("engine-0"), "the surplus is gone"
    )
    await _stop(rig)


async def test_the_order_is_that_of_the_command(tmp_path: Path) -> None:
    """Models of the command line come first, in their order; the others by name."""
    rig = Rig(tmp_path, lambda _: True)
    await rig.tell(Wanted("chat", "/v1", "1"), Wanted("slow", "/v1", "1"))
    assert [planned.model for planned in rig.keeper.planned] == ["slow", "chat"]
    await _stop(rig)


async def test_no_ports_are_told_once(tmp_path: Path) -> None:
    """It is tried again all the time, and said once; what could be started runs."""
    free = {20_001, 20_002}

    def is_free(port: int) -> bool:
        return port in free

    rig = Rig(tmp_path, is_free)
    await rig.tell(CHAT)
    for _ in range(3):
        rig.keeper.reconcile()
    assert [
        line for line in rig.said if line.startswith("no engine can be started for chat")
    ] == rig.said
    assert len(rig.said) == 1
    assert not rig.keeper.rests
    await rig.running("engine-0")
    await _stop(rig)


@pytest.mark.parametrize("wanted", [(), (replace(CHAT, replicas=0),)])
async def test_nothing_to_run(tmp_path: Path, wanted: tuple[Wanted, ...]) -> None:
    """No deployments, or none with replicas: known, and empty."""
    rig = Rig(tmp_path, lambda _: True)
    assert rig.keeper.wanted is None
    await rig.tell(*wanted)
    assert rig.keeper.wanted == wanted
    assert not rig.keeper.planned
    assert rig.keeper.rests
    await _stop(rig)
