"""A whole Caravan with engines that a test kills, stops and starts, and the look for what they may have left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

import grpc
import httpx
import psutil
from caravan.cache.v1 import cache_service_pb2 as cache_pb
from caravan.cache.v1 import cache_service_pb2_grpc as cache_grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from caravan.engine.v1 import engine_service_pb2_grpc as engine_grpc

from tests.support.ports import free_port
from tests.support.stack import Stack
from tests.support.waiting import wait_for

SEED_VARIABLE: Final = "CARAVAN_CHAOS_SEED"
STALL_S: Final = 2.0
"""Silence after which a request leaves its engine; half a minute by default."""
CALL_S: Final = 10.0
PATIENCE_S: Final = 60.0
"""For whatever takes a start of a process: the machine may be busy."""
_SERIES: Final = re.compile(r"^([a-z_]+)(?:\{(.*)\})? ([0-9.e+-]+)$", re.MULTILINE)
_READY: Final = {
    engine_pb.ENGINE_PHASE_IDLE,
    engine_pb.ENGINE_PHASE_PREFILLING,
    engine_pb.ENGINE_PHASE_GENERATING,
}


def seeded() -> Random:
    """Randomness from CARAVAN_CHAOS_SEED, which is printed: pytest shows it with a failure."""
    seed = int(os.environ.get(SEED_VARIABLE, "1"))
    print(f"{SEED_VARIABLE}={seed}")
    return Random(seed)


@dataclass
class LooseEngine:
    """An engine that is started again by the test and not by `caravan up`, so at once. Always at the same address."""

    engine_id: str
    environment: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process, whose former life must be over."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.engine"],
                env={**os.environ, **self.environment},
                stderr=log,
                stdout=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        """kill -9, also of one that is stopped."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@dataclass
class Chaos:
    """The stack, its loose engines and open channels to all of them."""

    stack: Stack
    engines: dict[str, LooseEngine] = field(default_factory=dict)
    channels: dict[str, grpc.Channel] = field(default_factory=dict)

    def channel(self, address: str) -> grpc.Channel:
        """An open channel; one that is broken connects again as soon as it is used."""
        if address not in self.channels:
            options = [("grpc.max_reconnect_backoff_ms", 200)]
            self.channels[address] = grpc.insecure_channel(address, options)
        return self.channels[address]

    @property
    def door(self) -> grpc.Channel:
        """To Envoy."""
        return self.channel(f"127.0.0.1:{self.stack.port}")

    @property
    def coordinator(self) -> pb_grpc.CoordinatorServiceStub:
        """The coordinator."""
        return pb_grpc.CoordinatorServiceStub(
            self.channel(self.stack.processes()["coordinator"]["address"])
        )

    def engine(self, address: str) -> engine_grpc.EngineServiceStub:
        """An engine."""
        return engine_grpc.EngineServiceStub(self.channel(address))

    def inflight(self) -> list[pb.InflightRequest]:
        """What the coordinator says is in flight."""
        return list(
            self.coordinator.ListInflight(pb.ListInflightRequest(), timeout=CALL_S).requests
        )

    def engines_joined(self) -> list[pb.Engine]:
        """The engines that the coordinator knows."""
        return list(self.coordinator.ListEngines(pb.ListEnginesRequest(), timeout=CALL_S).engines)

    def ready(self, model: str = "") -> set[str]:
        """Ids of the engines of a model, or of all, that can serve; none while the coordinator is away."""
        try:
            engines = self.engines_joined()
        except (grpc.RpcError, KeyError):
            return set()
        return {
            engine.engine_id
            for engine in engines
            if engine.load.phase in _READY and model in {"", engine.model.name}
        }

    def gateway_has_joined(self) -> bool:
        """Whether the coordinator knows the gateway."""
        try:
            return self.series("gateway", "caravan_gateway_joined") == 1
        except (httpx.TransportError, KeyError):
            return False

    def wait_until_ready(self, model: str, count: int) -> None:
        """Returns once so many engines of a model can serve."""
        wait_for(lambda: len(self.ready(model)) >= count, f"{count} engines are ready", PATIENCE_S)

    def wait_until_serving(self, engine: LooseEngine) -> None:
        """Returns once an engine serves, whether the coordinator knows it or not."""
        stub = self.engine(engine.environment["CARAVAN_ENGINE_ADDRESS"])
        request = engine_pb.GetStatusRequest()

        def serves() -> bool:
            try:
                return stub.GetStatus(request, timeout=CALL_S).load.phase in _READY
            except grpc.RpcError:
                return False

        wait_for(serves, f"{engine.engine_id} serves", PATIENCE_S)

    def serving(self, model: str) -> str:
        """Id of the engine that serves a request of the model at this moment; empty if none does."""
        for request in self.inflight():
            if request.model == model and request.engine_id:
                return request.engine_id
        return ""

    def engine_tokens(self, engine_id: str) -> int:
        """Most tokens that a request on an engine has had; -1 where it has none, or does not answer."""
        address = self.engines[engine_id].environment["CARAVAN_ENGINE_ADDRESS"]
        try:
            answer = self.engine(address).ListInflight(
                engine_pb.ListInflightRequest(), timeout=CALL_S
            )
        except grpc.RpcError:
            return -1
        return max((request.completion_tokens for request in answer.requests), default=-1)

    def series(self, process: str, name: str, **labels: str) -> float:
        """The sum of the series of this name and with these labels that a process tells Prometheus."""
        wanted = {f'{label}="{value}"' for label, value in labels.items()}
        return sum(
            float(value)
            for found, given, value in _SERIES.findall(self.stack.metrics(process))
            if found == name and wanted <= set((given or "").split(","))
        )

    def moved(self) -> float:
        """Requests that went on at another engine, in the life of this gateway."""
        return self.series("gateway", "caravan_migrations_total", result="moved")

    # --- what is left --------------------------------------------------------------------------------------------

    def left(self) -> dict[str, Any]:
        """All that requests may hold, anywhere, and that is not zero. A process that is away is named too."""
        try:
            counts: dict[str, Any] = {"coordinator": len(self.inflight())}
            for engine in self.engines_joined():
                load = self.engine(engine.address).GetStatus(
                    engine_pb.GetStatusRequest(), timeout=CALL_S
                )
                requests = self.engine(engine.address).ListInflight(
                    engine_pb.ListInflightRequest(), timeout=CALL_S
                )
                counts[f"{engine.engine_id} requests"] = len(requests.requests)
                counts[f"{engine.engine_id} sequences"] = load.load.active_sequences
                counts[f"{engine.engine_id} queue"] = load.load.queued_requests
                counts[f"{engine.engine_id} swapped"] = load.load.swapped_sequences
            stats = self.cache_stats()
            counts |= {"claims": stats.claims, "reservations": stats.reservations}
            counts |= {"waiters": stats.waiters}
            counts["gateway"] = self.series("gateway", "caravan_gateway_requests")
            counts["leases"] = self.series("coordinator", "caravan_leases")
            counts["waiting"] = self.series("coordinator", "caravan_route_queue_depth")
        except (grpc.RpcError, httpx.TransportError, KeyError) as error:
            return {"away": repr(error)}
        return {what: count for what, count in counts.items() if count}

    def cache_stats(self) -> cache_pb.GetStatsResponse:
        """What the cache service says of itself."""
        address = self.stack.processes()["cache"]["address"]
        stub = cache_grpc.CacheServiceStub(self.channel(address))
        return stub.GetStats(cache_pb.GetStatsRequest(), timeout=CALL_S)

    def wait_until_nothing_is_left(self, timeout_s: float = 30.0) -> None:
        """Returns once no request holds anything anywhere, and the coordinator's counters agree with that (I6)."""
        try:
            wait_for(lambda: not self.left(), "nothing is left", timeout_s)
        except AssertionError:
            raise AssertionError(f"still there: {self.left()}") from None
        self._check_counters()

    def _check_counters(self) -> None:
        began = self.series("coordinator", "caravan_route_total", result="granted")
        began += self.series("coordinator", "caravan_leases_adopted_total")
        ended = self.series("coordinator", "caravan_releases_total")
        ended += self.series("coordinator", "caravan_leases_written_off_total")
        swept = self.series("coordinator", "caravan_leases_swept_total")
        # More may have ended: a lease that was swept, or that an earlier coordinator granted, can be released as well.
        assert began <= ended + swept, f"{began=} {ended=} {swept=}"

    def resident_bytes(self) -> dict[str, int]:
        """Memory of the processes of the stack, by name."""
        return {
            name: psutil.Process(pid).memory_info().rss for name, pid in self.stack.pids().items()
        }

    # --- engines -------------------------------------------------------------------------------------------------

    def add_engine(self, engine_id: str, model: str, source: str, **settings: str) -> LooseEngine:
        """Starts a loose engine; `settings` are environment variables."""
        processes = self.stack.processes()
        address = settings.pop("CARAVAN_ENGINE_ADDRESS", f"127.0.0.1:{free_port()}")
        environment = {
            "CARAVAN_ENGINE_ID": engine_id,
            "CARAVAN_ENGINE_ADDRESS": address,
            "CARAVAN_ENGINE_METRICS_ADDRESS": f"127.0.0.1:{free_port()}",
            "CARAVAN_ENGINE_COORDINATOR": processes["coordinator"]["address"],
            "CARAVAN_ENGINE_CACHE": processes["cache"]["address"],
            "CARAVAN_ENGINE_KV_ROOTS": f"disk:{self.stack.state_dir / 'kv'}:{1 << 30}",
            "CARAVAN_ENGINE_MODEL": f"{model}={source}",
            **settings,
        }
        log = self.stack.state_dir / "logs" / f"{engine_id}.log"
        engine = self.engines[engine_id] = LooseEngine(engine_id, environment, log)
        engine.start()
        return engine

    def end_processes(self, number: signal.Signals, *names: str) -> None:
        """Ends supervised processes by a signal; returns when others run in their place and all know each other."""
        before = {name: self.stack.pids()[name] for name in names}
        for pid in before.values():
            os.kill(pid, number)
        for name, pid in before.items():
            self._wait_for_another(name, pid)
        wait_for(lambda: set(self.stack.engine_names()) <= self.ready(), "all serve", PATIENCE_S)
        wait_for(self.gateway_has_joined, "the gateway has joined", PATIENCE_S)
        wait_for(self._door_is_open, "the door is open", PATIENCE_S)

    def _door_is_open(self) -> bool:
        try:
            return httpx.get(f"{self.stack.url}/healthz", timeout=CALL_S).status_code == 200
        except httpx.TransportError:
            return False

    def _wait_for_another(self, name: str, pid: int) -> None:
        running = self.stack.pids
        wait_for(lambda: running().get(name, pid) != pid, f"{name} runs again", PATIENCE_S)

    def drain(self, engine_id: str, grace_s: float = 0.0) -> None:
        """Takes an engine out of service."""
        request = pb.DrainEngineRequest(engine_id=engine_id)
        request.grace.FromMilliseconds(round(grace_s * 1000))
        self.coordinator.DrainEngine(request, timeout=CALL_S)

    def undrain(self, engine_id: str) -> None:
        """Puts it back."""
        self.coordinator.UndrainEngine(pb.UndrainEngineRequest(engine_id=engine_id), timeout=CALL_S)


@contextlib.contextmanager
def chaos_on(stack: Stack) -> Iterator[Chaos]:
    """Loose engines on a running stack; ends them all."""
    chaos = Chaos(stack)
    try:
        yield chaos
    finally:
        for engine in chaos.engines.values():
            engine.kill()
        for channel in chaos.channels.values():
            channel.close()
