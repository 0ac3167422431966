"""How a call to a provider fails (S3.19-S3.22), and what follows from it for retries, the breaker and the caller. Pure."""

from __future__ import annotations

from enum import Enum
from typing import Final

from services.runtime.errors import CaravanError


class Failure(Enum):
    """What went wrong; the value is the reason in the error table."""

    RATE_LIMITED = "RATE_LIMITED"
    CIRCUIT_OPEN = "CIRCUIT_OPEN"
    CONTENT_FILTERED = "CONTENT_FILTERED"
    CONTEXT_LENGTH_EXCEEDED = "CONTEXT_LENGTH_EXCEEDED"
    REJECTED = "PROVIDER_REJECTED"
    UNAUTHORIZED = "PROVIDER_UNAUTHORIZED"
    FORBIDDEN = "PROVIDER_FORBIDDEN"
    NOT_FOUND = "PROVIDER_NOT_FOUND"
    SERVER_ERROR = "PROVIDER_FAILED"
    NETWORK = "PROVIDER_UNREACHABLE"
    TIMEOUT = "PROVIDER_TIMEOUT"


RETRYABLE: Final = frozenset(
    {Failure.RATE_LIMITED, Failure.SERVER_ERROR, Failure.NETWORK, Failure.TIMEOUT}
)
"""What may pass by itself (S3.10)."""
CIRCUIT_FAILURES: Final = frozenset({Failure.SERVER_ERROR, Failure.NETWORK, Failure.TIMEOUT})
"""What says that the provider is not well (S3.10); too many requests do not."""
_RETRY_AFTER_S: Final = 1.0


class ProviderError(Exception):
    """A call that failed. `message` is for the caller and holds no credential.

    `retry_after_s` is what the provider asked for, in seconds, or None. `metadata` is what the error table documents for the
    reason, beside `provider`. One that `is_lasting` stays until somebody does something, although others of its kind pass by
    themselves. `provider_request_id` is the provider's own one, for its support; "" where it told none. `detail` is for
    the log alone: addresses of ours are no business of callers.
    """

    def __init__(
        self,
        failure: Failure,
        message: str,
        *,
        retry_after_s: float | None = None,
        is_lasting: bool = False,
        **metadata: str,
    ) -> None:
        super().__init__(message)
        self.failure = failure
        self.message = message
        self.retry_after_s = retry_after_s
        self.metadata = metadata
        self.is_lasting = is_lasting
        self.provider_request_id = ""
        self.detail = ""

    @property
    def may_pass(self) -> bool:
        """Whether trying again may help."""
        return self.failure in RETRYABLE and not self.is_lasting

    def to_error(self, provider: str, model: str) -> CaravanError:
        """The error that the caller gets. `model` is the provider's name of it, for the operator who has to correct it."""
        retry_after_s = self.retry_after_s
        if retry_after_s is None and (self.may_pass or self.failure is Failure.CIRCUIT_OPEN):
            retry_after_s = _RETRY_AFTER_S
        metadata = {"provider": provider, **self.metadata}
        if self.failure is Failure.NOT_FOUND:
            metadata["model"] = model
        return CaravanError(
            self.failure.value, self.message, retry_after_s=retry_after_s, **metadata
        )
