"""What the deployments have cost, as GetCosts tells it."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Final

from caravan.coordinator.v1 import coordinator_service_pb2 as pb

from services.coordinator.budgets import Budgets
from services.coordinator.deployment import Deployment
from services.coordinator.deployment_messages import to_budget
from services.coordinator.spend_ledger import Account, DeploymentSpend, SpendLedger

_TENANTS_MAX: Final = 100
_UINT64_MAX: Final = (1 << 64) - 1


def to_costs(
    ledger: SpendLedger, budgets: Budgets, deployments: Mapping[str, Deployment], now: float
) -> pb.GetCostsResponse:
    """Those that have cost something or have a budget, sorted by name. `now` is in monotonic seconds."""
    told: list[pb.DeploymentCosts] = []
    for name in sorted({*deployments, *ledger.deployments}):
        spend, rules = ledger.find(name), deployments.get(name)
        budget = None if rules is None else to_budget(rules.budget)
        if spend is None and budget is None:
            continue
        spend = spend or DeploymentSpend()
        told.append(
            pb.DeploymentCosts(
                deployment=name,
                total=_costs(spend.own, ledger.epoch(now)),
                tenants=_tenants(spend, budgets, rules, ledger.epoch(now), now),
                budget=budget,
                exceeded=rules is not None and budgets.own_spent(rules, now) is not None,
            )
        )
    return pb.GetCostsResponse(deployments=told)


def _tenants(
    spend: DeploymentSpend, budgets: Budgets, rules: Deployment | None, at: float, now: float
) -> list[pb.TenantCosts]:
    def rank(name: str) -> tuple[int, int, str]:
        account = spend.tenants[name]
        return -account.day.sum(at), -account.total.nanousd, name

    return [
        pb.TenantCosts(
            tenant=name,
            costs=_costs(spend.tenants[name], at),
            exceeded=rules is not None and budgets.tenant_spent(rules, name, now) is not None,
        )
        for name in heapq.nsmallest(_TENANTS_MAX, spend.tenants, key=rank)
    ]


def _costs(account: Account, at: float) -> pb.Costs:
    total = account.total
    return pb.Costs(
        hour_nanousd=_uint64(account.hour.sum(at)),
        day_nanousd=_uint64(account.day.sum(at)),
        total_nanousd=_uint64(total.nanousd),
        requests=_uint64(total.requests),
        prompt_tokens=_uint64(total.prompt_tokens),
        cached_tokens=_uint64(total.cached_tokens),
        completion_tokens=_uint64(total.completion_tokens),
    )


def _uint64(number: int) -> int:
    """The sum of what engines told need not fit."""
    return min(number, _UINT64_MAX)
