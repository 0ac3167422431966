"""What a request asks of the coordinator, and what it is granted. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.core.v1.scheduling_pb2 import Priority, Scheduling

from services.gateway.fallback import FallbackReason


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

    def request(self, gateway_id: str) -> pb.RouteRequest:
        """The call for it. A request that has waited for its turn once waits again for as long as the coordinator lets it."""
        request = pb.RouteRequest(
            request_id=self.request_id,
            gateway_id=gateway_id,
            model=self.model,
            priority=self.scheduling.priority,
            affinity=self.affinity,
            session_id=self.session_id,
            avoid_incarnations=self.avoided,
            resumed=self.resumed,
            may_fall_back=self.may_fall_back,
            failed=[pb.FailedDeployment(name=n, reason=r) for n, r in self.failed.items()],
        )
        if self.scheduling.HasField("max_wait") and not self.resumed:
            request.max_wait.CopyFrom(self.scheduling.max_wait)
        return request
