"""When another deployment is asked for, and which error a client gets where none has answered."""

from __future__ import annotations

import pytest
from caravan.coordinator.v1 import deployment_pb2
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.fallback import FAILED_MAX, REASONS, Fallbacks
from services.gateway.migration import MOVED
from services.runtime.errors import TABLE, CaravanError

ERRORS = st.sampled_from(sorted(TABLE)).map(lambda reason: CaravanError(reason, reason))
FAILURES = st.tuples(ERRORS, st.integers(0, 30).map(str), st.booleans(), st.booleans())


def _take(
    fallbacks: Fallbacks,
    reason: str,
    deployment: str = "first",
    *,
    answered: bool = False,
    idempotent: bool = True,
) -> bool:
    error = CaravanError(reason, f"{deployment} failed.")
    return fallbacks.take(error, deployment, answered=answered, idempotent=idempotent)


@given(st.lists(FAILURES, max_size=80))
def test_fallbacks_are_bounded(failures: list[tuple[CaravanError, str, bool, bool]]) -> None:
    """However deployments fail, each is left once, and at most as many as a route may name (I4)."""
    fallbacks = Fallbacks()
    left: list[str] = []
    first: CaravanError | None = None
    for error, deployment, answered, idempotent in failures:
        if fallbacks.take(error, deployment, answered=answered, idempotent=idempotent):
            left.append(deployment)
            first = first or error
            assert not answered
            assert fallbacks.failed[deployment] == REASONS[error.reason]
        assert list(fallbacks.failed) == left
        told = fallbacks.told(error)
        expected = error if error.reason in {"CANCELLED", "DEADLINE_EXCEEDED"} else first or error
        assert told is expected
    assert len(set(left)) == len(left) <= FAILED_MAX


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("RATE_LIMITED", deployment_pb2.FALLBACK_REASON_RATE_LIMITED),
        ("CIRCUIT_OPEN", deployment_pb2.FALLBACK_REASON_CIRCUIT_OPEN),
        ("PROVIDER_FAILED", deployment_pb2.FALLBACK_REASON_UNAVAILABLE),
        ("PROVIDER_UNAUTHORIZED", deployment_pb2.FALLBACK_REASON_UNAVAILABLE),
    ],
)
def test_the_coordinator_is_told_why(
    reason: str, told: deployment_pb2.FallbackReason.ValueType
) -> None:
    """What a fallback may be for (S1.31)."""
    fallbacks = Fallbacks()
    assert _take(fallbacks, reason)
    assert fallbacks.failed == {"first": told}


@pytest.mark.parametrize(
    "reason",
    ["CONTENT_FILTERED", "CONTEXT_LENGTH_EXCEEDED", "PROVIDER_REJECTED", "UNSUPPORTED_FIELD"],
)
def test_what_the_request_is_to_blame_for_stays(reason: str) -> None:
    """Another deployment is not tried for it (S1.31)."""
    assert not _take(Fallbacks(), reason)


@given(st.sampled_from(sorted(REASONS)))
def test_what_must_not_run_twice_does_not(reason: str) -> None:
    """Only where the provider has said that it did nothing may another one begin."""
    refused = {"RATE_LIMITED", "CIRCUIT_OPEN"}
    refused |= {f"PROVIDER_{word}" for word in ("UNAUTHORIZED", "FORBIDDEN", "NOT_FOUND")}
    assert _take(Fallbacks(), reason, idempotent=False) == (reason in refused)


@given(st.sampled_from(sorted(REASONS)))
def test_an_answer_that_has_begun_stays(reason: str) -> None:
    """Nobody can go on with what another deployment has said."""
    assert not _take(Fallbacks(), reason, answered=True)


def test_a_reason_is_for_a_move_or_for_a_fallback() -> None:
    """The two ways on exclude each other, so that their order does not matter."""
    assert not MOVED & set(REASONS)


def test_the_first_error_is_told() -> None:
    """The client knows the deployment that it asked for, and not those behind it."""
    fallbacks = Fallbacks()
    assert _take(fallbacks, "RATE_LIMITED", "first")
    assert _take(fallbacks, "CIRCUIT_OPEN", "second")
    assert fallbacks.told(CaravanError("NO_ENGINE", "None.")).message == "first failed."
