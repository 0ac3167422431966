"""Waiting keys of one priority: tenants in turn by their weights, each tenant's own keys in the order of arrival. Pure.

Start-time fair queueing. A tenant has a tag, its service so far divided by its weight; the least tag goes first. A tenant that
comes (again) starts at the virtual time, so that having been away earns no credit. The virtual time also moves with every
start, as in weighted fair queueing: an endless row of new tenants cannot hold back one whose tag is ahead.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Mapping

DEFAULT_WEIGHT = 1.0


class _Tenant:
    __slots__ = ("name", "tag", "turn", "waiting", "weight")

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weight = weight
        self.tag = 0.0
        self.turn = 0
        self.waiting: OrderedDict[str, None] = OrderedDict()


class FairQueue:
    """Keys that wait. All operations are O(log tenants) amortized; tenants are forgotten when nothing waits."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._tenants: dict[str, _Tenant] = {}
        # One entry (tag, turn, name) for each tenant; one that is behind its tenant is brought forward when it is met.
        self._turns: list[tuple[float, int, str]] = []
        self._arrivals: OrderedDict[str, tuple[_Tenant, float]] = OrderedDict()
        self._count = itertools.count()
        self._virtual = 0.0
        self._weight = 0.0

    def __len__(self) -> int:
        return len(self._arrivals)

    @property
    def tenants(self) -> int:
        """Tenants that are remembered."""
        return len(self._tenants)

    def oldest_since(self) -> float:
        """When the key that waits longest came. There must be one."""
        return next(iter(self._arrivals.values()))[1]

    def add(self, key: str, tenant_name: str, now: float) -> None:
        """Adds a key, which must not be waiting. `now` must not be before that of keys added earlier."""
        tenant = self._tenants.get(tenant_name)
        if tenant is None:
            tenant = _Tenant(tenant_name, self._weights.get(tenant_name, DEFAULT_WEIGHT))
            self._tenants[tenant_name] = tenant
            heapq.heappush(self._turns, (0.0, -1, tenant_name))
        if not tenant.waiting:
            self._weight += tenant.weight
            tenant.tag, tenant.turn = max(tenant.tag, self._virtual), next(self._count)
        tenant.waiting[key] = None
        self._arrivals[key] = tenant, now

    def discard(self, key: str) -> None:
        """Removes a key, which must be waiting. It costs its tenant nothing."""
        tenant, _ = self._arrivals.pop(key)
        del tenant.waiting[key]
        self._left(tenant)

    def pop(self) -> str:
        """Removes and returns the key whose turn it is. There must be one."""
        tenant = self._next_tenant()
        key, _ = tenant.waiting.popitem(last=False)
        del self._arrivals[key]
        self._virtual = max(self._virtual + 1 / self._weight, tenant.tag)
        tenant.tag, tenant.turn = tenant.tag + 1 / tenant.weight, next(self._count)
        self._left(tenant)
        return key

    def _next_tenant(self) -> _Tenant:
        while True:
            tag, turn, name = self._turns[0]
            tenant = self._tenants[name]
            if not tenant.waiting:
                # The tag of whoever goes next is not below this one, so nothing is owed when it comes back.
                heapq.heappop(self._turns)
                del self._tenants[name]
            elif (tenant.tag, tenant.turn) != (tag, turn):
                heapq.heapreplace(self._turns, (tenant.tag, tenant.turn, name))
            else:
                return tenant

    def _left(self, tenant: _Tenant) -> None:
        if tenant.waiting:
            return
        self._weight -= tenant.weight
        if not self._arrivals:
            self._tenants.clear()
            self._turns.clear()
            self._virtual = self._weight = 0.0
