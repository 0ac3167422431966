"""Each process ends under load, by kill -9 or in order, and is started again: who is not needed for a token is not missed."""

from __future__ import annotations

import signal
import time

import pytest

from tests.support.chaos_load import Load
from tests.support.chaos_stack import Chaos

pytestmark = pytest.mark.e2e


def test_nobody_notices_a_death(chaos: Chaos, load: Load) -> None:
    """Running answers go on, new ones wait: no client sees it. The gateway counts as many requests as there were."""
    before = chaos.series("gateway", "caravan_requests_total") - load.asked
    for names in (("engine-0",), ("cache",), ("coordinator", "engine-1")):
        chaos.end_processes(signal.SIGKILL, *names)
        load.wait_for_answers(load.clients)
        assert not load.failures, f"{names}: {load.told}"
    load.stop()
    assert not load.failures, load.told
    chaos.wait_until_nothing_is_left()
    assert chaos.series("gateway", "caravan_requests_total") - before == load.asked


@pytest.mark.parametrize("name", ["gateway", "envoy"])
def test_the_way_breaks(chaos: Chaos, load: Load, name: str) -> None:
    """Those whose connection broke are told; those who ask when it is back are answered; the engines are free at once."""
    chaos.end_processes(signal.SIGKILL, name)
    back = time.monotonic()
    load.wait_for_answers(load.clients)
    load.stop()
    assert all(failure.broken for failure in load.failures), load.told
    late = [str(failure) for failure in load.failures if failure.asked_at > back]
    assert not late, late


def test_nobody_notices_an_end_in_order(chaos: Chaos, load: Load) -> None:
    """SIGTERM: what runs finishes or moves, what comes waits or is sent again; no client sees it."""
    for name in ("engine-1", "coordinator", "cache", "gateway"):
        chaos.end_processes(signal.SIGTERM, name)
        load.wait_for_answers(load.clients)
        assert not load.failures, f"{name}: {load.told}"
    load.stop()
    assert not load.failures, load.told
