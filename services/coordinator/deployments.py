"""The deployments that are kept: applying and removing them, and what becomes of their engines (S1.24, W10).

Pure. Names without a deployment are none of its business: engines that were started by hand serve them with the defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator import refusals
from services.coordinator.deployment import Deployment
from services.coordinator.deployment_changes import Change, ChangeKind, diff, revision
from services.coordinator.deployment_rules import Mistake, find_mistakes
from services.coordinator.deployment_status import Status, describe, describe_removed
from services.coordinator.effects import NOTHING, Effects
from services.coordinator.engines import READY_PHASES, EngineRecord
from services.coordinator.lineage import Lineage
from services.coordinator.rollout import Decision, Member, Standing, decide, decide_removed
from services.coordinator.waiting import Want
from services.runtime.errors import CaravanError

_STANDINGS: Final = {
    engine_pb.ENGINE_PHASE_DRAINING: Standing.DRAINING,
    engine_pb.ENGINE_PHASE_FAILED: Standing.FAILED,
    **dict.fromkeys(READY_PHASES, Standing.READY),
}


class Requests(Protocol):
    """What deployments ask of the admission of requests."""

    def set_rules(self, name: str, rules: Deployment | None, now: float, wall: float) -> Effects:
        """The rules for a model; None: the defaults."""
        ...

    def hold_back(self, engine: EngineRecord, held_back: bool, now: float) -> Effects:
        """Whether an engine gets no new leases."""
        ...

    def refuse_waiting(
        self, name: str, error: CaravanError, now: float, *, only_begun: bool = False
    ) -> Effects:
        """Refuses those that wait for a model, or those of them whose answer has begun."""
        ...


@dataclass(slots=True)
class KeptDeployment:
    """A deployment, the engines that have joined under its name by session, and where it stands.

    `created_at` is in seconds since the epoch. `replaced` is whether it has had another revision, `shifted` whether the current
    one has taken over.
    """

    deployment: Deployment
    revision: str
    created_at: float
    removed: bool = False
    replaced: bool = False
    shifted: bool = False
    status: Status = field(default_factory=Status)
    engines: dict[int, EngineRecord] = field(default_factory=dict)
    members: dict[int, Member] = field(default_factory=dict)


class Deployments:
    """All deployments by name. `drain` tells an engine to drain and to stop, and gives the effects of that."""

    def __init__(
        self,
        requests: Requests,
        engines: Iterable[EngineRecord],
        drain: Callable[[EngineRecord, float], Effects],
    ) -> None:
        self._requests = requests
        self._engines = engines
        self._drain = drain
        self._kept: dict[str, KeptDeployment] = {}
        self._lineage = Lineage()
        self.on_change: Callable[[], None] = lambda: None
        """Called after each change of what iterating shows."""

    def __iter__(self) -> Iterator[KeptDeployment]:
        """Sorted by name, those that were removed and still have engines included."""
        # `sorted` copies first, so the metrics thread may iterate too.
        return iter(sorted(self._kept.values(), key=lambda kept: kept.deployment.name))

    def __len__(self) -> int:
        return len(self._kept)

    def current(self) -> Mapping[str, Deployment]:
        """Those that were not removed, by name."""
        return {name: kept.deployment for name, kept in self._kept.items() if not kept.removed}

    def created_at(self, name: str) -> float | None:
        """When the deployment was first applied, since the epoch; None where it is new or was removed."""
        kept = self._kept.get(name)
        return None if kept is None or kept.removed else kept.created_at

    def admit(self, want: Want) -> Want:
        """The request, kept from engines of other revisions where its answer has begun.

        Raises CaravanError: MODEL_NOT_FOUND where its deployment was removed, ENGINE_LOST where another revision has taken over.
        """
        kept = self._kept.get(want.model)
        if kept is None:
            return want
        if kept.removed:
            raise refusals.unknown_model(want.model)
        began = self._lineage.of(want.avoid) if want.has_begun else frozenset()
        if not began or "" in began:
            return want
        if kept.shifted and kept.revision not in began:
            raise refusals.replaced(want.model)
        others = (e.incarnation for e in kept.engines.values() if e.revision not in began)
        return replace(want, avoid=want.avoid.union(others), revisions=began)

    # --- applying ------------------------------------------------------------------------------------------------

    def check(
        self, wanted: Sequence[Deployment], *, remove_others: bool
    ) -> tuple[tuple[Change, ...], list[Mistake]]:
        """What applying would change, and what is wrong with it."""
        current = self.current()
        mistakes = find_mistakes(wanted, {} if remove_others else current)
        return diff(current, wanted, remove_others=remove_others), mistakes

    def apply(
        self, wanted: Sequence[Deployment], *, remove_others: bool, now: float, wall: float
    ) -> Effects:
        """Makes the deployments what is given; `check` has found no mistake in it."""
        effects = NOTHING
        by_name = {deployment.name: deployment for deployment in wanted}
        changes = diff(self.current(), wanted, remove_others=remove_others)
        for change in changes:
            if change.kind is ChangeKind.REMOVED:
                effects += self._remove(change.name, now)
            elif change.kind is not ChangeKind.UNCHANGED:
                effects += self._put(by_name[change.name], now, wall)
        self.on_change()
        return effects

    def restore(self, deployment: Deployment, created_at: float, now: float) -> Effects:
        """Puts in one that was kept before this process started."""
        return self._put(deployment, now, created_at)

    def dependents(self, name: str) -> list[str]:
        """Deployments that fall back to this one, sorted."""
        return sorted(
            deployment.name
            for deployment in self.current().values()
            if any(fallback.deployment == name for fallback in deployment.fallback)
        )

    def remove(self, name: str, now: float) -> Effects:
        """Drains and removes one that is kept and has no dependents."""
        effects = self._remove(name, now)
        self.on_change()
        return effects

    def _put(self, deployment: Deployment, now: float, wall: float) -> Effects:
        name, anew = deployment.name, revision(deployment)
        kept = self._kept.get(name)
        if kept is None:
            kept = self._kept[name] = KeptDeployment(deployment, anew, wall)
            for engine in self._engines:
                if engine.model.name == name:
                    self._take(kept, engine)
        elif kept.removed:
            kept.removed, kept.created_at, kept.shifted = False, wall, False
        if kept.revision != anew:
            kept.replaced, kept.shifted = True, False
        kept.deployment, kept.revision = deployment, anew
        return self._requests.set_rules(name, deployment, now, wall) + self._decide(kept, now)

    def _remove(self, name: str, now: float) -> Effects:
        kept = self._kept[name]
        kept.removed = True
        refused = self._requests.refuse_waiting(name, refusals.unknown_model(name), now)
        return refused + self._decide(kept, now)

    # --- engines -------------------------------------------------------------------------------------------------

    def engine_changed(self, engine: EngineRecord, now: float) -> Effects:
        """An engine has joined or reported, or was drained by command or put back. O(1) where its standing is what it was."""
        kept = self._kept.get(engine.model.name)
        if kept is None or not self._take(kept, engine):
            return NOTHING
        return self._decide(kept, now)

    def engine_gone(self, engine: EngineRecord, now: float) -> Effects:
        """The session of an engine is over."""
        kept = self._kept.get(engine.model.name)
        if kept is None:
            return NOTHING
        del kept.members[engine.session], kept.engines[engine.session]
        return self._decide(kept, now)

    def _take(self, kept: KeptDeployment, engine: EngineRecord) -> bool:
        """Notes the standing of an engine; tells whether it is another."""
        standing = _STANDINGS.get(engine.load.phase, Standing.LOADING)
        if engine.is_drained:
            standing = Standing.DRAINING
        before = kept.members.get(engine.session)
        if before is not None and before.standing is standing:
            return False
        self._lineage.note(engine.incarnation, engine.revision)
        told = before is not None and before.told
        kept.members[engine.session] = Member(engine.session, engine.revision, standing, told)
        kept.engines[engine.session] = engine
        return True

    def _decide(self, kept: KeptDeployment, now: float) -> Effects:
        members = kept.members.values()
        if kept.removed:
            decision = decide_removed(members)
        else:
            decision = decide(
                kept.revision, kept.deployment.replicas, members, shifted=kept.shifted
            )
        effects = NOTHING
        if decision.shifted and not kept.shifted and kept.replaced:
            # What waits to go on with an answer began it on a former revision.
            name = kept.deployment.name
            error = refusals.replaced(name)
            effects = self._requests.refuse_waiting(name, error, now, only_begun=True)
        kept.shifted = decision.shifted
        effects += self._hold_back(kept, decision, now)
        for session in decision.drained:
            member = kept.members[session]
            kept.members[session] = replace(member, standing=Standing.DRAINING, told=True)
            effects += self._drain(kept.engines[session], now)
        if kept.removed and not kept.members:
            del self._kept[kept.deployment.name]
            effects += self._requests.set_rules(kept.deployment.name, None, now, kept.created_at)
            self.on_change()
        else:
            self._describe(kept)
        return effects

    def _hold_back(self, kept: KeptDeployment, decision: Decision, now: float) -> Effects:
        effects = NOTHING
        # Those that may serve come first: at no moment is there none.
        for session in sorted(kept.engines, key=decision.held_back.__contains__):
            engine, held_back = kept.engines[session], session in decision.held_back
            if engine.is_held_back != held_back:
                effects += self._requests.hold_back(engine, held_back, now)
        return effects

    def _describe(self, kept: KeptDeployment) -> None:
        members = tuple(kept.members.values())
        if kept.removed:
            status = describe_removed(members)
        else:
            failures = [
                engine.load.failure or "no reason given"
                for session, engine in kept.engines.items()
                if kept.members[session].standing is Standing.FAILED
                and engine.revision in {kept.revision, ""}
            ]
            status = describe(kept.revision, kept.deployment.replicas, members, failures)
        if status != kept.status:
            kept.status = status
            self.on_change()

    def check_integrity(self) -> None:
        """Asserts that the engines are those that have joined, and that a removed deployment has some. O(n), for tests."""
        joined = {engine.session: engine.model.name for engine in self._engines}
        for name, kept in self._kept.items():
            assert kept.members.keys() == kept.engines.keys()
            assert set(kept.members) == {session for session in joined if joined[session] == name}
            assert kept.members or not kept.removed, name
            usable = {
                session
                for session, member in kept.members.items()
                if member.standing is Standing.READY and not member.told
            }
            held_back = {session for session in usable if kept.engines[session].is_held_back}
            assert kept.removed or not usable or usable != held_back, name
