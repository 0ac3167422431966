"""The process plan: which processes run, with which arguments, environment and ports. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from services.cli.fleet import Wanted, engine_threads
from services.cli.model_sources import ModelSource
from services.cli.ports import EngineListens, Ports
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
    engines or kept on disk. Where `deployments` names a file, there are no models.
    """

    port: int
    models: tuple[ModelSource, ...]
    engines: int
    state_dir: Path
    threads: int | None = None
    cache: bool = True
    deployments: Path | None = None

    @property
    def deployments_file(self) -> Path:
        """The deployments to start with; where models were given, the file that says so."""
        return self.deployments or self.state_dir / "models.toml"

    @property
    def applied(self) -> Path:
        """Where the coordinator keeps what is applied while this runs."""
        return self.state_dir / "deployments.json"

    @property
    def spend(self) -> Path:
        """Where the coordinator keeps what deployments have cost."""
        return self.state_dir / "spend.jsonl"

    @property
    def kv_folder(self) -> Path:
        """Where the engines keep KV blocks on disk: the same at each start."""
        return self.state_dir / "kv"


@dataclass(frozen=True)
class Plan:
    """All processes but the engines, in the order of their start."""

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


def make_plan(
    options: UpOptions, settings: UpSettings, ports: Ports, install: Installation
) -> Plan:
    """The plan for these options."""
    front = settings.front_niceness
    coordinator = f"127.0.0.1:{ports.coordinator}"

    def service(kind: Kind, listens: tuple[int, int], values: Mapping[str, str]) -> ProcessPlan:
        return replace(_service(install, settings, kind, listens, values), niceness=front)

    told = {
        "DEPLOYMENTS": str(options.deployments_file),
        "DEPLOYMENTS_STATE": str(options.applied),
        "SPEND_STATE": str(options.spend),
    }
    if options.cache:
        told["CACHE"] = f"127.0.0.1:{ports.cache}"
    processes = [service("coordinator", (ports.coordinator, ports.coordinator_metrics), told)]
    if options.cache:
        processes.append(service("cache", (ports.cache, ports.cache_metrics), {}))
    gateway = (ports.gateway, ports.gateway_metrics)
    processes.append(service("gateway", gateway, {"COORDINATOR": coordinator}))
    envoy_config = options.state_dir / "envoy.yaml"
    processes.append(replace(_envoy(settings, ports, install, envoy_config), niceness=front))
    access_log = options.state_dir / "logs" / "access.log"
    return Plan(options, ports, envoy_config, access_log, tuple(processes))


@dataclass(frozen=True)
class EnginePlanner:
    """Plans engines. `cores` are the processors that may be used."""

    options: UpOptions
    settings: UpSettings
    ports: Ports
    install: Installation
    cores: int

    def plan(
        self, wanted: Wanted, everything: Collection[Wanted], listens: EngineListens
    ) -> ProcessPlan:
        """One engine of a deployment, beside those of all deployments."""
        values = {
            "ID": f"engine-{listens.number}",
            "MODEL": f"{wanted.name}={wanted.model}",
            "REVISION": wanted.revision,
            "COORDINATOR": f"127.0.0.1:{self.ports.coordinator}",
        }
        if not wanted.provider:
            values |= _kv_values(self.options, self.settings, self.ports)
        numbers = {
            "CONTEXT_TOKENS": wanted.context_tokens,
            "MAX_SEQUENCES": wanted.max_sequences,
            "THREADS": engine_threads(wanted, everything, self.options.threads, self.cores),
        }
        values |= {key: str(number) for key, number in numbers.items() if number}
        planned = _service(
            self.install, self.settings, "engine", (listens.port, listens.metrics), values
        )
        planned = replace(planned, name=values["ID"], model=wanted.name)
        return _in_front_of(planned, wanted) if wanted.provider else planned


def _in_front_of(planned: ProcessPlan, wanted: Wanted) -> ProcessPlan:
    """The engine that talks to a provider. Variables that hold credentials reach it with the environment of `caravan up`."""
    told = {
        "CARAVAN_REMOTE_PROVIDER": wanted.provider,
        "CARAVAN_REMOTE_OPTIONS": wanted.remote_options,
    }
    argv = (*planned.argv[:-1], f"{planned.argv[-1]}.remote")
    return replace(planned, argv=argv, environment={**planned.environment, **told})


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
