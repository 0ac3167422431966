"""Services that stand still for a while (SIGSTOP) and go on: nobody is judged for the time in which nobody could speak."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest

from tests.support.chaos_load import Load
from tests.support.chaos_stack import PATIENCE_S, Chaos
from tests.support.waiting import wait_for

pytestmark = pytest.mark.e2e


@contextlib.contextmanager
def standing_still(chaos: Chaos, name: str) -> Iterator[None]:
    """The process does nothing meanwhile."""
    pid = chaos.stack.pids()[name]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_services_that_stand_still(chaos: Chaos, load: Load) -> None:
    """Cache, coordinator and gateway, each long enough to be missed by its peers: every client gets its whole answer."""
    with standing_still(chaos, "cache"):
        load.wait_for_answers(load.clients)
    with standing_still(chaos, "coordinator"):
        wait_for(lambda: not chaos.gateway_has_joined(), "the gateway misses it", PATIENCE_S)
    load.wait_for_answers(load.clients)
    with standing_still(chaos, "gateway"):
        missed = "the coordinator misses it"
        wait_for(lambda: not chaos.series("coordinator", "caravan_gateways"), missed, PATIENCE_S)
    wait_for(chaos.gateway_has_joined, "the gateway has joined", PATIENCE_S)
    load.wait_for_answers(load.clients)
    load.stop()
    assert not load.failures, load.told
