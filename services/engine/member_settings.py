"""Settings that every kind of engine has: who it is, where it listens, and how it leaves."""

from __future__ import annotations

from dataclasses import dataclass

from services.runtime.settings import (
    ProcessSettings,
    loopback_address,
    number,
    peer_address,
    setting,
    text,
)


@dataclass(frozen=True)
class NamedModel:
    """A model and the name under which it is served. `path` says where it is: what that means is the engine's affair."""

    name: str
    path: str


def named_model(value: str) -> NamedModel:
    """NAME=PATH; the path may be `scripted:?key=value`."""
    name, separator, path = value.partition("=")
    if not separator or not name or not path or len(name) > 128:
        raise ValueError("not NAME=PATH")
    return NamedModel(name, path)


def optional_peer(value: str) -> str:
    """host:port, or nothing."""
    return peer_address(value) if value else ""


def identifier(value: str) -> str:
    """1 to 128 bytes."""
    if len(text(value).encode()) > 128:
        raise ValueError("longer than 128 bytes")
    return value


def revision(value: str) -> str:
    """At most 128 bytes, or nothing."""
    return identifier(value) if value else ""


def optional_seconds(value: str) -> float | None:
    """Seconds, 0 to 3600, or nothing."""
    return number(0, 3600)(value) if value else None


@dataclass(frozen=True)
class MemberSettings(ProcessSettings):
    """What every kind of engine can be told; its own settings extend these."""

    address: str = setting(
        "CARAVAN_ENGINE_ADDRESS",
        "127.0.0.1:7010",
        "Where the engine listens, host:port on loopback",
        loopback_address,
    )
    metrics_address: str = setting(
        "CARAVAN_ENGINE_METRICS_ADDRESS",
        "127.0.0.1:9110",
        "Where /metrics is served, host:port on loopback",
        loopback_address,
    )
    coordinator: str = setting(
        "CARAVAN_ENGINE_COORDINATOR",
        "",
        "Address of the coordinator, host:port; empty: the engine stands alone",
        optional_peer,
    )
    engine_id: str = setting(
        "CARAVAN_ENGINE_ID", "engine-0", "Id of the engine, the same after a restart", identifier
    )
    revision: str = setting(
        "CARAVAN_ENGINE_REVISION",
        "",
        "Revision of the deployment for which the engine was started; empty: it was started by hand",
        revision,
    )
    progress_s: float = setting(
        "CARAVAN_ENGINE_PROGRESS_S",
        "1",
        "Seconds of silence in a stream after which the engine says that it works; 0: never",
        number(0, 3600),
    )
    drain_finish_s: float | None = setting(
        "CARAVAN_ENGINE_DRAIN_FINISH_S",
        "",
        "Seconds that running requests get to finish after SIGTERM before they move to another engine; empty: half of CARAVAN_DRAIN_GRACE_S",
        optional_seconds,
    )

    @property
    def finish_s(self) -> float:
        """Seconds that running requests get to finish after SIGTERM; the rest of the grace is for moving them."""
        if self.drain_finish_s is None:
            return self.drain_grace_s / 2
        return self.drain_finish_s
