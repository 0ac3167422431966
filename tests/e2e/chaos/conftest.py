"""Stacks whose processes may be killed, stopped and restarted, and that must always be found empty again."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest

from tests.support.chaos_load import MODEL, SOURCE, Load
from tests.support.chaos_stack import STALL_S, Chaos, chaos_on, seeded
from tests.support.stack import running

ENVIRONMENT = {
    "CARAVAN_GATEWAY_STALL_S": str(STALL_S),
    "CARAVAN_ENGINE_PROGRESS_S": "0.3",
    "CARAVAN_GATEWAY_KEEPALIVE_S": "0.5",
    # A dead peer is noticed by its silence in 1.5 s instead of 3.
    "CARAVAN_COORDINATOR_INTERVAL_S": "0.5",
}


@pytest.fixture(scope="package")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    """Two supervised engines of the scripted model; tests add engines of other models."""
    folder = tmp_path_factory.mktemp("chaos") / "state"
    with (
        running(folder, {MODEL: SOURCE}, "--engines", "2", environment=ENVIRONMENT) as stack,
        chaos_on(stack) as chaos,
    ):
        yield chaos


@pytest.fixture
def random() -> Random:
    """From CARAVAN_CHAOS_SEED."""
    return seeded()


@pytest.fixture
def load(chaos: Chaos, random: Random) -> Iterator[Load]:
    """Eight clients of the scripted model, all of whose answers must be right."""
    chaos.wait_until_ready(MODEL, 2)
    load = Load(chaos, random)
    load.start()
    yield load
    load.stop()


@pytest.fixture(autouse=True)
def nothing_is_left_anywhere(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test no process holds anything of a request (I6)."""
    yield
    if "chaos" in request.fixturenames:
        chaos: Chaos = request.getfixturevalue("chaos")
        chaos.wait_until_nothing_is_left()
