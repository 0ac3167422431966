"""Which deployment takes a request: the one that was asked for, or one of its fallbacks (S1.14, S1.18, S1.31). Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from services.coordinator import refusals
from services.coordinator.budgets import Budgets, Spent
from services.coordinator.deployment import CapacityPolicy, FallbackReason, OnExceeded
from services.coordinator.limits import Limits
from services.coordinator.models import ModelCatalogue, ModelRecord
from services.coordinator.waiting import Want
from services.runtime.errors import CaravanError


@dataclass(frozen=True, slots=True)
class Standing:
    """Whether a deployment takes a request `at_once`, or lets it wait; `reason` is why not at once.

    Where it `looks_on`, a fallback that takes it at once is better than waiting.
    """

    at_once: bool
    waits: bool = False
    reason: FallbackReason = FallbackReason.CAPACITY
    looks_on: bool = True


class Placement:
    """Finds the deployment for a request.

    Until `learning_until`, in monotonic seconds, a coordinator that has just started does not know which engines there are: a
    request waits for one to join, as it would for one that is busy.
    """

    def __init__(
        self,
        models: ModelCatalogue,
        limits: Limits,
        budgets: Budgets,
        of_tenant: Callable[[str, str], int],
        learning_until: float,
    ) -> None:
        """`of_tenant` counts the requests of a model and a tenant, those that wait included."""
        self._models = models
        self._limits = limits
        self._budgets = budgets
        self._of_tenant = of_tenant
        self._learning_until = learning_until

    def may_expect(self, want: Want) -> bool:
        """Whether the request may wait for a model that is not known."""
        is_learning = want.arrived_at < self._learning_until and not self._knows_deployments()
        # One that is resumed has run on it, so the model exists: its engine and an earlier coordinator are gone.
        return want.wait_s > 0 and (want.resumed or is_learning)

    def _knows_deployments(self) -> bool:
        """Whether it was told what is served, so that a name that is not among them is unknown, and not just early."""
        return any(model.rules is not None for model in self._models)

    def longest_wait(self, model: ModelRecord, want: Want) -> float:
        """Seconds that the request may wait for the model: its own limit, or the model's."""
        most = None if model.rules is None else model.rules.serving.max_wait_s
        return min(want.wait_s, self._limits.queue_s if most is None else most)

    def taker(self, want: Want, model: ModelRecord, now: float) -> str | None:
        """The name of the model that takes the request, at once or in its queue; None where none does.

        The fallbacks are gone along depth first, in their order, each model at most once. What could wait where it asked goes
        to a fallback only if that takes it at once.
        """
        seen = {model.name}

        def ask(asked: ModelRecord, *, at_once: bool) -> str | None:
            found = self._standing(asked, want, now)
            waits = found.waits and not at_once
            if found.at_once or (waits and not found.looks_on):
                return asked.name
            if (
                want.may_fall_back
                and asked.rules is not None
                and (found.looks_on or not found.waits)
            ):
                for fallback in asked.rules.fallback:
                    other = self._models.find(fallback.deployment)
                    if other is None or other.name in seen or found.reason not in fallback.reasons:
                        continue
                    seen.add(other.name)
                    taken = ask(other, at_once=at_once or found.waits)
                    if taken is not None:
                        return taken
            return asked.name if waits else None

        return ask(model, at_once=False)

    def _standing(self, model: ModelRecord, want: Want, now: float) -> Standing:
        """What the model says to the request, fallbacks aside."""
        if model.name in want.failed:
            return Standing(at_once=False, reason=want.failed[model.name])
        if self._spent(model, want, now):
            return Standing(at_once=False, reason=FallbackReason.BUDGET)
        may_wait = self.longest_wait(model, want) > 0
        may_queue = may_wait and (want.had_its_turn or not model.queue.is_full)
        if not model.ready_engines:
            # One that runs already waits for its engine to come back, and others while one that is ready may not have joined yet.
            is_learning = want.arrived_at < self._learning_until
            waits = may_queue and (want.resumed or is_learning)
            return Standing(at_once=False, waits=waits, reason=FallbackReason.UNAVAILABLE)
        if model.can_grant(want.avoid):
            return Standing(at_once=True)
        policy = CapacityPolicy.QUEUE
        if model.rules is not None:
            policy = model.rules.serving.on_capacity_exhausted
        if policy is CapacityPolicy.REJECT and not want.had_its_turn:
            may_queue = False
        looks_on = policy is CapacityPolicy.FALLBACK
        return Standing(at_once=False, waits=may_queue, looks_on=looks_on)

    def _spent(self, model: ModelRecord, want: Want, now: float) -> Spent | None:
        """The budget that keeps the request from the model. What runs already has been paid for in part, and goes on."""
        rules = model.rules
        if rules is None or want.resumed:
            return None
        policy = rules.budget.on_exceeded
        if policy is OnExceeded.REJECT:
            return self._budgets.spent(rules, want.tenant, now)
        if policy is OnExceeded.THROTTLE:
            # A deployment that is throttled has fewer places; a tenant that is gets at most half of them.
            spent = self._budgets.tenant_spent(rules, want.tenant, now)
            most = max(1, model.limit // 2)
            if spent is not None and self._of_tenant(model.name, want.tenant) >= most:
                return spent
        return None

    def refusal(self, want: Want, model: ModelRecord, now: float) -> CaravanError:
        """Why the model that was asked for does not take the request, and no fallback does."""
        failed = want.failed.get(model.name)
        if failed is not None:
            return refusals.failed(model, failed)
        spent = self._spent(model, want, now)
        return refusals.refusal(model) if spent is None else refusals.budget_spent(model, spent)
