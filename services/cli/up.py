"""`caravan up`: starts everything, says when it is ready, keeps it running, stops it in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from typing import Final

from services.cli import ports, probes, state_dir
from services.cli.deployment_watch import watch_deployments
from services.cli.display import Display, ready_text
from services.cli.fleet import Wanted
from services.cli.fleet_keeper import FleetKeeper
from services.cli.log_files import last_lines
from services.cli.plan import OWNER_KEY, EnginePlanner, Plan, ProcessPlan, UpOptions
from services.cli.prepare import FAILED, OK, WRONG_USE, StartError, installation, prepare
from services.cli.progress import (
    REST_POLL_S,
    TRIES_MAX,
    EngineView,
    Phase,
    Seen,
    Verdict,
    judge,
    look_again_s,
    status_line,
)
from services.cli.settings import UpSettings
from services.cli.supervisor import Supervisor
from services.runtime import lifeline
from services.runtime.clock import Clock, random_fraction, random_id
from services.runtime.process import REFUSED
from services.runtime.server import cancel_all

_FILES_MAX: Final = 65_536
_LOG_LINES_MAX: Final = 20


@contextlib.contextmanager
def _lifeline(mark: str) -> Iterator[None]:
    """Ends the children if this process dies without doing it itself."""
    argv = [sys.executable, "-I", "-S", lifeline.__file__, mark]
    with subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as keeper:
        try:
            yield
        finally:
            assert keeper.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                keeper.stdin.write(
                    b"."
                )  # everything has ended; closing the pipe then ends the keeper
                keeper.stdin.flush()


def _raise_file_limit() -> None:
    """Each client takes a descriptor in Envoy; the usual soft limit of 1024 is below the limits of its configuration."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, _FILES_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Up:
    """One run of `caravan up`."""

    def __init__(
        self,
        plan: Plan,
        settings: UpSettings,
        environ: Mapping[str, str],
        clock: Clock,
        display: Display,
    ) -> None:
        self._plan = plan
        self._settings = settings
        self._display = display
        # A line that is rewritten may change at every percent; plain lines would fill a log.
        self._step = 0.01 if display.terminal else 0.25
        self._endpoints = state_dir.Endpoints(plan.options.state_dir)
        self._supervisor = Supervisor(
            plan,
            environ,
            self._endpoints,
            clock=clock,
            draw=random_fraction,
            say=display.say,
        )
        planner = EnginePlanner(
            plan.options, settings, plan.ports, installation(), len(os.sched_getaffinity(0))
        )
        self._fleet = FleetKeeper(
            self._supervisor,
            planner,
            ports.EnginePorts(plan.ports, ports.is_free),
            clock,
            display.say,
            grace_s=settings.drain_grace_s,
            first=[model.name for model in plan.options.models],
        )
        self._probes: probes.Probes | None = None
        # Something has happened that is worth a look.
        self._news = asyncio.Event()
        self._supervisor.on_change = self._news.set
        self._stop_asked = asyncio.Event()

    async def run(self) -> int:
        """Runs until it is asked to stop, or until it cannot start; returns the exit code."""
        self._listen_to_signals()
        self._probes = probes.Probes(self._plan)
        self._supervisor.start()
        capping = asyncio.create_task(self._supervisor.cap_logs(self._settings.log_bytes_max))
        following = asyncio.create_task(self._fleet.follow(self._deployments()))
        watching = asyncio.create_task(self._watch())
        asked = asyncio.create_task(self._stop_asked.wait())
        try:
            tasks = {following, watching, asked}
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return self._code(following if following.done() else watching)
        finally:
            await cancel_all((capping, following, watching, asked))
            await self._stop()
            await self._probes.close()

    def _code(self, working: asyncio.Task[None]) -> int:
        self._display.done()
        if not working.done():
            self._display.say("Stopping: what runs is finished first; Ctrl-C again stops at once.")
            return OK
        try:
            working.result()
        except StartError as error:
            self._display.say(f"caravan up: {error}")
            return error.code
        raise AssertionError("neither following nor watching ends by itself")

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self._stop_asked.is_set():
            self._display.say("Stopping at once.")
            self._supervisor.kill_all()
        self._stop_asked.set()

    async def _stop(self) -> None:
        grace = self._settings.drain_grace_s
        await self._supervisor.stop(grace, lambda: probes.close_door(self._plan, grace))
        self._endpoints.remove()
        self._display.say("Stopped.")

    async def _deployments(self) -> AsyncIterator[tuple[Wanted, ...]]:
        (coordinator,) = self._plan.of_kind("coordinator")
        async for wanted in watch_deployments(coordinator.address):
            self._news.set()
            yield wanted

    async def _watch(self) -> None:
        """Shows the progress until everything is ready, then what happens to engines that were started again."""
        announced = False
        before: dict[str, Phase] = {}
        once_ready: set[str] = set()
        # Those whose first READY is no news: it belongs to the start.
        started: set[str] = set()
        while True:
            self._news.clear()
            self._fleet.reconcile()
            engines = self._fleet.planned
            seen = await self._look(engines)
            verdict = judge(self._fleet.wanted, engines, seen)
            if not announced:
                self._give_up_if_hopeless(verdict)
                self._display.progress(status_line(engines, seen, self._step))
                started = set(seen.engines)
                if verdict.ready:
                    announced = self._fleet.talks = True
                    self._announce(verdict)
            else:
                self._tell_changes(before, seen.engines, once_ready, started)
            before = {name: view.phase for name, view in seen.engines.items()}
            once_ready |= {name for name, phase in before.items() if phase is Phase.READY}
            rests = self._fleet.rests
            await self._pause(look_again_s(verdict, seen, announced=announced, fleet_rests=rests))

    async def _pause(self, pause_s: float) -> None:
        """Until there is news, or the time is over."""
        assert self._probes is not None
        if pause_s >= REST_POLL_S:
            await self._probes.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._news.wait()

    async def _look(self, engines: Collection[ProcessPlan]) -> Seen:
        assert self._probes is not None
        views = await asyncio.gather(*(self._probes.engine(planned) for planned in engines))
        found = dict(zip((planned.name for planned in engines), views, strict=True))
        for name, view in found.items():
            code = self._supervisor.codes.get(name)
            dead = code == REFUSED or self._supervisor.deaths.get(name, 0) >= TRIES_MAX
            if view.phase is Phase.STARTING and code is not None and dead:
                lines = last_lines(self._supervisor.log_of(name), 1)
                found[name] = EngineView(Phase.FAILED, failure=" ".join(lines) or f"code {code}")
        return Seen(found, await self._probes.routable_models(), await self._probes.door_open())

    def _give_up_if_hopeless(self, verdict: Verdict) -> None:
        """Before everything was ready once, what cannot start is the user's to mend. Raises StartError."""
        for planned in self._plan.processes:
            code = self._supervisor.codes.get(planned.name)
            tries = self._supervisor.deaths.get(planned.name, 0)
            if code is None:
                continue
            if code == REFUSED or tries >= TRIES_MAX:
                log = self._supervisor.log_of(planned.name)
                lines = "".join(
                    f"\n  {line}" for line in dict.fromkeys(last_lines(log, _LOG_LINES_MAX))
                )
                raise StartError(
                    f"{planned.name} cannot start (code {code}); {log} ends with:{lines}",
                    WRONG_USE if code == REFUSED else FAILED,
                )
        if verdict.hopeless:
            reasons = "".join(f"\n  {name}: {why}" for name, why in verdict.failed.items())
            raise StartError(f"no model can be served:{reasons}", FAILED)

    def _announce(self, verdict: Verdict) -> None:
        self._display.done()
        for name, why in verdict.failed.items():
            self._display.say(f"Model {name} cannot be served: {why}")
        wanted = [each for each in self._fleet.wanted or () if not each.is_removed]
        served = {each.name: each.replicas for each in wanted if each.name not in verdict.failed}
        self._display.say(ready_text(self._plan, served))

    def _tell_changes(
        self,
        before: Mapping[str, Phase],
        now: Mapping[str, EngineView],
        once_ready: Collection[str],
        started: Collection[str],
    ) -> None:
        for name, view in now.items():
            if view.phase is before.get(name):
                continue
            if view.phase is Phase.READY and name in once_ready:
                self._display.say(f"{name} is ready again")
            elif view.phase is Phase.READY and name not in started:
                self._display.say(f"{name} is ready")
            if view.phase is Phase.FAILED:
                self._display.say(f"{name} failed: {view.failure}")


def up(
    options: UpOptions,
    settings: UpSettings,
    environ: Mapping[str, str],
    clock: Clock,
    display: Display,
) -> int:
    """Runs the command; returns the exit code: 0 stopped as asked, 1 no model could be served, 2 wrong use or a taken port."""
    try:
        with state_dir.owned(options.state_dir):
            plan = prepare(options, settings)
            _raise_file_limit()
            owner = random_id("up")
            marked = {**environ, OWNER_KEY: owner}
            with _lifeline(f"{OWNER_KEY}={owner}"):
                return asyncio.run(Up(plan, settings, marked, clock, display).run())
    except (StartError, state_dir.StateDirError) as error:
        display.say(f"caravan up: {error}")
        return error.code if isinstance(error, StartError) else WRONG_USE
