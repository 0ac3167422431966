"""The process plan: ports, names, environment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cli import ports
from services.cli.model_sources import ModelSource
from services.cli.plan import (
    STOP_ORDER,
    Installation,
    Plan,
    UpOptions,
    engine_threads,
    make_plan,
)
from services.cli.settings import UpSettings, load_settings

INSTALL = Installation("/usr/bin/python", "/opt/envoy", Path("/opt/caravan/deploy/envoy"))
DEMO = ModelSource("demo", "/models/demo.gguf")
SLOW = ModelSource("slow", "scripted:?step_ms=20&load_ms=5")
OPTIONS = UpOptions(8080, (DEMO,), 1, Path("/state"))


def _plan(options: UpOptions, settings: UpSettings | None = None, cores: int = 8) -> Plan:
    engines = len(options.models) * options.engines
    settings = settings or load_settings({})
    return make_plan(options, settings, ports.default_ports(engines), INSTALL, cores)


def test_default_ports_are_the_documented_ones() -> None:
    """The addresses that the documentation names."""
    plan = _plan(replace(OPTIONS, engines=2))
    assert {planned.name: (planned.address, planned.metrics) for planned in plan.processes} == {
        "coordinator": ("127.0.0.1:7002", "http://127.0.0.1:9102/metrics"),
        "cache": ("127.0.0.1:7003", "http://127.0.0.1:9103/metrics"),
        "engine-0": ("127.0.0.1:7010", "http://127.0.0.1:9110/metrics"),
        "engine-1": ("127.0.0.1:7011", "http://127.0.0.1:9111/metrics"),
        "gateway": ("127.0.0.1:7001", "http://127.0.0.1:9101/metrics"),
        "envoy": ("127.0.0.1:8080", "http://127.0.0.1:9901/stats/prometheus"),
    }


def test_each_model_gets_its_engines() -> None:
    """N engines per model, numbered through, each told its model and the coordinator."""
    plan = _plan(replace(OPTIONS, models=(DEMO, SLOW), engines=2))
    engines = plan.of_kind("engine")
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
    gateway = plan.of_kind("gateway")[0].environment
    assert gateway["CARAVAN_GATEWAY_COORDINATOR"] == "127.0.0.1:7002"


def test_engines_share_the_cache_service_and_a_folder() -> None:
    """All engines get one folder, the same at each start, with its quota; the service runs before them."""
    plan = _plan(replace(OPTIONS, models=(DEMO, SLOW)), load_settings({}))
    names = [planned.name for planned in plan.processes]
    assert names.index("cache") < names.index("engine-0")
    (cache,) = plan.of_kind("cache")
    assert cache.argv[-1] == "services.cache"
    assert cache.environment["CARAVAN_CACHE_ADDRESS"] == "127.0.0.1:7003"
    assert cache.environment["CARAVAN_CACHE_METRICS_ADDRESS"] == "127.0.0.1:9103"
    for engine in plan.of_kind("engine"):
        assert engine.environment["CARAVAN_ENGINE_CACHE"] == "127.0.0.1:7003"
        assert engine.environment["CARAVAN_ENGINE_KV_ROOTS"] == f"disk:/state/kv:{4 << 30}"


def test_the_disk_is_a_choice_and_so_is_the_cache() -> None:
    """No bytes: no folder, and the engines' own setting counts; --no-cache: neither folder nor service."""
    plan = _plan(OPTIONS, load_settings({"CARAVAN_UP_KV_DISK_BYTES": "0"}))
    (engine,) = plan.of_kind("engine")
    assert "CARAVAN_ENGINE_CACHE" in engine.environment
    assert "CARAVAN_ENGINE_KV_ROOTS" not in engine.environment
    plan = _plan(replace(OPTIONS, cache=False))
    (engine,) = plan.of_kind("engine")
    assert not {"CARAVAN_ENGINE_CACHE", "CARAVAN_ENGINE_KV_ROOTS"} & set(engine.environment)
    assert [planned.kind for planned in plan.processes] == [
        "coordinator",
        "engine",
        "gateway",
        "envoy",
    ]


def test_what_is_stopped_last_is_what_others_need() -> None:
    """Engines save what they hold when they end: the cache service ends after them."""
    assert set(STOP_ORDER) == {planned.kind for planned in _plan(OPTIONS).processes}
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
    assert engine_threads(options, cores) == threads
    for engine in _plan(options, cores=cores).of_kind("engine"):
        scripted = engine.model == "slow"
        expected = None if threads is None or scripted else str(threads)
        assert engine.environment.get("CARAVAN_ENGINE_THREADS") == expected


def test_settings_reach_the_processes() -> None:
    """Grace and niceness are passed on; engines keep their priority."""
    settings = load_settings({"CARAVAN_DRAIN_GRACE_S": "2.5", "CARAVAN_UP_FRONT_NICENESS": "7"})
    plan = _plan(OPTIONS, settings)
    niceness = {planned.name: planned.niceness for planned in plan.processes}
    assert niceness == {"coordinator": 7, "cache": 7, "engine-0": 0, "gateway": 7, "envoy": 7}
    services = [planned for planned in plan.processes if planned.kind != "envoy"]
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
