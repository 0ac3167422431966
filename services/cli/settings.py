"""Settings of `caravan up` that are not worth an option; the services read their own from the same environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from services.runtime.settings import byte_size, integer, load, number, setting


@dataclass(frozen=True)
class UpSettings:
    """What the environment says about the process plan."""

    drain_grace_s: float = setting(
        "CARAVAN_DRAIN_GRACE_S",
        "10",
        "Seconds that running requests get to end after SIGTERM",
        number(0, 3_600),
    )
    front_niceness: int = setting(
        "CARAVAN_UP_FRONT_NICENESS",
        "0",
        "Niceness of all but the engines; above 0 the engines win the processor",
        integer(0, 19),
    )
    envoy_workers: int = setting(
        "CARAVAN_UP_ENVOY_WORKERS", "1", "Worker threads of Envoy", integer(1, 64)
    )
    kv_disk_bytes: int = setting(
        "CARAVAN_UP_KV_DISK_BYTES",
        "4GiB",
        "Most bytes of KV blocks in STATE_DIR/kv; 0: none are kept on disk",
        byte_size,
    )
    log_bytes_max: int = setting(
        "CARAVAN_UP_LOG_BYTES",
        "16777216",
        "Bytes of one log file before it is rotated; one older file is kept",
        integer(65_536, 1 << 40),
    )


def environment() -> Mapping[str, str]:
    """The environment of this process."""
    return os.environ


def load_settings(environ: Mapping[str, str]) -> UpSettings:
    """Parses the settings. Raises SettingsError."""
    return load(UpSettings, environ)
