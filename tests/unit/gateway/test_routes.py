"""What is asked of the coordinator for a request."""

from __future__ import annotations

from caravan.coordinator.v1 import deployment_pb2
from caravan.core.v1 import scheduling_pb2

from services.gateway.held import HeldLeases
from services.gateway.routes import Lease, Wanted

LEASE = Lease(
    "lease-1",
    "engine-0",
    "127.0.0.1:7010",
    "life-1",
    "demo",
    idempotent=True,
    priority=scheduling_pb2.PRIORITY_BACKGROUND,
)


def test_a_first_route_waits_as_its_client_says() -> None:
    """Priority and the longest wait are the client's; another deployment may answer."""
    scheduling = scheduling_pb2.Scheduling(priority=scheduling_pb2.PRIORITY_HIGH)
    scheduling.max_wait.FromMilliseconds(0)
    request = Wanted("req-1", "demo", scheduling=scheduling).request()
    assert request.HasField("max_wait")
    assert request.priority == scheduling_pb2.PRIORITY_HIGH
    assert (request.resumed, request.may_fall_back) == (False, True)


def test_a_request_that_has_lost_its_engine_waits_for_another() -> None:
    """That it did not want to wait for its first turn does not end what has begun."""
    scheduling = scheduling_pb2.Scheduling()
    scheduling.max_wait.FromMilliseconds(0)
    wanted = Wanted(
        "req-1",
        "demo",
        scheduling=scheduling,
        avoided=("life-1",),
        resumed=True,
        may_fall_back=False,
    )
    request = wanted.request()
    assert not request.HasField("max_wait")
    assert (request.resumed, request.may_fall_back) == (True, False)
    assert list(request.avoid_incarnations) == ["life-1"]


def test_a_request_whose_deployment_failed_asks_like_a_new_one() -> None:
    """Nothing has begun: it waits for a fallback in its turn, and as long as its client says."""
    scheduling = scheduling_pb2.Scheduling()
    scheduling.max_wait.FromMilliseconds(0)
    reasons = {
        "demo": deployment_pb2.FALLBACK_REASON_RATE_LIMITED,
        "spare": deployment_pb2.FALLBACK_REASON_UNAVAILABLE,
    }
    wanted = Wanted("req-1", "demo", scheduling=scheduling, failed=reasons)
    request = wanted.request()
    assert {told.name: told.reason for told in request.failed} == reasons
    assert request.HasField("max_wait")
    assert (request.resumed, request.may_fall_back) == (False, True)
    assert wanted.asked_before
    assert not Wanted("req-1", "demo").asked_before


def test_held_leases_are_told_with_their_age() -> None:
    """What a coordinator needs to take a lease over, with the priority that it gave; what has ended is not told."""
    held = HeldLeases()
    held.add(LEASE, Wanted("req-1", "asked-for"), asked_at=10.0)
    (message,) = held.messages(now=12.5)
    assert (message.lease_id, message.request_id, message.model) == ("lease-1", "req-1", "demo")
    assert (message.engine_id, message.incarnation) == ("engine-0", "life-1")
    assert message.priority == scheduling_pb2.PRIORITY_BACKGROUND
    assert message.age.ToMilliseconds() == 2500
    held.discard(LEASE)
    held.discard(LEASE)
    assert held.messages(now=12.5) == []
