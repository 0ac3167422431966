"""kill -9 of engines that answer: their clients are told what they would have been told (I1)."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest

from tests.support.chaos_rounds import ENGINES, MODEL, Rounds
from tests.support.chaos_stack import Chaos
from tests.support.stack import DEMO

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not DEMO.exists(), reason="models/caravan-demo.gguf is absent"),
]
KILLS = 12


@pytest.fixture(scope="module")
def with_demo(chaos: Chaos) -> Iterator[Chaos]:
    """Two engines of the demo model, that the test starts again itself."""
    for name in ENGINES:
        # One thread: the number of threads must not change the last bits of what is compared.
        chaos.add_engine(name, MODEL, str(DEMO), CARAVAN_ENGINE_THREADS="1")
    chaos.wait_until_ready(MODEL, len(ENGINES))
    yield chaos
    for name in ENGINES:
        chaos.engines.pop(name).kill()


def test_killed_at_a_random_token(with_demo: Chaos, chaos: Chaos, random: Random) -> None:
    """Streamed, plain and typed, greedy, sampled and with tools: the same text, tokens and usage, one end."""
    rounds = Rounds(chaos, random)
    while rounds.kills < KILLS:
        rounds.run(clients=random.choice((1, 1, 2)), deaths=random.choice((1, 1, 2)))
        chaos.wait_until_nothing_is_left()
    # Some have their whole answer before the kill arrives, and some kills hit two.
    assert chaos.moved() >= KILLS / 3


def test_no_engine_is_left(with_demo: Chaos, chaos: Chaos, random: Random) -> None:
    """All engines die at once: the answers go on where they were, when one is back."""
    rounds = Rounds(chaos, random)
    while not rounds.kills:
        rounds.run(clients=1, engines_left=False)
