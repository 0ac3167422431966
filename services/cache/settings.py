"""Settings of the cache service."""

from __future__ import annotations

from dataclasses import dataclass

from services.runtime.settings import (
    ProcessSettings,
    SettingsError,
    integer,
    loopback_address,
    number,
    setting,
)


@dataclass(frozen=True)
class CacheSettings(ProcessSettings):
    """Parsed once at the start; see docs/OPERATING.md."""

    address: str = setting(
        "CARAVAN_CACHE_ADDRESS",
        "127.0.0.1:7003",
        "Where the cache service listens, host:port on loopback",
        loopback_address,
    )
    metrics_address: str = setting(
        "CARAVAN_CACHE_METRICS_ADDRESS",
        "127.0.0.1:9103",
        "Where /metrics is served, host:port on loopback",
        loopback_address,
    )
    heartbeat_s: float = setting(
        "CARAVAN_CACHE_HEARTBEAT_S",
        "1",
        "Seconds between heartbeats of engines; three in silence mean death",
        number(0.02, 60),
    )
    reservation_ttl_s: float = setting(
        "CARAVAN_CACHE_RESERVATION_TTL_S",
        "60",
        "Seconds that a save may take without being renewed",
        number(0.05, 3_600),
    )
    room_wait_s: float = setting(
        "CARAVAN_CACHE_ROOM_WAIT_S",
        "1",
        "Seconds that a save waits for dropped blocks to be deleted before it is refused",
        number(0, 60),
    )
    claim_ttl_s: float = setting(
        "CARAVAN_CACHE_CLAIM_TTL_S",
        "60",
        "Seconds after which a claim that nobody gave back ends",
        number(0.05, 86_400),
    )
    pressure_high: float = setting(
        "CARAVAN_CACHE_PRESSURE_HIGH",
        "0.85",
        "Share of a host's memory in use from which on blocks in memory are dropped; 1: practically never",
        number(0, 1),
    )
    pressure_low: float = setting(
        "CARAVAN_CACHE_PRESSURE_LOW",
        "0.75",
        "Share of a host's memory in use down to which they are dropped, below the one above",
        number(0, 1),
    )
    max_sessions: int = setting(
        "CARAVAN_CACHE_MAX_SESSIONS", "256", "Most engines at a time", integer(1, 10_000)
    )
    max_rows: int = setting(
        "CARAVAN_CACHE_MAX_ROWS",
        "2000000",
        "Most blocks that are known at a time; a million take about 1 GB",
        integer(1, 100_000_000),
    )
    max_claims: int = setting(
        "CARAVAN_CACHE_MAX_CLAIMS",
        "4096",
        "Most claims of one engine at a time",
        integer(1, 1_000_000),
    )
    max_waiters: int = setting(
        "CARAVAN_CACHE_MAX_WAITERS",
        "16384",
        "Most calls that wait for a save at a time",
        integer(1, 1_000_000),
    )
    max_watchers: int = setting(
        "CARAVAN_CACHE_MAX_WATCHERS", "64", "Most watches at a time", integer(1, 10_000)
    )
    max_changes: int = setting(
        "CARAVAN_CACHE_MAX_CHANGES",
        "65536",
        "Changes by which a watch may fall behind before it ends",
        integer(1, 10_000_000),
    )
    max_keys: int = setting(
        "CARAVAN_CACHE_MAX_KEYS",
        "65536",
        "Most keys in one Acquire",
        integer(1, 65_536),
    )

    def __post_init__(self) -> None:
        if self.pressure_low >= self.pressure_high:
            raise SettingsError(
                f"CARAVAN_CACHE_PRESSURE_LOW={self.pressure_low:g}: "
                f"not below CARAVAN_CACHE_PRESSURE_HIGH={self.pressure_high:g}"
            )
