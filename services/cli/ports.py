"""Which process listens where, and who is to blame if it cannot."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

DEFAULT_PUBLIC: Final = 8080
TAKEN: Final = "is taken"
ENGINES_MAX: Final = 90
"""Engines of one `caravan up`; their default ports stay below those of the next process."""

ENGINES_PER_MODEL_MAX: Final = 64
"""What a deployment may have."""

# Free ports are looked for below the range from which Linux takes the local ports of outgoing connections (32768 and up):
# there, a connection could take the port of a process that is being restarted.
_POOL_START: Final = 20_000
_POOL_SIZE: Final = 10_000
_ENGINES_START: Final = 7010
_ENGINE_METRICS_START: Final = 9110


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
        engines=tuple(_ENGINES_START + index for index in range(engines)),
        engine_metrics=tuple(_ENGINE_METRICS_START + index for index in range(engines)),
    )


def pick_ports(public: int, engines: int, is_free: Callable[[int], bool]) -> Ports:
    """Internal ports beside another public port: the first free ones from a place that depends on it.

    Two stacks with different public ports so look in different places. Raises NoFreePortError.
    """
    free = (port for port in _pool(public) if port != public and is_free(port))
    admin, gateway, gateway_metrics, coordinator, coordinator_metrics, cache, cache_metrics = _take(
        free, 7
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
        engines=_take(free, engines),
        engine_metrics=_take(free, engines),
    )


@dataclass(frozen=True)
class EngineListens:
    """The number of an engine, and its ports."""

    number: int
    port: int
    metrics: int


class EnginePorts:
    """The ports of the engines that run, by number: those of `ports` first, and then as free ones as those."""

    def __init__(self, ports: Ports, is_free: Callable[[int], bool]) -> None:
        self._ports = ports
        self._is_free = is_free
        self._taken: dict[int, EngineListens] = {}

    def take(self) -> EngineListens:
        """The lowest number that is not in use, with ports that are free. Raises NoFreePortError."""
        for number in range(ENGINES_MAX):
            listens = None if number in self._taken else self._listens(number)
            if listens is not None:
                self._taken[number] = listens
                return listens
        raise NoFreePortError(f"one machine gets {ENGINES_MAX} engines at most")

    def give_back(self, number: int) -> None:
        """The engine has ended."""
        del self._taken[number]

    def _listens(self, number: int) -> EngineListens | None:
        ports = self._ports
        if number < len(ports.engines):
            pair = (ports.engines[number], ports.engine_metrics[number])
        elif ports.public == DEFAULT_PUBLIC:
            pair = (_ENGINES_START + number, _ENGINE_METRICS_START + number)
        else:
            used = {port for _, port in ports.named()}
            used |= {port for each in self._taken.values() for port in (each.port, each.metrics)}
            free = (p for p in _pool(ports.public) if p not in used and self._is_free(p))
            return EngineListens(number, *_take(free, 2))
        return EngineListens(number, *pair) if all(map(self._is_free, pair)) else None


def _pool(public: int) -> Iterator[int]:
    """Ports to look at, from a place that depends on the public one."""
    offset = public * 61 % _POOL_SIZE
    return (_POOL_START + (offset + step) % _POOL_SIZE for step in range(_POOL_SIZE))


def _take(free: Iterator[int], count: int) -> tuple[int, ...]:
    taken = tuple(islice(free, count))
    if len(taken) < count:
        raise NoFreePortError(
            f"no free ports within {_POOL_START} to {_POOL_START + _POOL_SIZE - 1}"
        )
    return taken


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
