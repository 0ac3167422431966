"""How far the start is: what the probes saw, and what follows from it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from services.cli.fleet import Wanted
from services.cli.plan import ProcessPlan

_START_POLL_S: Final = 0.2
_CHANGE_POLL_S: Final = 2.0
REST_POLL_S: Final = 60.0
"""What rests changes by the death of a process or by what the coordinator tells, and either asks for a look at once."""
TRIES_MAX: Final = 5
"""Deaths in a row before the first READY after which a process counts as unable to start."""


class Phase(Enum):
    """What an engine does."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True)
class EngineView:
    """An engine as last seen; `progress` is within [0, 1], `failure` says why it failed."""

    phase: Phase = Phase.STARTING
    progress: float = 0.0
    failure: str = ""


@dataclass(frozen=True)
class Seen:
    """What one round of probes found. `routable` are the models for which the coordinator has a ready engine."""

    engines: Mapping[str, EngineView]
    routable: frozenset[str]
    door_open: bool


@dataclass(frozen=True)
class Verdict:
    """What follows. `failed` are deployments that cannot become ready, each with the reason."""

    ready: bool
    failed: Mapping[str, str]
    waiting: tuple[str, ...]

    @property
    def hopeless(self) -> bool:
        """Whether no deployment can become ready."""
        return bool(self.failed) and not self.ready and not self.waiting


def judge(
    wanted: Collection[Wanted] | None, engines: Collection[ProcessPlan], seen: Seen
) -> Verdict:
    """READY is: Envoy's health check passes, and each deployment has a ready engine or is known to be unable to get one.

    `wanted` is None until the coordinator has told it; `engines` are those of the current revisions.
    """
    if wanted is None:
        return Verdict(ready=False, failed={}, waiting=("the coordinator",))
    failed: dict[str, str] = {}
    waiting: list[str] = []
    # Those without replicas wait for engines that others start.
    awaited = [each.name for each in wanted if each.replicas]
    for name in awaited:
        if name in seen.routable:
            continue
        views = [seen.engines.get(e.name, EngineView()) for e in engines if e.model == name]
        if views and all(view.phase is Phase.FAILED for view in views):
            failed[name] = views[0].failure
        else:
            waiting.append(name)
    some_ready = not awaited or len(failed) < len(awaited)
    ready = seen.door_open and not waiting and some_ready
    if some_ready and not waiting and not seen.door_open:
        waiting.append("the gateway")
    return Verdict(ready, failed, tuple(waiting))


def look_again_s(verdict: Verdict, seen: Seen, *, announced: bool, fleet_rests: bool) -> float:
    """Seconds until the probes look again, if nothing happens before; REST_POLL_S when nothing is under way.

    `announced` is whether everything was ready once, `fleet_rests` whether the engines that run are those that are wanted.
    """
    if verdict.waiting or not announced:
        return _START_POLL_S
    settled = all(view.phase in {Phase.READY, Phase.FAILED} for view in seen.engines.values())
    return REST_POLL_S if settled and fleet_rests else _CHANGE_POLL_S


def status_line(engines: Collection[ProcessPlan], seen: Seen, step: float = 0.01) -> str:
    """One line on all engines and the gateway, such as `demo (engine-0) loading 45% · gateway starting`.

    The share that is loaded is told in multiples of `step`.
    """
    parts = []
    for planned in engines:
        view = seen.engines.get(planned.name, EngineView())
        text = f"{planned.model} ({planned.name}) {view.phase.value}"
        if view.phase is Phase.LOADING:
            text += f" {int(view.progress / step + 1e-6) * step:.0%}"
        parts.append(text)
    parts.append("gateway ready" if seen.door_open else "gateway starting")
    return " · ".join(parts)
