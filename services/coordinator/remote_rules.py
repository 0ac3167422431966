"""What is wrong with what a deployment says of providers: how to talk to them, and what that may cost (S1.22-S1.25). Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from caravan.engine.v1 import remote_options_pb2 as pb

from services.coordinator.deployment import (
    Budget,
    Deployment,
    FallbackReason,
    OnExceeded,
    Runtime,
)
from services.coordinator.remote import Remote
from services.runtime import remote_options

USD_MAX: Final = 1e9
_OWN_NAMES: Final = (Runtime.OPENAI, Runtime.ANTHROPIC, Runtime.GEMINI)
"""Providers whose models are not files; other servers may name a model as its file."""
_OF_THE_ENGINE: Final = frozenset({FallbackReason.CAPACITY, FallbackReason.RATE_LIMITED})
"""Why an engine in front of a provider refuses a request that cannot start."""


def of_provider(deployment: Deployment) -> Iterator[tuple[str, str]]:
    """Mistakes of the runtime, the options that go with it and the budget, each with its field."""
    runtime, options = deployment.runtime, deployment.engine
    if not runtime.is_remote:
        yield from _of_none(deployment)
        return
    if runtime in _OWN_NAMES and deployment.model.lower().endswith(".gguf"):
        yield "runtime", f"'{runtime.value}' does not run '{deployment.model[:64]}'"
    for name in ("context_tokens", "max_sequences", "threads"):
        if getattr(options, name):
            yield f"engine.{name}", f"{runtime.value} runs the model: see remote"
    remote = (deployment.remote or Remote()).to_message()
    mistakes = remote_options.find_mistakes(remote, runtime.value, inline_allowed=False)
    yield from ((f"remote.{field}", message) for field, message in mistakes)
    if not deployment.idempotent and not _calls_once(remote):
        yield (
            "remote.retry.max_retries",
            "must be set to 0 where requests must not run twice: idempotent is false",
        )
    falls_back = remote.on_capacity_exhausted == pb.QUEUE_POLICY_FALLBACK
    if falls_back and not any(_OF_THE_ENGINE & other.reasons for other in deployment.fallback):
        yield (
            "remote.on_capacity_exhausted",
            "fallback needs a fallback that is for the reasons capacity or rate_limited",
        )
    yield from _of_budget(deployment.budget)


def _calls_once(remote: pb.RemoteOptions) -> bool:
    # A call that failed may have begun at the provider: its engine is not told whether that matters, but for this.
    return remote.retry.HasField("max_retries") and remote.retry.max_retries == 0


def _of_none(deployment: Deployment) -> Iterator[tuple[str, str]]:
    for field, is_told in (
        ("remote", deployment.remote is not None),
        ("budget", deployment.budget != Budget()),
    ):
        if is_told:
            yield (
                field,
                f"is for runtimes of providers, and {deployment.runtime.value} is none: see `runtime`",
            )


def _of_budget(budget: Budget) -> Iterator[tuple[str, str]]:
    spans = ("usd_per_hour", "usd_per_day", "tenant_usd_per_hour", "tenant_usd_per_day")
    limits = {name: getattr(budget, name) for name in spans}
    wrong = [name for name, usd in limits.items() if not 0 <= usd <= USD_MAX]  # NaN is none of it
    for name in wrong:
        yield f"budget.{name}", f"{limits[name]:g} is not within 0 to {USD_MAX:g}"
    if wrong:
        return
    if not any(limits.values()) and budget.on_exceeded is not OnExceeded.REJECT:
        yield "budget.on_exceeded", "there is no limit that could be exceeded"
    for smaller, larger in (
        ("usd_per_hour", "usd_per_day"),
        ("tenant_usd_per_hour", "tenant_usd_per_day"),
        ("tenant_usd_per_hour", "usd_per_hour"),
        ("tenant_usd_per_day", "usd_per_day"),
    ):
        if 0 < limits[larger] < limits[smaller]:
            yield f"budget.{smaller}", f"is never reached: {larger} is {limits[larger]:g}"
