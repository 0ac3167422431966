"""What the KV cache of an engine can be told. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from caravan.cache.v1 import cache_service_pb2 as pb

from services.runtime.settings import byte_size

MIB: Final = 1 << 20
_TIERS: Final = {"ram_file": pb.TIER_RAM_FILE, "disk": pb.TIER_DISK}


@dataclass(frozen=True)
class RootConfig:
    """A folder for block files. `quota_bytes` is at least 1."""

    tier: pb.Tier.ValueType
    path: Path
    quota_bytes: int


@dataclass(frozen=True)
class KvConfig:
    """Everything about the KV cache of one engine.

    `address` is where the engine serves FetchBlocks; `cache_address` may be empty: then blocks live in RAM only. Roots are
    given fastest first. Times are in seconds: `acquire_seconds` bounds a lookup at the cache service, `wait_seconds` the wait
    for a save in flight and the search for shorter whole states, `stall_seconds` how long the next block may let wait for itself.
    """

    engine_id: str
    address: str
    cache_address: str = ""
    roots: tuple[RootConfig, ...] = ()
    ram_quota_bytes: int = 512 * MIB
    writer_threads: int = 2
    reader_threads: int = 2
    queue_bytes: int = 256 * MIB
    acquire_seconds: float = 0.25
    wait_seconds: float = 0.5
    stall_seconds: float = 2.0


def parse_root(text: str) -> RootConfig:
    """TIER:PATH:QUOTA, such as `disk:/var/cache/caravan:4GiB` or `ram_file:/dev/shm/caravan:512MiB`. Raises ValueError."""
    tier, _, rest = text.partition(":")
    path, _, quota = rest.rpartition(":")
    if tier not in _TIERS or not path:
        raise ValueError(f"{text!r} is not disk:PATH:QUOTA or ram_file:PATH:QUOTA")
    quota_bytes = byte_size(quota)
    if quota_bytes < 1:
        raise ValueError(f"the quota of {path} is zero")
    return RootConfig(_TIERS[tier], Path(path), quota_bytes)


def parse_roots(text: str) -> tuple[RootConfig, ...]:
    """Roots separated by commas; none for an empty text. Raises ValueError."""
    return tuple(parse_root(part) for part in text.split(",") if part)
