"""The process plan: ports, names, environment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cli import ports
from services.cli.fleet import Wanted
from services.cli.model_sources import ModelSource
from services.cli.plan import (
    STOP_ORDER,
    EnginePlanner,
    Installation,
    Plan,
    ProcessPlan,
    UpOptions,
    make_plan,
)
from services.cli.prepare import models_text
from services.cli.settings import UpSettings, load_settings
from services.runtime.deployment_file import read_deployments

INSTALL = Installation("/usr/bin/python", "/opt/envoy", Path("/opt/caravan/deploy/envoy"))
DEMO = ModelSource("demo", "/models/demo.gguf")
SLOW = ModelSource("slow", "scripted:?step_ms=20&load_ms=5")
OPTIONS = UpOptions(8080, (DEMO,), 1, Path("/state"))


def _wanted(options: UpOptions) -> list[Wanted]:
    return [
        Wanted(model.name, model.source, "r1", options.engines, is_scripted=model.scripted)
        for model in options.models
    ]


def _plan(options: UpOptions, settings: UpSettings | None = None) -> Plan:
    settings = settings or load_settings({})
    return make_plan(options, settings, _ports(options), INSTALL)


def _ports(options: UpOptions) -> ports.Ports:
    return ports.default_ports(len(options.models) * options.engines)


def _engines(
    options: UpOptions, settings: UpSettings | None = None, cores: int = 8
) -> list[ProcessPlan]:
    """The engines that `caravan up` starts for its models, in that order."""
    settings = settings or load_settings({})
    planner = EnginePlanner(options, settings, _ports(options), INSTALL, cores)
    listening = ports.EnginePorts(_ports(options), lambda _: True)
    wanted = _wanted(options)
    return [
        planner.plan(each, wanted, listening.take())
        for each in wanted
        for _ in range(each.replicas)
    ]


def test_default_ports_are_the_documented_ones() -> None:
    """The addresses that the documentation names."""
    options = replace(OPTIONS, engines=2)
    processes = [*_plan(options).processes, *_engines(options)]
    assert {planned.name: (planned.address, planned.metrics) for planned in processes} == {
        "coordinator": ("127.0.0.1:7002", "http://127.0.0.1:9102/metrics"),
        "cache": ("127.0.0.1:7003", "http://127.0.0.1:9103/metrics"),
        "engine-0": ("127.0.0.1:7010", "http://127.0.0.1:9110/metrics"),
        "engine-1": ("127.0.0.1:7011", "http://127.0.0.1:9111/metrics"),
        "gateway": ("127.0.0.1:7001", "http://127.0.0.1:9101/metrics"),
        "envoy": ("127.0.0.1:8080", "http://127.0.0.1:9901/stats/prometheus"),
    }


def test_each_model_gets_its_engines() -> None:
    """N engines per model, numbered through, each told its model and the coordinator."""
    options = replace(OPTIONS, models=(DEMO, SLOW), engines=2)
    engines = _engines(options)
    assert [(e.name, e.model) for e in engines] == [
        ("engine-0", "demo"),
        ("engine-1", "demo"),
        ("engine-2", "slow"),
        ("engine-3", "slow"),
    ]
    environment = engines[3].environment
    assert environment["CARAVAN_ENGINE_ID"] == "engine-3"
    assert environment["CARAVAN_ENGINE_MODEL"] == "slow=scripted:?step_ms=20&load_ms=5"
    assert environment["CARAVAN_ENGINE_COORDINATOR"] == "127.0.0.1:7002"
    assert environment["CARAVAN_ENGINE_ADDRESS"] == "127.0.0.1:7013"
    assert environment["CARAVAN_ENGINE_REVISION"] == "r1"
    gateway = _plan(options).of_kind("gateway")[0].environment
    assert gateway["CARAVAN_GATEWAY_COORDINATOR"] == "127.0.0.1:7002"


def test_engines_share_the_cache_service_and_a_folder() -> None:
    """All engines get one folder, the same at each start, with its quota, and one service."""
    options = replace(OPTIONS, models=(DEMO, SLOW))
    (cache,) = _plan(options).of_kind("cache")
    assert cache.argv[-1] == "services.cache"
    assert cache.environment["CARAVAN_CACHE_ADDRESS"] == "127.0.0.1:7003"
    assert cache.environment["CARAVAN_CACHE_METRICS_ADDRESS"] == "127.0.0.1:9103"
    for engine in _engines(options):
        assert engine.environment["CARAVAN_ENGINE_CACHE"] == "127.0.0.1:7003"
        assert engine.environment["CARAVAN_ENGINE_KV_ROOTS"] == f"disk:/state/kv:{4 << 30}"


def test_the_disk_is_a_choice_and_so_is_the_cache() -> None:
    """No bytes: no folder, and the engines' own setting counts; --no-cache: neither folder nor service."""
    (engine,) = _engines(OPTIONS, load_settings({"CARAVAN_UP_KV_DISK_BYTES": "0"}))
    assert "CARAVAN_ENGINE_CACHE" in engine.environment
    assert "CARAVAN_ENGINE_KV_ROOTS" not in engine.environment
    options = replace(OPTIONS, cache=False)
    (engine,) = _engines(options)
    assert not {"CARAVAN_ENGINE_CACHE", "CARAVAN_ENGINE_KV_ROOTS"} & set(engine.environment)
    assert [planned.kind for planned in _plan(options).processes] == [
        "coordinator",
        "gateway",
        "envoy",
    ]


def test_what_is_stopped_last_is_what_others_need() -> None:
    """Engines save what they hold when they end: the cache service ends after them."""
    kinds = {planned.kind for planned in _plan(OPTIONS).processes}
    assert set(STOP_ORDER) == kinds | {"engine"}
    assert STOP_ORDER.index("engine") < STOP_ORDER.index("cache")


@pytest.mark.parametrize(
    ("options", "cores", "threads"),
    [
        (OPTIONS, 8, None),
        (replace(OPTIONS, engines=3), 8, 2),
        (replace(OPTIONS, engines=4), 2, 1),
        (replace(OPTIONS, models=(DEMO, SLOW)), 8, None),
        (replace(OPTIONS, threads=5, engines=2), 8, 5),
    ],
)
def test_engines_with_models_share_the_cores(
    options: UpOptions, cores: int, threads: int | None
) -> None:
    """Several llama.cpp engines split the cores; scripted ones do not count; --threads decides where it is given."""
    for engine in _engines(options, cores=cores):
        scripted = engine.model == "slow"
        expected = None if threads is None or scripted else str(threads)
        assert engine.environment.get("CARAVAN_ENGINE_THREADS") == expected


def test_settings_reach_the_processes() -> None:
    """Grace and niceness are passed on; engines keep their priority."""
    settings = load_settings({"CARAVAN_DRAIN_GRACE_S": "2.5", "CARAVAN_UP_FRONT_NICENESS": "7"})
    processes = [*_plan(OPTIONS, settings).processes, *_engines(OPTIONS, settings)]
    niceness = {planned.name: planned.niceness for planned in processes}
    assert niceness == {"coordinator": 7, "cache": 7, "engine-0": 0, "gateway": 7, "envoy": 7}
    services = [planned for planned in processes if planned.kind != "envoy"]
    assert {s.environment["CARAVAN_DRAIN_GRACE_S"] for s in services} == {"2.5"}


@given(
    public=st.integers(1, 65_535),
    engines=st.integers(1, ports.ENGINES_MAX),
    taken=st.sets(st.integers(20_000, 29_999), max_size=300),
)
def test_picked_ports_are_free_and_different(public: int, engines: int, taken: set[int]) -> None:
    """No port is given twice or was taken, and none lies where outgoing connections get theirs."""
    picked = ports.pick_ports(public, engines, lambda port: port not in taken)
    numbers = [port for _, port in picked.named()]
    assert len(numbers) == len(set(numbers)) == 8 + 2 * engines
    internal = set(numbers) - {public}
    assert not internal & taken
    assert all(20_000 <= port < 30_000 for port in internal)


def test_no_free_ports_is_an_error() -> None:
    """A pool without free ports is refused, not searched for ever."""
    with pytest.raises(ports.NoFreePortError):
        ports.pick_ports(9000, 1, lambda _: False)


def test_default_ports_never_overlap() -> None:
    """With the most engines that are allowed, all default ports are different."""
    numbers = [port for _, port in ports.default_ports(ports.ENGINES_MAX).named()]
    assert len(numbers) == len(set(numbers))


def test_a_deployment_says_how_its_engines_are_started() -> None:
    """Its options become their settings; what it leaves open is left to the engine."""
    wanted = Wanted("a", "/a.gguf", "r2", context_tokens=2048, max_sequences=7, threads=3)
    planner = EnginePlanner(OPTIONS, load_settings({}), _ports(OPTIONS), INSTALL, 8)
    listens = ports.EngineListens(4, 1, 2)
    environment = planner.plan(wanted, [wanted], listens).environment
    named = ("ID", "REVISION", "CONTEXT_TOKENS", "MAX_SEQUENCES", "THREADS")
    told = [environment[f"CARAVAN_ENGINE_{name}"] for name in named]
    assert told == ["engine-4", "r2", "2048", "7", "3"]
    environment = planner.plan(Wanted("a", "/a", "r"), [wanted], listens).environment
    assert "CARAVAN_ENGINE_CONTEXT_TOKENS" not in environment


def test_an_engine_in_front_of_a_provider() -> None:
    """Another module, told the provider and how to talk to it; no KV cache, no threads, and no share of the cores."""
    remote = Wanted("chat", "gpt-4o", "r3", provider="openai", remote_options='{"workers": 2}')
    local = Wanted("local", "/m.gguf", "r4")
    planner = EnginePlanner(
        replace(OPTIONS, threads=6), load_settings({}), _ports(OPTIONS), INSTALL, 8
    )
    listens = ports.EngineListens(4, 1, 2)
    engine = planner.plan(remote, [remote, local], listens)
    assert engine.argv == ("/usr/bin/python", "-P", "-m", "services.engine.remote")
    assert (engine.name, engine.kind, engine.model) == ("engine-4", "engine", "chat")
    told = {k: v for k, v in engine.environment.items() if not k.startswith("PYTHON")}
    assert told == {
        "CARAVAN_ENGINE_ADDRESS": "127.0.0.1:1",
        "CARAVAN_ENGINE_METRICS_ADDRESS": "127.0.0.1:2",
        "CARAVAN_ENGINE_ID": "engine-4",
        "CARAVAN_ENGINE_MODEL": "chat=gpt-4o",
        "CARAVAN_ENGINE_REVISION": "r3",
        "CARAVAN_ENGINE_COORDINATOR": "127.0.0.1:7002",
        "CARAVAN_REMOTE_PROVIDER": "openai",
        "CARAVAN_REMOTE_OPTIONS": '{"workers": 2}',
        "CARAVAN_DRAIN_GRACE_S": "10",
    }
    planner = replace(planner, options=OPTIONS)
    for_itself = planner.plan(local, [remote, local], listens)
    assert for_itself.argv[-1] == "services.engine"
    assert "CARAVAN_ENGINE_THREADS" not in for_itself.environment


def test_the_coordinator_is_told_of_deployments() -> None:
    """The file that was given, or one of the models; and where to keep what is applied."""
    (coordinator,) = _plan(OPTIONS).of_kind("coordinator")
    told = coordinator.environment
    assert told["CARAVAN_COORDINATOR_DEPLOYMENTS"] == "/state/models.toml"
    assert told["CARAVAN_COORDINATOR_DEPLOYMENTS_STATE"] == "/state/deployments.json"
    assert told["CARAVAN_COORDINATOR_SPEND_STATE"] == "/state/spend.jsonl"
    given = replace(OPTIONS, models=(), deployments=Path("/d.toml"))
    (coordinator,) = _plan(given).of_kind("coordinator")
    assert coordinator.environment["CARAVAN_COORDINATOR_DEPLOYMENTS"] == "/d.toml"


@pytest.mark.parametrize("public", [8080, 9000])
def test_engines_that_come_later_get_free_ports(public: int) -> None:
    """The lowest number that is free, with ports that nobody has; none is given twice; they come back."""
    chosen = (
        ports.default_ports(1) if public == 8080 else ports.pick_ports(public, 1, lambda _: True)
    )
    taken = {chosen.engines[0], 7011}
    listening = ports.EnginePorts(chosen, lambda port: port not in taken)
    given = [listening.take() for _ in range(10)]
    numbers = [port for each in given for port in (each.port, each.metrics)]
    assert len(set(numbers)) == 20
    assert not taken & set(numbers)
    assert not {port for name, port in chosen.named() if "engine" not in name} & set(numbers)
    listening.give_back(given[3].number)
    assert listening.take() == given[3]
    for _ in range(ports.ENGINES_MAX):
        try:
            listening.take()
        except ports.NoFreePortError:
            break
    else:
        pytest.fail("more engines than a machine gets")


def test_models_become_deployments() -> None:
    """What --model says is a file of deployments, whatever is in its text."""
    odd = ModelSource("x", 'scripted:?text=a "b" \\ ä 😀')
    text = models_text((DEMO, odd), 3)
    read = read_deployments(text, Path("/"))
    assert read.mistakes == []
    assert [(d.name, d.model, d.replicas) for d in read.deployments] == [
        ("demo", "/models/demo.gguf", 3),
        ("x", odd.source, 3),
    ]
