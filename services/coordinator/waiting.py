"""What a request wants of the coordinator, and the table of requests that wait for it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from services.coordinator.deployment import FallbackReason
from services.coordinator.grouping import Groups
from services.coordinator.tasks import Priority


@dataclass(frozen=True, slots=True)
class Want:
    """A request that asks for a lease, which gets the id `lease_id`.

    `arrived_at` is in monotonic seconds, `wait_s` the longest time to wait; 0: not at all. `affinity` are hashes of the prompt
    at each message boundary, the longest prefix last; `session_id` is the conversation, if any. It is not given to an engine
    whose life (incarnation) it must `avoid`; see returns.py for how long. One that is `resumed` runs already and has lost its engine. One that `may_fall_back`
    goes along the fallbacks of its deployment, leaving out those that have `failed`, with why. Where `revisions` are named, engines
    of others cannot go on with its answer.
    """

    request_id: str
    gateway_id: str
    model: str
    lease_id: str
    arrived_at: float
    wait_s: float = 0.0
    priority: Priority = Priority.NORMAL
    tenant: str = ""
    affinity: tuple[bytes, ...] = ()
    session_id: str = ""
    avoid: frozenset[str] = frozenset()
    resumed: bool = False
    may_fall_back: bool = False
    failed: Mapping[str, FallbackReason] = field(default_factory=dict)
    revisions: frozenset[str] = frozenset()

    @property
    def had_its_turn(self) -> bool:
        """Whether it was given an engine before, and lost it or was refused there: it goes before all others."""
        return self.resumed or bool(self.avoid)

    @property
    def has_begun(self) -> bool:
        """Whether its client has been given something of the answer, which is that of one model."""
        return self.resumed and not self.may_fall_back


class WaitingTable:
    """Requests that wait, by id, gateway and tenant. Their order is the business of the queues of their models."""

    def __init__(self) -> None:
        self._wants: dict[str, Want] = {}
        self._gateways: Groups[Want] = Groups()
        self._tenants: Groups[Want] = Groups()

    def __len__(self) -> int:
        return len(self._wants)

    def __iter__(self) -> Iterator[Want]:
        """Oldest first."""
        return iter(tuple(self._wants.values()))

    def of_request(self, request_id: str) -> Want | None:
        """The request, or None where it does not wait."""
        return self._wants.get(request_id)

    def add(self, want: Want) -> None:
        """Adds a request, whose id must not be waiting."""
        assert want.request_id not in self._wants
        self._wants[want.request_id] = want
        self._gateways.add(want.gateway_id, want.request_id, want)
        self._tenants.add(want.tenant, want.request_id, want)

    def remove(self, request_id: str) -> Want:
        """Removes a request, which must be waiting, and returns it."""
        want = self._wants.pop(request_id)
        self._gateways.discard(want.gateway_id, request_id)
        self._tenants.discard(want.tenant, request_id)
        return want

    def replace(self, want: Want) -> None:
        """Takes another version of a request that waits, of the same gateway and tenant, in its place."""
        self._wants[want.request_id] = want
        self._gateways.add(want.gateway_id, want.request_id, want)
        self._tenants.add(want.tenant, want.request_id, want)

    def of_gateway(self, gateway_id: str) -> tuple[Want, ...]:
        """The requests of a gateway, oldest first."""
        return self._gateways.items(gateway_id)

    def of_tenant(self, tenant: str) -> tuple[Want, ...]:
        """The requests of a tenant, oldest first."""
        return self._tenants.items(tenant)

    def check_integrity(self) -> None:
        """Asserts that the indexes say what a recount of the table says. O(n), for tests."""
        for groups, names in (
            (self._gateways, [want.gateway_id for want in self._wants.values()]),
            (self._tenants, [want.tenant for want in self._wants.values()]),
        ):
            assert groups.counts() == {name: names.count(name) for name in names}
