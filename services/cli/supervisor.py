"""Keeps processes running, and ends them in order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.cli import log_files, process
from services.cli.backoff import Backoff, BackoffPolicy, describe_exit
from services.cli.plan import STOP_ORDER, Plan, ProcessPlan
from services.cli.state_dir import Endpoints
from services.runtime.clock import Clock

_END_MARGIN_S: Final = 5.0
_CAP_INTERVAL_S: Final = 5.0


@dataclass(slots=True)
class _Kept:
    """A process that is kept. It `waits` between two lives, and is started again while it is `needed`."""

    planned: ProcessPlan
    keeper: asyncio.Task[None]
    needed: bool = True
    waits: bool = False
    ending: asyncio.Task[int] | None = None


class Supervisor:
    """The processes of a plan, and those that are added. `say` prints a line for the user; `draw` gives numbers within [0, 1)."""

    def __init__(
        self,
        plan: Plan,
        environment: Mapping[str, str],
        endpoints: Endpoints,
        *,
        clock: Clock,
        draw: Callable[[], float],
        say: Callable[[str], None],
        policy: BackoffPolicy | None = None,
    ) -> None:
        self._plan = plan
        self._environment = environment
        self._endpoints = endpoints
        self._clock = clock
        self._draw = draw
        self._say = say
        self._policy = policy or BackoffPolicy()
        self._children: dict[str, process.Child] = {}
        self._kept: dict[str, _Kept] = {}
        self._stopping = False
        self.deaths: dict[str, int] = {}
        """How often each process ended unasked, in a row."""
        self.codes: dict[str, int] = {}
        """Exit code of each process that ended unasked and has not been started again."""
        self.on_change: Callable[[], None] = lambda: None
        """Called after each start and end of a process, and when one is forgotten."""

    def start(self) -> None:
        """Starts the plan; returns at once."""
        for planned in self._plan.processes:
            self.add(planned)

    def add(self, planned: ProcessPlan) -> None:
        """Starts a process of a new name; returns at once. Nothing is started while all are being ended."""
        if not self._stopping:
            keeper = asyncio.create_task(self._keep(planned))
            self._kept[planned.name] = _Kept(planned, keeper)
            keeper.add_done_callback(lambda _: self._forget(planned.name))

    def keep(self, name: str, needed: bool) -> None:
        """Whether a process is started again when it ends; one that is not needed is forgotten then."""
        kept = self._kept[name]
        kept.needed = needed
        if kept.waits and not needed:
            kept.keeper.cancel()

    def end(self, name: str, grace_s: float) -> None:
        """Asks a process to end, and kills it after the grace; returns at once. To be called again until it is not known."""
        self.keep(name, needed=False)
        kept, child = self._kept[name], self._children.get(name)
        if child is not None and kept.ending is None:
            kept.ending = asyncio.create_task(child.end(grace_s + _END_MARGIN_S))

    def knows(self, name: str) -> bool:
        """Whether the process runs or is going to be started again."""
        return name in self._kept

    def _forget(self, name: str) -> None:
        if not self._stopping:
            del self._kept[name]
            self.deaths.pop(name, None)
            self.codes.pop(name, None)
            self.on_change()

    def log_of(self, name: str) -> Path:
        """The log file of a process."""
        return self._plan.options.state_dir / "logs" / f"{name}.log"

    def runs(self, name: str) -> bool:
        """Whether the process runs now."""
        return name in self._children

    async def _keep(self, planned: ProcessPlan) -> None:
        backoff = Backoff(self._policy, self._draw)
        first = True
        while not self._stopping:
            backoff.started(self._clock.monotonic())
            happened = await self._run_once(planned, first=first)
            first = False
            if self._stopping:
                return
            restart = backoff.died(self._clock.monotonic())
            kept = self._kept[planned.name]
            if not kept.needed:
                self._say(f"{planned.name} {happened}; it is needed no more")
                return
            self.deaths[planned.name] = restart.deaths
            self._say(f"{planned.name} {happened}; starting it again in {restart.delay:.1f} s")
            kept.waits = True
            await asyncio.sleep(restart.delay)
            kept.waits = False

    async def _run_once(self, planned: ProcessPlan, *, first: bool) -> str:
        log = self.log_of(planned.name)
        try:
            child = process.start(planned, self._environment, log, first=first)
        except OSError as error:
            return f"cannot be run ({error.strerror})"
        self._children[planned.name] = child
        self.codes.pop(planned.name, None)
        self._tell(lambda: self._endpoints.started(planned, child.pid))
        self.on_change()
        try:
            code = await child.wait()
        finally:
            del self._children[planned.name]
            self._tell(lambda: self._endpoints.ended(planned))
            self.on_change()
        if not self._stopping:
            self.codes[planned.name] = code
        return describe_exit(code)

    def _tell(self, write: Callable[[], None]) -> None:
        # A full disk must not end supervision.
        try:
            write()
        except OSError as error:
            self._say(f"endpoints.json is out of date: {error.strerror}")

    async def cap_logs(self, bytes_max: int) -> None:
        """Keeps the logs short, for ever."""
        while True:
            await asyncio.sleep(_CAP_INTERVAL_S)
            for path in [*map(self.log_of, self._kept), self._plan.access_log]:
                log_files.cap(path, bytes_max)

    async def stop(self, grace_s: float, close_door: Callable[[], Awaitable[None]]) -> None:
        """Ends everything, in order. `close_door` makes Envoy take no new requests and waits for those that run."""
        self._stopping = True
        await close_door()
        for kind in STOP_ORDER:
            names = [name for name, kept in self._kept.items() if kept.planned.kind == kind]
            ending = [self._end(name, grace_s + _END_MARGIN_S) for name in names]
            await asyncio.gather(*ending)

    async def _end(self, name: str, grace_s: float) -> None:
        child = self._children.get(name)
        if child is not None:
            await child.end(grace_s)
        keeper = self._kept[name].keeper
        if name not in self._children:
            keeper.cancel()  # it may wait to start the process again
        await asyncio.gather(keeper, return_exceptions=True)

    def kill_all(self) -> None:
        """Kills everything now; `stop` then ends at once."""
        self._stopping = True
        for child in self._children.values():
            child.kill()
