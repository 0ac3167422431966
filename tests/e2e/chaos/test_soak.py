"""The same for longer: a hundred deaths, every process in turn, and memory that stays where it was.

CARAVAN_CHAOS_SEED chooses another order, CARAVAN_CHAOS_KILLS and CARAVAN_CHAOS_RESTARTS another length.
"""

from __future__ import annotations

import os
import signal
from random import Random
from typing import Final

import pytest

from tests.support.chaos_load import Load
from tests.support.chaos_rounds import ENGINES, MODEL, Rounds
from tests.support.chaos_stack import Chaos
from tests.support.stack import DEMO

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(3600)]
KILLS: Final = int(os.environ.get("CARAVAN_CHAOS_KILLS", "100"))
WARM_KILLS: Final = max(1, KILLS // 5)
RESTARTS: Final = int(os.environ.get("CARAVAN_CHAOS_RESTARTS", "25"))
GROWTH_BYTES: Final = 24 << 20
"""Of a process between its first and its last fifth; a request that leaks its prompt and tokens would show in hundreds."""
STAYED: Final = ("gateway", "coordinator", "cache")
PROCESSES: Final = ("engine-0", "engine-1", "coordinator", "cache", "gateway", "envoy")


@pytest.mark.skipif(not DEMO.exists(), reason="models/caravan-demo.gguf is absent")
def test_a_hundred_deaths(chaos: Chaos, random: Random) -> None:
    """Every answer is the undisturbed one; nothing is left after any; the processes that stay do not grow."""
    for name in ENGINES:
        chaos.add_engine(name, MODEL, str(DEMO), CARAVAN_ENGINE_THREADS="1")
    chaos.wait_until_ready(MODEL, len(ENGINES))
    rounds = Rounds(chaos, random)
    warm: dict[str, int] = {}
    while rounds.kills < KILLS:
        if random.random() < 0.1:
            rounds.run(clients=1, engines_left=False)
        else:
            rounds.run(clients=random.randint(1, 4), deaths=random.choice((1, 1, 2)))
        chaos.wait_until_nothing_is_left()
        if not warm and rounds.kills >= WARM_KILLS:
            warm = chaos.resident_bytes()
    assert chaos.moved() >= KILLS / 3
    grown = {name: chaos.resident_bytes()[name] - warm[name] for name in STAYED}
    print(f"kills: {rounds.kills}, moved: {chaos.moved():g}, grown: {grown}")
    assert all(growth < GROWTH_BYTES for growth in grown.values()), grown
    for name in ENGINES:
        chaos.engines.pop(name).kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_every_process_again_and_again(
    chaos: Chaos, random: Random, number: signal.Signals
) -> None:
    """Under load, in random order; only the ways to the client may be missed, and only by those who were on them."""
    for _ in range(RESTARTS):
        name = random.choice(PROCESSES)
        print(f"{name} gets {number.name}")
        load = Load(chaos, random)
        load.start()
        chaos.end_processes(number, name)
        load.wait_for_answers(load.clients)
        load.stop()
        may_break = name == "envoy" or (name == "gateway" and number == signal.SIGKILL)
        unexpected = [f for f in load.failures if not (may_break and f.broken)]
        assert not unexpected, f"{name}: {load.told}"
        chaos.wait_until_nothing_is_left()
