"""Which process listens where, and who is to blame if it cannot."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

DEFAULT_PUBLIC: Final = 8080
TAKEN: Final = "is taken"
ENGINES_MAX: Final = 90
"""Engines of one `caravan up`; their default ports stay below those of the next process."""

# Free ports are looked for below the range from which Linux takes the local ports of outgoing connections (32768 and up):
# there, a connection could take the port of a process that is being restarted.
_POOL_START: Final = 20_000
_POOL_SIZE: Final = 10_000


class NoFreePortError(Exception):
    """The pool has too few free ports."""


@dataclass(frozen=True)
class Ports:
    """All listeners, on loopback."""

    public: int
    admin: int
    gateway: int
    gateway_metrics: int
    coordinator: int
    coordinator_metrics: int
    cache: int
    cache_metrics: int
    engines: tuple[int, ...]
    engine_metrics: tuple[int, ...]

    def named(self) -> Iterator[tuple[str, int]]:
        """Each port with what it is for."""
        yield "Envoy", self.public
        yield "Envoy's admin page", self.admin
        yield "the gateway", self.gateway
        yield "the gateway's metrics", self.gateway_metrics
        yield "the coordinator", self.coordinator
        yield "the coordinator's metrics", self.coordinator_metrics
        yield "the cache service", self.cache
        yield "the cache service's metrics", self.cache_metrics
        for index, port in enumerate(self.engines):
            yield f"engine-{index}", port
        for index, port in enumerate(self.engine_metrics):
            yield f"the metrics of engine-{index}", port


def default_ports(engines: int) -> Ports:
    """The documented ports, for the default public port."""
    return Ports(
        public=DEFAULT_PUBLIC,
        admin=9901,
        gateway=7001,
        gateway_metrics=9101,
        coordinator=7002,
        coordinator_metrics=9102,
        cache=7003,
        cache_metrics=9103,
        engines=tuple(7010 + index for index in range(engines)),
        engine_metrics=tuple(9110 + index for index in range(engines)),
    )


def pick_ports(public: int, engines: int, is_free: Callable[[int], bool]) -> Ports:
    """Internal ports beside another public port: the first free ones from a place that depends on it.

    Two stacks with different public ports so look in different places. Raises NoFreePortError.
    """
    offset = public * 61 % _POOL_SIZE
    pool = (_POOL_START + (offset + step) % _POOL_SIZE for step in range(_POOL_SIZE))
    free = (port for port in pool if port != public and is_free(port))

    def take(count: int) -> tuple[int, ...]:
        taken = tuple(port for _, port in zip(range(count), free, strict=False))
        if len(taken) < count:
            raise NoFreePortError(
                f"no free ports within {_POOL_START} to {_POOL_START + _POOL_SIZE - 1}"
            )
        return taken

    admin, gateway, gateway_metrics, coordinator, coordinator_metrics, cache, cache_metrics = take(
        7
    )
    return Ports(
        public=public,
        admin=admin,
        gateway=gateway,
        gateway_metrics=gateway_metrics,
        coordinator=coordinator,
        coordinator_metrics=coordinator_metrics,
        cache=cache,
        cache_metrics=cache_metrics,
        engines=take(engines),
        engine_metrics=take(engines),
    )


def listen_error(port: int) -> str | None:
    """Why a process could not listen on the loopback port now; None if it could."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError as error:
            return TAKEN if error.errno == errno.EADDRINUSE else str(error.strerror).lower()
    return None


def is_free(port: int) -> bool:
    """Whether a process could listen on the loopback port now."""
    return listen_error(port) is None


def describe_owner(port: int) -> str:
    """` by NAME (process PID)` of who listens on the port, or nothing if that is not to be known."""
    # Imported late: only a failed start needs it.
    import psutil

    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return ""
    for connection in connections:
        listens = connection.status == psutil.CONN_LISTEN
        if listens and connection.pid and connection.laddr[1:2] == (port,):
            try:
                return f" by {psutil.Process(connection.pid).name()} (process {connection.pid})"
            except psutil.Error:
                return f" by process {connection.pid}"
    return ""
