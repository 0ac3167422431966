"""The options of an engine in front of a provider, with the defaults that the contract names. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from caravan.engine.v1 import remote_options_pb2 as pb
from google.protobuf.duration_pb2 import Duration

from services.engine.remote.breaker import BreakerConfig
from services.engine.remote.credential_sources import Source, source_of
from services.engine.remote.phases import Timeouts
from services.engine.remote.provider import Provider, provider_model
from services.engine.remote.retry import Jitter, RetryConfig
from services.runtime.remote_options import find_mistakes

_KEY_BYTES_MAX: Final = 256
_TIMEOUTS: Final = Timeouts()
_RETRY: Final = RetryConfig()
_BREAKER: Final = BreakerConfig()
_WORKERS: Final = 8
_QUEUE_CAPACITY: Final = 1024
_MAX_TOKENS: Final = 4096
_RETRY_BUDGET: Final = 0.2
_GATHER_S: Final = 0.03
_JITTERS: Final = {pb.JITTER_NONE: Jitter.NONE, pb.JITTER_FULL: Jitter.FULL}


class OptionsError(ValueError):
    """Some options are wrong; the message lists all of them, a line each, and none of their values."""


@dataclass(frozen=True)
class EngineOptions:
    """What an engine goes by; times are in seconds, None is without limit.

    `model` is the provider's name of it, `retry_budget` retries per first attempt, `gather_s` the least time between two deltas. `limits`, and `told` for the price, are as they
    were told.
    """

    provider: Provider
    model: str
    base_url: str
    source: Source | None
    timeouts: Timeouts
    total_s: float | None
    retry: RetryConfig
    retry_budget: float
    breaker: BreakerConfig
    limits: pb.RateLimits
    limit_key: str
    workers: int
    queue_capacity: int
    default_max_tokens: int
    policy: pb.QueuePolicy.ValueType
    gather_s: float
    told: pb.RemoteOptions = field(repr=False)  # It may hold the secret itself.

    @property
    def patience(self) -> bool:
        """Whether requests wait for workers and limits."""
        return self.policy not in {pb.QUEUE_POLICY_REJECT, pb.QUEUE_POLICY_FALLBACK}

    @property
    def falls_back(self) -> bool:
        """Whether a request that finds no place is to go to a fallback."""
        return self.policy == pb.QUEUE_POLICY_FALLBACK


def read_options(told: pb.RemoteOptions, provider_name: str, model: str) -> EngineOptions:
    """The options of an engine for a model of a provider. Raises OptionsError."""
    mistakes = find_mistakes(told, provider_name, inline_allowed=True)
    if mistakes:
        raise OptionsError("\n".join(f"{path}: {why}" for path, why in mistakes))
    provider = Provider(provider_name)
    source = source_of(told.credential)
    return EngineOptions(
        provider=provider,
        model=provider_model(provider, model),
        base_url=told.base_url or provider.default_base_url or "",
        source=source,
        timeouts=_timeouts(told.timeouts),
        total_s=_limit(told.timeouts, "total", None),
        retry=_retry(told.retry),
        retry_budget=told.retry.budget if told.retry.HasField("budget") else _RETRY_BUDGET,
        breaker=_breaker(told.breaker),
        limits=told.limits,
        limit_key=told.limits.key or _limit_key(provider_name, source, model),
        workers=told.workers if told.HasField("workers") else _WORKERS,
        queue_capacity=told.queue_capacity if told.HasField("queue_capacity") else _QUEUE_CAPACITY,
        default_max_tokens=told.default_max_tokens or _MAX_TOKENS,
        policy=told.on_capacity_exhausted,
        gather_s=_seconds(told.gather) if told.HasField("gather") else _GATHER_S,
        told=told,
    )


def _timeouts(told: pb.Timeouts) -> Timeouts:
    return Timeouts(
        connect_s=_limit(told, "connect", _TIMEOUTS.connect_s),
        first_byte_s=_limit(told, "first_byte", _TIMEOUTS.first_byte_s),
        between_bytes_s=_limit(told, "between_bytes", _TIMEOUTS.between_bytes_s),
    )


def _limit(told: pb.Timeouts, name: str, default: float | None) -> float | None:
    """A time limit: 0 is none, unset the default."""
    if not told.HasField(name):  # type: ignore[arg-type]
        return default
    return _seconds(getattr(told, name)) or None


def _retry(told: pb.RetryPolicy) -> RetryConfig:
    initial_s, longest_s = _RETRY.initial_backoff_s, _RETRY.max_backoff_s
    if told.HasField("initial_backoff"):
        initial_s = _seconds(told.initial_backoff)
    if told.HasField("max_backoff"):
        longest_s = _seconds(told.max_backoff)
    respects = told.respect_retry_after if told.HasField("respect_retry_after") else True
    return RetryConfig(
        max_retries=told.max_retries if told.HasField("max_retries") else _RETRY.max_retries,
        # A short longest wait is meant, also where the first one is not told.
        initial_backoff_s=min(initial_s, longest_s),
        max_backoff_s=longest_s,
        multiplier=told.backoff_multiplier
        if told.HasField("backoff_multiplier")
        else _RETRY.multiplier,
        jitter=_JITTERS.get(told.jitter, Jitter.EQUAL),
        respect_retry_after=respects,
    )


def _breaker(told: pb.BreakerPolicy) -> BreakerConfig:
    threshold, open_s, probes = (
        _BREAKER.failure_threshold,
        _BREAKER.open_s,
        _BREAKER.half_open_max_probes,
    )
    if told.HasField("failure_threshold"):
        threshold = told.failure_threshold
    if told.HasField("open_duration"):
        open_s = _seconds(told.open_duration)
    if told.HasField("half_open_max_probes"):
        probes = told.half_open_max_probes
    return BreakerConfig(threshold, open_s, probes)


def _limit_key(provider: str, source: Source | None, model: str) -> str:
    """Who shares a limit by default: provider, account, as far as the place of the credential tells it, and model."""
    account = "" if source is None else str(source)
    key = f"{provider}|{account}|{model}"
    return key.encode()[:_KEY_BYTES_MAX].decode(errors="ignore")


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9
