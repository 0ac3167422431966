"""What a deployment is: a name that clients ask for, the model behind it, and the rules for its requests. Pure values."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from services.coordinator.remote import Remote
from services.coordinator.tasks import Priority
from services.runtime.remote_options import PROVIDERS


class Runtime(Enum):
    """What runs a model."""

    LLAMA_CPP = "llama_cpp"
    SCRIPTED = "scripted"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    GEMINI = "gemini"
    LITELLM = "litellm"
    OPENAI_COMPATIBLE = "openai_compatible"

    @property
    def is_remote(self) -> bool:
        """Whether a provider runs it, and an engine only stands in front."""
        return self.value in PROVIDERS


class CapacityPolicy(Enum):
    """What becomes of a request that finds all places taken (S1.18)."""

    REJECT = "reject"
    QUEUE = "queue"
    FALLBACK = "fallback"


class FallbackReason(Enum):
    """Why a deployment cannot take a request (S1.31); what the request itself is to blame for is never a reason."""

    CAPACITY = "capacity"
    UNAVAILABLE = "unavailable"
    RATE_LIMITED = "rate_limited"
    CIRCUIT_OPEN = "circuit_open"
    BUDGET = "budget"


ALL_REASONS: Final = frozenset(FallbackReason)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Settings of the engines of a deployment; 0 leaves one to the engine."""

    context_tokens: int = 0
    max_sequences: int = 0
    threads: int = 0


@dataclass(frozen=True, slots=True)
class Serving:
    """Limits of the requests of a deployment.

    `max_concurrent` over all engines, 0: what they can take. `max_queued` and `max_wait_s`, in seconds, are the coordinator's
    settings where None.
    """

    max_concurrent: int = 0
    max_queued: int | None = None
    max_wait_s: float | None = None
    on_capacity_exhausted: CapacityPolicy = CapacityPolicy.QUEUE


@dataclass(frozen=True, slots=True)
class Fallback:
    """Another deployment for requests that this one cannot take for one of the reasons."""

    deployment: str
    reasons: frozenset[FallbackReason] = ALL_REASONS


class OnExceeded(Enum):
    """What becomes of requests when a budget is spent (S1.23)."""

    REJECT = "reject"
    WARN = "warn"
    THROTTLE = "throttle"


@dataclass(frozen=True, slots=True)
class Budget:
    """What a deployment may cost in US dollars, over the hour and the day that end now; 0: no limit."""

    usd_per_hour: float = 0.0
    usd_per_day: float = 0.0
    tenant_usd_per_hour: float = 0.0
    tenant_usd_per_day: float = 0.0
    on_exceeded: OnExceeded = OnExceeded.REJECT


@dataclass(frozen=True, slots=True)
class Deployment:
    """One deployment, valid by itself.

    `model` is a path on the machines of its engines, or what a provider calls the model; `replicas` are engines, 0 to 64.
    `remote` is only for runtimes of providers; without one it is None.
    """

    name: str
    model: str
    runtime: Runtime = Runtime.LLAMA_CPP
    replicas: int = 1
    engine: EngineOptions = field(default_factory=EngineOptions)
    serving: Serving = field(default_factory=Serving)
    priority: Priority = Priority.NORMAL
    fallback: tuple[Fallback, ...] = ()
    idempotent: bool = True
    remote: Remote | None = None
    budget: Budget = field(default_factory=Budget)
