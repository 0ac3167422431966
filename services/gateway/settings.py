"""Settings of the gateway."""

from __future__ import annotations

from dataclasses import dataclass

from services.runtime.settings import (
    ProcessSettings,
    integer,
    loopback_address,
    number,
    peer_address,
    setting,
)


@dataclass(frozen=True)
class GatewaySettings(ProcessSettings):
    """Parsed once at the start; see docs/OPERATING.md."""

    address: str = setting(
        "CARAVAN_GATEWAY_ADDRESS",
        "127.0.0.1:7001",
        "Where the gateway listens, host:port on loopback",
        loopback_address,
    )
    metrics_address: str = setting(
        "CARAVAN_GATEWAY_METRICS_ADDRESS",
        "127.0.0.1:9101",
        "Where /metrics is served, host:port on loopback",
        loopback_address,
    )
    coordinator: str = setting(
        "CARAVAN_GATEWAY_COORDINATOR",
        "127.0.0.1:7002",
        "Address of the coordinator, host:port",
        peer_address,
    )
    keepalive_s: float = setting(
        "CARAVAN_GATEWAY_KEEPALIVE_S",
        "10",
        "Seconds of silence in a stream after which a comment is sent",
        number(0.05, 3_600),
    )
    coordinator_timeout_s: float = setting(
        "CARAVAN_GATEWAY_COORDINATOR_TIMEOUT_S",
        "2",
        "Seconds that the coordinator has to answer one call",
        number(0.05, 60),
    )
    coordinator_patience_s: float = setting(
        "CARAVAN_GATEWAY_COORDINATOR_PATIENCE_S",
        "10",
        "Seconds that new requests wait for a coordinator that is away",
        number(0, 300),
    )
    stall_s: float = setting(
        "CARAVAN_GATEWAY_STALL_S",
        "30",
        "Seconds of an engine's silence after which its requests move to another",
        number(0.1, 3_600),
    )
    migrations_max: int = setting(
        "CARAVAN_GATEWAY_MIGRATIONS_MAX",
        "5",
        "Most times that one request moves to another engine",
        integer(0, 100),
    )
    max_requests: int = setting(
        "CARAVAN_GATEWAY_MAX_REQUESTS",
        "2048",
        "Most requests in flight in this gateway at a time",
        integer(1, 65_536),
    )
    max_engine_channels: int = setting(
        "CARAVAN_GATEWAY_MAX_ENGINE_CHANNELS",
        "256",
        "Most connections to engines at a time",
        integer(1, 4_096),
    )
    engine_idle_s: float = setting(
        "CARAVAN_GATEWAY_ENGINE_IDLE_S",
        "300",
        "Seconds after which a connection to an engine that no request uses is closed",
        number(1, 86_400),
    )
