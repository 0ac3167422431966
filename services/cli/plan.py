"""The process plan: which processes run, with which arguments, environment and ports. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from services.cli.model_sources import ModelSource
from services.cli.ports import Ports
from services.cli.settings import UpSettings

Kind = Literal["coordinator", "cache", "engine", "gateway", "envoy"]
STOP_ORDER: Final[tuple[Kind, ...]] = ("envoy", "gateway", "engine", "cache", "coordinator")
"""The door closes first; what others need goes last."""

OWNER_KEY: Final = "CARAVAN_UP_ID"
"""Environment variable that marks the processes of one `caravan up` (services/runtime/lifeline.py)."""


@dataclass(frozen=True)
class ProcessPlan:
    """One process. `environment` is added to that of `caravan up`; `address` and `metrics` are for endpoints.json."""

    name: str
    kind: Kind
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    address: str
    metrics: str
    niceness: int = 0
    model: str | None = None


@dataclass(frozen=True)
class Installation:
    """Where the programs and files are."""

    python: str
    envoy: str
    envoy_folder: Path


@dataclass(frozen=True)
class UpOptions:
    """What the user asked for.

    `engines` is per model; `threads` None leaves the choice to `engine_threads`; without `cache` no KV block is shared between
    engines or kept on disk.
    """

    port: int
    models: tuple[ModelSource, ...]
    engines: int
    state_dir: Path
    threads: int | None = None
    cache: bool = True

    @property
    def kv_folder(self) -> Path:
        """Where the engines keep KV blocks on disk: the same at each start."""
        return self.state_dir / "kv"


@dataclass(frozen=True)
class Plan:
    """All processes, in the order of their start."""

    options: UpOptions
    ports: Ports
    envoy_config: Path
    access_log: Path
    processes: tuple[ProcessPlan, ...] = field(default_factory=tuple)

    @property
    def url(self) -> str:
        """Base URL of the REST API, without /v1."""
        return f"http://127.0.0.1:{self.ports.public}"

    def of_kind(self, kind: Kind) -> tuple[ProcessPlan, ...]:
        """The processes of a kind."""
        return tuple(process for process in self.processes if process.kind == kind)


def engine_threads(options: UpOptions, cores: int) -> int | None:
    """Compute threads of each engine that has a real model; None leaves it to the engine, which takes all cores.

    llama.cpp's threads wait for each other at barriers, so engines that share cores slow each other by much more than their
    share: several engines split the cores.
    """
    if options.threads is not None:
        return options.threads
    real = sum(options.engines for model in options.models if not model.scripted)
    return None if real <= 1 else max(1, cores // real)


def make_plan(
    options: UpOptions, settings: UpSettings, ports: Ports, install: Installation, cores: int
) -> Plan:
    """The plan for these options. `cores` are the processors that may be used."""
    front = settings.front_niceness
    coordinator = f"127.0.0.1:{ports.coordinator}"
    shared = {"COORDINATOR": coordinator, **_kv_values(options, settings, ports)}
    threads = engine_threads(options, cores)

    def service(kind: Kind, listens: tuple[int, int], values: Mapping[str, str]) -> ProcessPlan:
        return _service(install, settings, kind, listens, values)

    processes = [service("coordinator", (ports.coordinator, ports.coordinator_metrics), {})]
    if options.cache:
        processes.append(service("cache", (ports.cache, ports.cache_metrics), {}))
    served = [model for model in options.models for _ in range(options.engines)]
    for index, model in enumerate(served):
        values = {
            "ID": f"engine-{index}",
            "MODEL": f"{model.name}={model.source}",
            **shared,
        }
        if threads is not None and not model.scripted:
            values["THREADS"] = str(threads)
        listens = (ports.engines[index], ports.engine_metrics[index])
        engine = service("engine", listens, values)
        processes.append(replace(engine, name=values["ID"], model=model.name))
    gateway = (ports.gateway, ports.gateway_metrics)
    processes.append(service("gateway", gateway, {"COORDINATOR": coordinator}))
    envoy_config = options.state_dir / "envoy.yaml"
    processes.append(_envoy(settings, ports, install, envoy_config))
    processes = [
        planned if planned.kind == "engine" else replace(planned, niceness=front)
        for planned in processes
    ]
    access_log = options.state_dir / "logs" / "access.log"
    return Plan(options, ports, envoy_config, access_log, tuple(processes))


def _kv_values(options: UpOptions, settings: UpSettings, ports: Ports) -> dict[str, str]:
    """What engines are told of the KV cache: the service, and one folder that all of them share."""
    if not options.cache:
        return {}
    values = {"CACHE": f"127.0.0.1:{ports.cache}"}
    if settings.kv_disk_bytes:
        values["KV_ROOTS"] = f"disk:{options.kv_folder}:{settings.kv_disk_bytes}"
    return values


def _service(
    install: Installation,
    settings: UpSettings,
    kind: Kind,
    listens: tuple[int, int],
    values: Mapping[str, str],
) -> ProcessPlan:
    address, metrics = (f"127.0.0.1:{port}" for port in listens)
    own = {"ADDRESS": address, "METRICS_ADDRESS": metrics, **values}
    environment = {f"CARAVAN_{kind.upper()}_{key}": value for key, value in own.items()}
    environment["CARAVAN_DRAIN_GRACE_S"] = f"{settings.drain_grace_s:g}"
    environment["PYTHONUNBUFFERED"] = "1"
    return ProcessPlan(
        name=kind,
        kind=kind,
        # -P: a folder called `services` where the user happens to be must not be imported.
        argv=(install.python, "-P", "-m", f"services.{kind}"),
        environment=environment,
        address=address,
        metrics=f"http://{metrics}/metrics",
    )


def _envoy(settings: UpSettings, ports: Ports, install: Installation, config: Path) -> ProcessPlan:
    argv = (
        install.envoy,
        "--config-path",
        str(config),
        "--disable-hot-restart",  # several stacks may run on one machine
        "--concurrency",
        str(settings.envoy_workers),
        "--log-level",
        "warning",
        "--file-flush-interval-msec",
        "1000",
    )
    return ProcessPlan(
        name="envoy",
        kind="envoy",
        argv=argv,
        environment={},
        address=f"127.0.0.1:{ports.public}",
        metrics=f"http://127.0.0.1:{ports.admin}/stats/prometheus",
    )
