"""Whether a deployment, or a tenant's part of it, has cost what it may (S1.23). Pure.

What runs is never ended for its cost, so a budget may be exceeded by what runs when it is spent, and by what engines have not
told yet: their reports are at most an interval apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from services.coordinator.deployment import Budget, Deployment
from services.coordinator.rolling_sum import RollingSum
from services.coordinator.spend_ledger import Account, SpendLedger

_NANO = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Spent:
    """A limit of a budget that is reached, by its name, such as `usd_per_hour`; `tenant` is whose part it is, None for all."""

    limit: str
    tenant: str | None
    window: RollingSum
    limit_nanousd: int
    at: float

    def retry_after_s(self) -> float:
        """Seconds until enough has left the hour or the day, if nothing is added. O(buckets of it)."""
        return self.window.seconds_until_below(self.limit_nanousd, self.at)


class Budgets:
    """Compares what was spent with what may be. O(1) for each question; times are in monotonic seconds."""

    def __init__(self, ledger: SpendLedger) -> None:
        self._ledger = ledger

    def spent(self, deployment: Deployment, tenant: str, now: float) -> Spent | None:
        """The limit that is reached for a request of the tenant; None where it may go on."""
        return self.own_spent(deployment, now) or self.tenant_spent(deployment, tenant, now)

    def own_spent(self, deployment: Deployment, now: float) -> Spent | None:
        """The limit that all tenants together have reached."""
        found = self._ledger.find(deployment.name)
        if found is None:
            return None
        return self._reached(_own_limits(deployment.budget, found.own), None, now)

    def tenant_spent(self, deployment: Deployment, tenant: str, now: float) -> Spent | None:
        """The limit that the tenant has reached; those without an account of their own share one."""
        found = self._ledger.find(deployment.name)
        account = None if found is None else found.account_of(tenant)
        if account is None:
            return None
        return self._reached(_tenant_limits(deployment.budget, account), tenant, now)

    def _reached(
        self, limits: Iterator[tuple[str, float, RollingSum]], tenant: str | None, now: float
    ) -> Spent | None:
        at = self._ledger.epoch(now)
        for name, usd, window in limits:
            limit = max(1, round(usd * _NANO))
            if usd > 0 and window.sum(at) >= limit:
                return Spent(name, tenant, window, limit, at)
        return None


def _own_limits(budget: Budget, account: Account) -> Iterator[tuple[str, float, RollingSum]]:
    # The day first: it takes longer to pass.
    yield "usd_per_day", budget.usd_per_day, account.day
    yield "usd_per_hour", budget.usd_per_hour, account.hour


def _tenant_limits(budget: Budget, account: Account) -> Iterator[tuple[str, float, RollingSum]]:
    yield "tenant_usd_per_day", budget.tenant_usd_per_day, account.day
    yield "tenant_usd_per_hour", budget.tenant_usd_per_hour, account.hour
