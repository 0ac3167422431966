"""Settings of the coordinator."""

from __future__ import annotations

from dataclasses import dataclass

from services.runtime.settings import (
    ProcessSettings,
    integer,
    loopback_address,
    number,
    setting,
)


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
