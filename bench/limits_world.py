"""Engines that share a limit, their coordinator and what is lost between them, on a simulated clock (the real modules of both)."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from caravan.coordinator.v1 import coordinator_service_pb2 as pb

from services.coordinator.shared_limits import SharedLimits as CoordinatorSharedLimits
from services.coordinator.strict_limits import StrictLimits
from services.engine.remote.limits import EngineLimits
from services.engine.remote.shared_limits import SharedLimits
from services.runtime.rate_limiter import Quota

KEY: Final = "provider/key/model"
EPOCH_BEGIN: Final = 1_750_000_000.0
"""The wall clock at the start of the simulation."""
REPORT_S: Final = 1.0
SWEEP_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Sent:
    """A request that went to the provider at `at` seconds, and the tokens that it used."""

    at: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Work:
    """What requests are like: tokens that are expected, the part of these that is used, and seconds that they take."""

    expected: tuple[int, int] = (500, 500)
    used: tuple[float, float] = (1.0, 1.0)
    duration_s: tuple[float, float] = (1.0, 4.0)


@dataclass(slots=True)
class Network:
    """Messages between engines and coordinator: the time that each takes, and the part that is lost."""

    delay_s: tuple[float, float] = (0.01, 0.3)
    loss: float = 0.05


class World:
    """One limit. Times are seconds from the start. `offered(engine, now)` is requests per second that ask at an engine.

    `lost(engine, now)` tells whether a message from or to an engine is lost; None: at random, as the network says.
    """

    def __init__(
        self,
        quota: Quota,
        offered: Callable[[int, float], float],
        *,
        seed: int,
        strict: bool = False,
        work: Work = Work(),
        network: Network | None = None,
        lost: Callable[[int, float], bool] | None = None,
    ) -> None:
        self.quota = quota
        self.sent: list[Sent] = []
        self.asked = 0
        self.random = random.Random(seed)
        self.work = work
        self.network = network or Network()
        self.lost = lost or self._lost
        self.offered = offered
        self.now = 0.0
        self.coordinator = CoordinatorSharedLimits()
        self.strict = StrictLimits(unsure_until=-1.0, rejoin_s=8.0) if strict else None
        self.engines: dict[int, Engine] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def _lost(self, _engine: int, _now: float) -> bool:
        return self.random.random() < self.network.loss

    def at(self, when: float, do: Callable[[], None]) -> None:
        """Something will happen."""
        heapq.heappush(self._events, (when, next(self._numbers), do))

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        """Something will happen in so many seconds."""
        self.at(self.now + seconds, do)

    def between(self, bounds: tuple[float, float]) -> float:
        """A random number."""
        return self.random.uniform(*bounds)

    def join(self, number: int) -> None:
        """An engine starts."""
        self.engines[number] = Engine(self, number)

    def leave(self, number: int) -> None:
        """An engine is killed."""
        self.engines.pop(number).die()

    def run(self, until: float) -> None:
        """Lets things happen for so long."""
        self.after(SWEEP_S, self._sweep)
        while self._events and self._events[0][0] <= until:
            self.now, _, do = heapq.heappop(self._events)
            do()
        self.now = until

    def _sweep(self) -> None:
        self.coordinator.expire(self.now)
        if self.strict is not None:
            self.strict.expire(self.now)
        self.after(SWEEP_S, self._sweep)


@dataclass(slots=True)
class Engine:
    """One engine: requests ask at random times and are refused where they cannot go at once."""

    world: World
    number: int
    is_alive: bool = True
    session: int = field(init=False)
    life: str = field(init=False)
    limits: EngineLimits = field(init=False)
    _permits: int = 0

    def __post_init__(self) -> None:
        world = self.world
        self.session = world.random.getrandbits(48)
        self.life = f"life-{self.number}-{self.session}"
        self.limits = EngineLimits(world.quota, SharedLimits(KEY, self.life, world.now), world.now)
        world.coordinator.joined(self.session, self.life)
        if world.strict is not None:
            world.strict.joined(self.life)
        world.after(world.random.random() * REPORT_S, self._report)
        self._next()

    def die(self) -> None:
        """It ends, and the coordinator sees the end of its stream."""
        self.is_alive = False
        self.world.coordinator.left(self.session, self.world.now)
        if self.world.strict is not None:
            self.world.strict.left(self.life, self.world.now)

    def _next(self) -> None:
        rate = self.world.offered(self.number, self.world.now)
        if rate > 0:
            self.world.after(self.world.random.expovariate(rate), self._ask)
        else:
            self.world.after(0.1, self._next)

    def _ask(self) -> None:
        if not self.is_alive:
            return
        world = self.world
        world.asked += 1
        tokens = world.random.randint(*world.work.expected)
        if world.strict is not None:
            self._ask_strictly(tokens)
        else:
            self.limits.want(tokens, world.now, EPOCH_BEGIN + world.now)
            if self.limits.find_denial(tokens, world.now) is None:
                self.limits.reserve(tokens, world.now, EPOCH_BEGIN + world.now)
                used = self._send(tokens)
                world.after(world.between(world.work.duration_s), lambda: self._end(tokens, used))
        self._next()

    def _send(self, tokens: int) -> int:
        used = round(tokens * self.world.between(self.world.work.used))
        self.world.sent.append(Sent(self.world.now, used))
        return used

    def _end(self, tokens: int, used: int) -> None:
        self.limits.settle(tokens, used, self.world.now, EPOCH_BEGIN + self.world.now)

    def _ask_strictly(self, tokens: int) -> None:
        world, strict = self.world, self.world.strict
        assert strict is not None
        self._permits += 1
        permit_id = f"{self.life}-{self._permits}"
        retry_s = strict.acquire(
            permit_id, KEY, self.life, quota=world.quota, tokens=tokens, now=world.now
        )
        if not retry_s:
            used = self._send(tokens)
            world.after(
                world.between(world.work.duration_s),
                lambda: self._end_strictly(permit_id, used),
            )

    def _end_strictly(self, permit_id: str, used: int) -> None:
        assert self.world.strict is not None
        self.world.strict.settle(permit_id, used, self.world.now)

    def _report(self) -> None:
        if not self.is_alive:
            return
        world = self.world
        counters = self.limits.counters(0, 0, world.now, EPOCH_BEGIN + world.now)
        if not world.lost(self.number, world.now):
            world.after(world.between(world.network.delay_s), lambda: self._reported(counters))
        world.after(REPORT_S, self._report)

    def _reported(self, counters: Sequence[pb.LimitCounter]) -> None:
        world = self.world
        if not self.is_alive or not world.coordinator.take(self.session, counters, world.now):
            return
        told = world.coordinator.told(self.session)
        if not world.lost(self.number, world.now):
            world.after(
                world.between(world.network.delay_s), lambda: self.limits.merge(told, world.now)
            )


def most_within(sent: Sequence[Sent], span_s: float, *, tokens: bool) -> int:
    """The most requests, or tokens, in any half-open span of so many seconds."""
    most = total = first = 0
    for one in sent:
        total += one.tokens if tokens else 1
        while one.at - sent[first].at >= span_s:
            total -= sent[first].tokens if tokens else 1
            first += 1
        most = max(most, total)
    return most


def within(sent: Sequence[Sent], begin: float, end: float, *, tokens: bool) -> int:
    """Requests, or tokens, from `begin` to before `end`."""
    return sum(one.tokens if tokens else 1 for one in sent if begin <= one.at < end)
