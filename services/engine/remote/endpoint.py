"""A provider as all requests of an engine share it, with what protects it and us."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from services.engine.remote.accounts import Accounts
from services.engine.remote.breaker import Breaker
from services.engine.remote.credentials import CredentialSession
from services.engine.remote.failure_log import FailureLog
from services.engine.remote.http_client import ProviderClient
from services.engine.remote.metrics import RemoteMetrics
from services.engine.remote.rate_gate import RateGate
from services.engine.remote.redaction import Redactor
from services.engine.remote.retry import Retry
from services.engine.remote.wire import Wire
from services.runtime.clock import Clock
from services.runtime.telemetry import Tracing


@dataclass(frozen=True, slots=True)
class Endpoint:
    """All of it.

    `patience` is whether a request may wait for the rate limit; `total_s` is the longest time for all attempts, or None;
    `fraction` draws from [0, 1).
    """

    provider: str
    model: str
    wire: Wire
    client: ProviderClient
    gate: RateGate
    breaker: Breaker
    retry: Retry
    credentials: CredentialSession
    redactor: Redactor
    accounts: Accounts
    metrics: RemoteMetrics
    failures: FailureLog
    tracing: Tracing
    clock: Clock
    fraction: Callable[[], float]
    patience: bool
    total_s: float | None
