"""Settings of the coordinator."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from services.coordinator.policies import AFFINITY, NAMES
from services.runtime.settings import (
    ProcessSettings,
    choice,
    integer,
    loopback_address,
    number,
    peer_address,
    setting,
)


def shares(text: str) -> Mapping[str, float]:
    """NAME=WEIGHT,... with weights within 0.01 and 100."""
    weights: dict[str, float] = {}
    for part in text.split(",") if text else ():
        name, separator, weight = part.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not separator or not 0.01 <= value <= 100 or name in weights:
            raise ValueError("not NAME=WEIGHT,... with weights within 0.01 to 100")
        weights[name] = value
    return weights


def optional_peer(text: str) -> str:
    """host:port, or nothing."""
    return peer_address(text) if text else ""


@dataclass(frozen=True)
class CoordinatorSettings(ProcessSettings):
    """Parsed once at the start; see docs/OPERATING.md."""

    address: str = setting(
        "CARAVAN_COORDINATOR_ADDRESS",
        "127.0.0.1:7002",
        "Where the coordinator listens, host:port on loopback",
        loopback_address,
    )
    metrics_address: str = setting(
        "CARAVAN_COORDINATOR_METRICS_ADDRESS",
        "127.0.0.1:9102",
        "Where /metrics is served, host:port on loopback",
        loopback_address,
    )
    interval_s: float = setting(
        "CARAVAN_COORDINATOR_INTERVAL_S",
        "1",
        "Seconds between reports of engines and heartbeats of gateways; three in silence mean death",
        number(0.02, 60),
    )
    model_memory_s: float = setting(
        "CARAVAN_COORDINATOR_MODEL_MEMORY_S",
        "600",
        "Seconds for which a model without any engine stays known (503 instead of 404)",
        number(0, 86_400),
    )
    max_engines: int = setting(
        "CARAVAN_COORDINATOR_MAX_ENGINES", "256", "Most engines at a time", integer(1, 10_000)
    )
    max_gateways: int = setting(
        "CARAVAN_COORDINATOR_MAX_GATEWAYS", "256", "Most gateways at a time", integer(1, 10_000)
    )
    max_leases: int = setting(
        "CARAVAN_COORDINATOR_MAX_LEASES",
        "16384",
        "Most requests in flight at a time",
        integer(1, 1_000_000),
    )
    max_leases_per_engine: int = setting(
        "CARAVAN_COORDINATOR_MAX_LEASES_PER_ENGINE",
        "1024",
        "Most requests on one engine at a time, whatever the engine offers",
        integer(1, 4_096),
    )
    max_queued: int = setting(
        "CARAVAN_COORDINATOR_MAX_QUEUED",
        "256",
        "Most requests that wait for a sequence, per model",
        integer(1, 100_000),
    )
    queue_s: float = setting(
        "CARAVAN_COORDINATOR_QUEUE_S",
        "30",
        "Longest time that a request waits for a sequence, in seconds; 0: none waits",
        number(0, 3_600),
    )
    cancel_budget_s: float = setting(
        "CARAVAN_COORDINATOR_CANCEL_BUDGET_S",
        "10",
        "Seconds after which a cancelled request that does not end loses its lease",
        number(0.1, 3_600),
    )
    tenant_weights: Mapping[str, float] = setting(
        "CARAVAN_COORDINATOR_TENANT_WEIGHTS",
        "",
        "Shares of tenants that wait, NAME=WEIGHT,...; 1 for those not named",
        shares,
    )
    routing: str = setting(
        "CARAVAN_COORDINATOR_ROUTING",
        AFFINITY,
        f"How an engine is chosen: {', '.join(NAMES)}",
        choice(*NAMES),
    )
    load_factor: float = setting(
        "CARAVAN_COORDINATOR_LOAD_FACTOR",
        "1.25",
        "Times the mean load up to which affinity may load an engine",
        number(1, 100),
    )
    cache: str = setting(
        "CARAVAN_COORDINATOR_CACHE",
        "",
        "Address of the cache service, host:port, for affinity by what is saved where; empty: none",
        optional_peer,
    )
    deployments: str = setting(
        "CARAVAN_COORDINATOR_DEPLOYMENTS",
        "",
        "TOML file of the deployments to start with; empty: none",
    )
    deployments_state: str = setting(
        "CARAVAN_COORDINATOR_DEPLOYMENTS_STATE",
        "",
        "File in which applied deployments are kept; where it exists it is read instead of the one above; empty: memory only",
    )
    spend_state: str = setting(
        "CARAVAN_COORDINATOR_SPEND_STATE",
        "",
        "File in which what deployments have cost is kept; empty: memory only",
    )
    rollout_grace_s: float = setting(
        "CARAVAN_COORDINATOR_ROLLOUT_GRACE_S",
        "600",
        "Seconds that requests on engines of a former revision or a removed deployment get to finish",
        number(0, 3_600),
    )
