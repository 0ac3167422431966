"""What becomes of a request whose deployment could not get an answer of its provider: a fallback, or the end (S1.31). Pure.

The engine of such a deployment has tried what may be tried: it lives, and another engine of the same deployment would ask the
same provider. So the coordinator is asked again, and told which deployments have failed; it knows the fallbacks. What the
request itself is to blame for (CONTENT_FILTERED, CONTEXT_LENGTH_EXCEEDED, PROVIDER_REJECTED) is no reason to go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, TypeAlias

from caravan.coordinator.v1 import deployment_pb2

from services.runtime.errors import CaravanError

FallbackReason: TypeAlias = deployment_pb2.FallbackReason.ValueType

REASONS: Final[Mapping[str, FallbackReason]] = {
    "RATE_LIMITED": deployment_pb2.FALLBACK_REASON_RATE_LIMITED,
    "CIRCUIT_OPEN": deployment_pb2.FALLBACK_REASON_CIRCUIT_OPEN,
    "PROVIDER_FAILED": deployment_pb2.FALLBACK_REASON_UNAVAILABLE,
    "PROVIDER_UNREACHABLE": deployment_pb2.FALLBACK_REASON_UNAVAILABLE,
    "PROVIDER_TIMEOUT": deployment_pb2.FALLBACK_REASON_UNAVAILABLE,
    "PROVIDER_UNAUTHORIZED": deployment_pb2.FALLBACK_REASON_UNAVAILABLE,
    "PROVIDER_FORBIDDEN": deployment_pb2.FALLBACK_REASON_UNAVAILABLE,
    "PROVIDER_NOT_FOUND": deployment_pb2.FALLBACK_REASON_UNAVAILABLE,
}
"""The errors of providers for which a fallback is asked for, and what the coordinator is told."""
_MAY_HAVE_BEGUN: Final = frozenset({"PROVIDER_FAILED", "PROVIDER_UNREACHABLE", "PROVIDER_TIMEOUT"})
"""After these nobody knows what the provider did; the others say that it did nothing."""
_OF_THE_CLIENT: Final = frozenset({"CANCELLED", "DEADLINE_EXCEEDED"})

FAILED_MAX: Final = 16
"""Deployments that may fail one request: as many as a route may name."""


class Fallbacks:
    """The deployments that have failed one request, at most FAILED_MAX, each of them once."""

    def __init__(self) -> None:
        self._failed: dict[str, FallbackReason] = {}
        self._first: CaravanError | None = None

    @property
    def failed(self) -> Mapping[str, FallbackReason]:
        """Why each of them has, by name, in the order in which they did."""
        return MappingProxyType(self._failed)

    def take(
        self, error: CaravanError, deployment: str, *, answered: bool, idempotent: bool
    ) -> bool:
        """Whether a fallback is to be asked for, now that the deployment has failed so.

        `answered`: the client has something of the answer, which nobody else can go on with. `idempotent`: the request may be sent
        to another deployment where this one may have begun it.
        """
        reason = REASONS.get(error.reason)
        if reason is None or answered:
            return False
        if error.reason in _MAY_HAVE_BEGUN and not idempotent:
            return False
        if deployment in self._failed or len(self._failed) == FAILED_MAX:
            return False
        self._failed[deployment] = reason
        self._first = self._first or error
        return True

    def told(self, error: CaravanError) -> CaravanError:
        """The error for a client that got no answer: why the deployment that it knows gave none, whatever befell it afterwards.

        That it was cancelled, or its deadline has passed, comes first.
        """
        return error if error.reason in _OF_THE_CLIENT else self._first or error
