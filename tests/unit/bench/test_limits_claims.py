"""How the bench of limits counts, and what it claims."""

from __future__ import annotations

import pytest

from bench import limits
from bench.limits_world import Sent, World, most_within, within
from services.runtime.rate_limiter import Quota

SENT = [Sent(0.0, 5), Sent(30.0, 1), Sent(59.9, 1), Sent(60.0, 7), Sent(61.0, 1)]


def test_a_span_holds_its_beginning_and_not_its_end() -> None:
    assert most_within(SENT, 60.0, tokens=False) == 4
    assert most_within(SENT, 60.0, tokens=True) == 10
    assert most_within([], 60.0, tokens=False) == 0
    assert within(SENT, 0.0, 60.0, tokens=True) == 7
    assert within(SENT, 60.0, 120.0, tokens=False) == 2


@pytest.mark.parametrize(
    ("over", "unused", "strictly_over", "kept"),
    [
        (5.0, 10.0, 0.0, [True, True, True, True]),
        (5.1, 10.1, 0.1, [False, False, False, False]),
    ],
)
def test_the_worst_scenario_is_judged(
    over: float, unused: float, strictly_over: float, kept: list[bool]
) -> None:
    best = limits.Found(0.0, 0.0, 0.0)
    found = [(scenario, best) for scenario in limits.SCENARIOS]
    for scenario, worst in (
        ("one joins", limits.Found(0.0, over, unused)),
        ("strict, tokens", limits.Found(0.0, strictly_over, unused)),
        ("10 a minute", limits.Found(90.0, 90.0, 90.0)),
    ):
        at = next(i for i, (one, _) in enumerate(found) if one.name == scenario)
        found[at] = (found[at][0], worst)
    assert [claim.kept for claim in limits.report(found, seeds=1).claims] == kept


def test_the_same_seed_gives_the_same_run() -> None:
    def sent(seed: int) -> list[Sent]:
        world = World(Quota(600), lambda *_: 25.0, seed=seed)
        for engine in range(3):
            world.join(engine)
        world.run(20.0)
        return world.sent

    assert sent(1) == sent(1)
    assert sent(1) != sent(2)


def test_an_unlimited_flood_would_be_seen() -> None:
    """The bench does measure: with limits ten times as large, ten times as much goes beyond."""
    scenario = limits.SCENARIOS[0]
    found = limits.measure(scenario, seed=0)
    assert found.over_sliding < limits.OVER_MAX
    world = World(Quota(10 * limits.REQUESTS), scenario.offered, seed=0)
    for engine in range(4):
        world.join(engine)
    world.run(120.0)
    assert most_within(world.sent, 60.0, tokens=False) > 5 * limits.REQUESTS
