"""Starts and ends the engines of `caravan up` as the coordinator's deployments change."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from services.cli.fleet import Fleet, Running, Wanted
from services.cli.plan import EnginePlanner, ProcessPlan
from services.cli.ports import EnginePorts, NoFreePortError
from services.cli.supervisor import Supervisor
from services.runtime.clock import Clock


@dataclass(frozen=True)
class _Engine:
    number: int
    planned: ProcessPlan
    running: Running


class FleetKeeper:
    """The engines of one `caravan up`.

    `say` prints a line for the user; `grace_s` is for engines beyond what is wanted; deployments of the
    names in `first` come first, in that order.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        planner: EnginePlanner,
        ports: EnginePorts,
        clock: Clock,
        say: Callable[[str], None],
        *,
        grace_s: float,
        first: Sequence[str],
    ) -> None:
        self._supervisor = supervisor
        self._planner = planner
        self._ports = ports
        self._clock = clock
        self._say = say
        self._grace_s = grace_s
        self._rank = {name: rank for rank, name in enumerate(first)}
        self._fleet = Fleet()
        self._engines: dict[str, _Engine] = {}
        self._refused = ""
        self.wanted: tuple[Wanted, ...] | None = None
        """The deployments; None until the coordinator has told them."""
        self.talks = False
        """Whether starts and ends are told; the first ones are not news."""
        self.rests = False
        """Whether the last `reconcile` found nothing to start, to end or to wait for."""

    @property
    def planned(self) -> tuple[ProcessPlan, ...]:
        """The engines that the current revisions of the deployments need, in the order of their start."""
        current = {(each.name, each.revision) for each in self.wanted or ()}
        return tuple(
            engine.planned
            for engine in self._engines.values()
            if (engine.running.deployment, engine.running.revision) in current
        )

    async def follow(self, told: AsyncIterator[tuple[Wanted, ...]]) -> None:
        """Does what each message asks for, until there are no more."""
        async for wanted in told:
            rank = self._rank
            self.wanted = tuple(sorted(wanted, key=lambda each: rank.get(each.name, len(rank))))
            self.reconcile()

    def reconcile(self) -> None:
        """Brings the engines closer to what is wanted; to be called when processes have ended, and from time to time until it `rests`."""
        self._forget_ended()
        if self.wanted is None:
            return
        running = [engine.running for engine in self._engines.values()]
        orders = self._fleet.orders(self.wanted, running, self._clock.monotonic())
        self.rests = not (orders.start or orders.end or orders.let_go)
        for name in self._engines:
            self._supervisor.keep(name, needed=name not in orders.let_go)
        for name in orders.end:
            self._supervisor.end(name, self._grace_s)
        for wanted in orders.start:
            if not self._start(wanted, self.wanted):
                return

    def _forget_ended(self) -> None:
        for name in [name for name in self._engines if not self._supervisor.knows(name)]:
            self._ports.give_back(self._engines.pop(name).number)

    def _start(self, wanted: Wanted, everything: tuple[Wanted, ...]) -> bool:
        try:
            listens = self._ports.take()
        except NoFreePortError as error:
            refused = f"no engine can be started for {wanted.name}: {error}"
            if refused != self._refused:  # it is tried again all the time, and told once
                self._say(refused)
            self._refused = refused
            return False
        planned = self._planner.plan(wanted, everything, listens)
        running = Running(planned.name, wanted.name, wanted.revision)
        self._engines[planned.name] = _Engine(listens.number, planned, running)
        if self.talks:
            self._say(f"starting {planned.name} for {wanted.name} (revision {wanted.revision})")
        self._supervisor.add(planned)
        return True
