"""What follows from what engines say that their requests cost: accounts, and what is done where a budget is spent. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from caravan.coordinator.v1 import coordinator_service_pb2 as pb

from services.coordinator.admission import Admission
from services.coordinator.budgets import Budgets, Spent
from services.coordinator.deployment import Deployment, OnExceeded
from services.coordinator.effects import NOTHING, BudgetCrossing, Effects
from services.coordinator.engines import EngineRecord
from services.coordinator.models import ModelCatalogue, ModelRecord
from services.coordinator.spend_ledger import OTHERS, SpendLedger

_FORGET_EVERY_S = 60.0


class Costs:
    """Takes reports into the ledger, and tells once when a budget is spent and when it is not any more."""

    def __init__(
        self, ledger: SpendLedger, budgets: Budgets, models: ModelCatalogue, admission: Admission
    ) -> None:
        self.ledger = ledger
        self.budgets = budgets
        self._models = models
        self._admission = admission
        # Deployments (with tenant None) and tenants whose budget is spent, with the limit.
        self._over: dict[tuple[str, str | None], str] = {}
        self._forgot_at: float | None = None

    def report(
        self, engine: EngineRecord, counters: Iterable[pb.SpendCounter], now: float
    ) -> Effects:
        """An engine tells what its requests have cost since its process started. O(counters)."""
        charged = self.ledger.take(engine.model.name, engine.incarnation, counters, now)
        model = self._models.find(engine.model.name)
        if not charged or model is None or model.rules is None:
            return NOTHING
        effects = self._judge(model, now)
        for tenant in charged:
            told = self._judge_tenant(model.rules, tenant, now)
            if told is not NOTHING:  # As for nearly all.
                effects += told
        return effects

    def expire(self, now: float) -> Effects:
        """Judges anew what time, or another budget, has changed. O(deployments, and tenants whose budget is spent)."""
        effects = NOTHING
        for model in self._models:
            if model.rules is not None or model.is_throttled:
                effects += self._judge(model, now)
        for name, tenant in tuple(self._over):
            found = self._models.find(name)
            if found is None or found.rules is None:
                del self._over[name, tenant]
            elif tenant is not None:
                effects += self._judge_tenant(found.rules, tenant, now)
        if self._forgot_at is None or now - self._forgot_at >= _FORGET_EVERY_S:
            self.ledger.expire(now)
            self._forgot_at = now
        return effects

    def is_over(self, deployment: str) -> bool:
        """Whether the deployment's own budget is spent, as far as was told."""
        return (deployment, None) in self._over

    def _judge(self, model: ModelRecord, now: float) -> Effects:
        rules = model.rules
        spent = None if rules is None else self.budgets.own_spent(rules, now)
        throttles = rules is not None and rules.budget.on_exceeded is OnExceeded.THROTTLE
        effects = NOTHING
        if model.is_throttled != (spent is not None and throttles):
            effects += self._admission.throttle(model, now, is_throttled=not model.is_throttled)
        if rules is not None:
            effects += self._tell(rules, None, spent, now)
        return effects

    def _judge_tenant(self, rules: Deployment, tenant: str, now: float) -> Effects:
        spent = self.budgets.tenant_spent(rules, tenant, now)
        return self._tell(rules, tenant, spent, now)

    def _tell(
        self, rules: Deployment, tenant: str | None, spent: Spent | None, now: float
    ) -> Effects:
        """What is to be told; where a budget has just been spent, those that wait may have to go elsewhere."""
        key, policy = (rules.name, tenant), rules.budget.on_exceeded
        if (spent is not None) == (key in self._over):
            return NOTHING
        if spent is None:
            limit = self._over.pop(key)
            return Effects(crossings=(BudgetCrossing(*key, limit, policy, is_over=False),))
        self._over[key] = spent.limit
        effects = Effects(crossings=(BudgetCrossing(*key, spent.limit, policy, is_over=True),))
        if policy is OnExceeded.WARN or (policy is OnExceeded.THROTTLE and tenant is None):
            return effects
        # Who shares the account of all others is not known by name.
        whose = None if tenant == OTHERS else tenant
        return effects + self._admission.place_again(rules.name, whose, now)
