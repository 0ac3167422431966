"""What the deployments have cost, by tenant (S1.23, S1.28, W12). Pure.

Engines tell what their requests have cost since their process started; each number only grows. The ledger adds what is more than
it knew of that life of the engine: a report that is lost, late or repeated does no harm, nor does a coordinator that starts anew
with a ledger of some seconds ago. What a life told before a ledger was lost counts once more from its first report on: a budget
must not be renewed by a crash.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from caravan.coordinator.v1 import coordinator_service_pb2 as pb

from services.coordinator.rolling_sum import DAY, HOUR, RollingSum

DEPLOYMENTS_MAX: Final = 1_024
TENANTS_MAX: Final = 10_000
"""Most tenants of a deployment; those that cost nothing within a day make room, and if there are none, new ones share one account."""
LIVES_MAX: Final = 4_096
OTHERS: Final = "*"
"""The account of the tenants that have none of their own; engines name those so of which they keep no counter."""
_MEMORY_S: Final = 86_400.0
"""For how long the counters of a life of an engine that tells nothing any more are kept."""


class Amounts(NamedTuple):
    """What requests have cost. The names are those of SpendCounter."""

    nanousd: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def told(cls, counter: pb.SpendCounter) -> Amounts:
        """The numbers of a counter."""
        return cls(
            counter.nanousd,
            counter.requests,
            counter.prompt_tokens,
            counter.cached_tokens,
            counter.completion_tokens,
        )

    def plus(self, other: Amounts) -> Amounts:
        """The sums."""
        return Amounts(
            self.nanousd + other.nanousd,
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
        )

    def beyond(self, known: Amounts) -> Amounts:
        """What is more than was known, number by number."""
        return Amounts(*(max(0, one - old) for one, old in zip(self, known, strict=True)))


@dataclass(slots=True)
class Account:
    """What was spent, and when. Amounts of money within the hour and the day are in billionths of a US dollar.

    `kept` is the account as it is kept in the file; None since it has changed.
    """

    total: Amounts = field(default_factory=Amounts)
    hour: RollingSum = field(default_factory=lambda: RollingSum(HOUR))
    day: RollingSum = field(default_factory=lambda: RollingSum(DAY))
    kept: dict[str, Any] | None = field(default=None, repr=False, compare=False)

    def add(self, amounts: Amounts, now: float) -> None:
        """Adds what was spent just now, in seconds since the epoch."""
        self.kept = None
        self.total = self.total.plus(amounts)
        if amounts.nanousd:
            self.hour.add(amounts.nanousd, now)
            self.day.add(amounts.nanousd, now)


@dataclass(slots=True)
class DeploymentSpend:
    """A deployment's account, and those of its tenants, the longest unused first."""

    own: Account = field(default_factory=Account)
    tenants: dict[str, Account] = field(default_factory=dict)

    def account_of(self, tenant: str) -> Account | None:
        """The account on which a tenant's requests are charged; None where nothing was."""
        return self.tenants.get(tenant) or self.tenants.get(OTHERS)

    def charge(self, tenant: str, amounts: Amounts, now: float) -> str:
        """Charges a tenant; returns the name of the account: its own, or that of all others."""
        self.own.add(amounts, now)
        account = self.tenants.pop(tenant, None)
        if account is None and len(self.tenants) >= TENANTS_MAX and not self._made_room(now):
            tenant = OTHERS
            account = self.tenants.pop(OTHERS, None)
        account = self.tenants[tenant] = account or Account()
        account.add(amounts, now)
        return tenant

    def _made_room(self, now: float) -> bool:
        """Whether the tenant that is unused for the longest could be counted among the others."""
        idle = next(name for name in self.tenants if name != OTHERS)
        if self.tenants[idle].day.sum(now):
            return False
        others = self.tenants.setdefault(OTHERS, Account())
        others.kept = None
        others.total = others.total.plus(self.tenants.pop(idle).total)
        return True


@dataclass(slots=True)
class Life:
    """What a life of an engine has told last, by tenant, and when, in seconds since the epoch."""

    told_at: float
    counters: dict[str, Amounts] = field(default_factory=dict)


class SpendLedger:
    """The accounts of all deployments. Times are in monotonic seconds.

    `wall_ahead_s` is how far the time since the epoch was ahead of them when the process started: so the wall clock may jump
    without moving what counts for the present hour.
    """

    def __init__(self, wall_ahead_s: float = 0.0) -> None:
        self._wall_ahead_s = wall_ahead_s
        self.deployments: OrderedDict[str, DeploymentSpend] = OrderedDict()
        self.lives: dict[str, Life] = {}
        self.changes = 0
        """Counts what has changed, for whoever keeps it."""

    def __iter__(self) -> Iterator[tuple[str, DeploymentSpend]]:
        """Sorted by name. Copies first, so that the metrics thread may iterate too."""
        return iter(sorted(self.deployments.items(), key=lambda item: item[0]))

    def find(self, deployment: str) -> DeploymentSpend | None:
        """The deployment's accounts; None where it has cost nothing."""
        return self.deployments.get(deployment)

    def epoch(self, now: float) -> float:
        """The time for the accounts: seconds since the epoch, on a clock that does not jump."""
        return now + self._wall_ahead_s

    def take(
        self, deployment: str, incarnation: str, counters: Iterable[pb.SpendCounter], now: float
    ) -> list[str]:
        """Takes a report of an engine; returns the names of the tenants' accounts that were charged money. O(counters)."""
        life, at = self.lives.get(incarnation), self.epoch(now)
        charged: list[str] = []
        for counter in counters:
            life = life or self._add_life(incarnation, at)
            told, known = Amounts.told(counter), life.counters.get(counter.tenant, Amounts())
            if told == known:
                continue
            new = told.beyond(known)
            life.counters[counter.tenant] = known.plus(new)
            if any(new):
                self.changes += 1
                account = self._deployment(deployment).charge(counter.tenant, new, at)
                if new.nanousd:
                    charged.append(account)
        if life is not None:
            life.told_at = at
        return charged

    def _add_life(self, incarnation: str, at: float) -> Life:
        if len(self.lives) >= LIVES_MAX:
            del self.lives[min(self.lives, key=lambda name: self.lives[name].told_at)]
        life = self.lives[incarnation] = Life(at)
        return life

    def _deployment(self, name: str) -> DeploymentSpend:
        # The longest unused comes first, and goes where there are too many.
        found = self.deployments.get(name)
        if found is not None:
            self.deployments.move_to_end(name)
            return found
        if len(self.deployments) >= DEPLOYMENTS_MAX:
            self.deployments.popitem(last=False)
        found = self.deployments[name] = DeploymentSpend()
        return found

    def expire(self, now: float) -> None:
        """Forgets the counters of lives that have told nothing for a day. O(lives)."""
        then = self.epoch(now) - _MEMORY_S
        for name in [name for name, life in self.lives.items() if life.told_at < then]:
            del self.lives[name]
            self.changes += 1

    def restore(
        self,
        deployments: Mapping[str, DeploymentSpend],
        lives: Mapping[str, Mapping[str, Amounts]],
        now: float,
    ) -> None:
        """Puts in what was kept before this process started; engines get a day from now to tell of themselves again."""
        self.deployments = OrderedDict(deployments)
        self.lives = {
            name: Life(self.epoch(now), dict(counters)) for name, counters in lives.items()
        }
