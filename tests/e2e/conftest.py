"""One whole stack for all tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.otlp_collector import Collector, collecting
from tests.support.stack import DEMO, Stack, running

MODELS = {
    "fast": "scripted:?",
    "slow": "scripted:?step_ms=20",
    "prefill": "scripted:?prefill_ms_per_token=5",
}
SEQUENCES = 8


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starting a stack takes 3 s alone and half a minute beside other work; a test may start two."""
    for item in items:
        if Path(__file__).parent in item.path.parents and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(240))


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Keeps the spans that the stack sends."""
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Stack]:
    """Real Envoy, gateway, coordinator, scripted engines, and the demo model where it is present."""
    models = dict(MODELS)
    if DEMO.exists():
        models["demo"] = str(DEMO)
    environment = {
        "CARAVAN_ENGINE_MAX_SEQUENCES": str(SEQUENCES),
        "CARAVAN_GATEWAY_KEEPALIVE_S": "0.3",
        "CARAVAN_OTLP_ENDPOINT": collector.endpoint,
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    folder = tmp_path_factory.mktemp("stack") / "state"
    with running(folder, models, environment=environment) as stack:
        yield stack


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx.Client]:
    """A client of the REST API."""
    with httpx.Client(base_url=stack.url, timeout=30) as client:
        yield client


@pytest.fixture
def demo(stack: Stack) -> str:
    """Name of the demo model; skips where the file is absent."""
    if not DEMO.exists():
        pytest.skip("models/caravan-demo.gguf is absent")
    return "demo"


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test of the shared stack, no lease, request or sequence is held (I6)."""
    yield
    if "stack" in request.fixturenames:
        stack: Stack = request.getfixturevalue("stack")
        stack.wait_until_free()
