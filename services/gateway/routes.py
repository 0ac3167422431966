"""What a request asks of the coordinator, and what it is granted. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.core.v1.scheduling_pb2 import Priority, Scheduling

from services.gateway.fallback import FallbackReason

Headers: TypeAlias = tuple[tuple[str, str], ...]
"""The trace context of a request, as metadata."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to run one request on one engine.

    `address` is host:port, `incarnation` the life of the engine, `model` the deployment that serves the request; where
    `idempotent` is false, the request must not go to a second engine once this one may have begun it. `priority` is the one with
    which it was admitted: its own, or its deployment's.
    """

    lease_id: str
    engine_id: str
    address: str
    incarnation: str
    model: str
    idempotent: bool
    priority: Priority.ValueType

    @staticmethod
    def of(granted: pb.RouteResponse) -> Lease:
        """The lease that was granted."""
        lease = granted.lease
        return Lease(
            lease.lease_id,
            lease.engine_id,
            lease.address,
            lease.incarnation,
            granted.model,
            granted.idempotent,
            granted.priority,
        )


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a lease is wanted for. `session_id` names a conversation, whose requests go to one engine; empty: none.

    `affinity` are hashes of the prompt at its boundaries, the longest prefix last; requests go to where a prefix was computed.
    `avoided` are lives of engines that lost the request before; `resumed` says that it had a lease already, `may_fall_back`
    that the client has been given nothing yet, so that another deployment may answer, but for those that have `failed`, with why.
    """

    request_id: str
    model: str
    session_id: str = ""
    affinity: tuple[bytes, ...] = ()
    scheduling: Scheduling = field(default_factory=Scheduling)
    avoided: tuple[str, ...] = ()
    resumed: bool = False
    may_fall_back: bool = True
    failed: Mapping[str, FallbackReason] = field(default_factory=dict)

    @property
    def asked_before(self) -> bool:
        """Whether the request had a lease already."""
        return self.resumed or bool(self.failed)

    def request(self, trace: Headers = ()) -> pb.RouteRequest:
        """The route that is asked for, with the trace context of the request.

        A request that has waited for its turn once waits again for as long as the coordinator lets it.
        """
        request = pb.RouteRequest(
            request_id=self.request_id,
            model=self.model,
            priority=self.scheduling.priority,
            affinity=self.affinity,
            session_id=self.session_id,
            avoid_incarnations=self.avoided,
            resumed=self.resumed,
            may_fall_back=self.may_fall_back,
            failed=[pb.FailedDeployment(name=n, reason=r) for n, r in self.failed.items()],
            trace=dict(trace),
        )
        if self.scheduling.HasField("max_wait") and not self.resumed:
            request.max_wait.CopyFrom(self.scheduling.max_wait)
        return request
