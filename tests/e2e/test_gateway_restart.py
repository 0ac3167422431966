"""A gateway that is restarted under load, behind the real Envoy: a delay for who arrives, a clear end for what ran."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.support.stack import CHAT, Stack, chat_body, endless, running
from tests.support.waiting import wait_for

pytestmark = pytest.mark.e2e
MODELS = {"fast": "scripted:?", "slow": "scripted:?step_ms=20"}


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose gateway may be killed."""
    with running(tmp_path_factory.mktemp("restarted"), MODELS) as stack:
        yield stack


def _ask(stack: Stack) -> int:
    with httpx.Client(base_url=stack.url, timeout=30) as client:
        return client.post(CHAT, json=chat_body("fast", max_tokens=2)).status_code


def _plain(stack: Stack) -> httpx.Response:
    with httpx.Client(base_url=stack.url, timeout=30) as client:
        return client.post(CHAT, json=endless("slow"))


def _arrivals_during(stack: Stack, number: signal.Signals) -> list[int]:
    """Ends the gateway by a signal; the statuses of requests that arrive from then on until it is back."""
    before = stack.pids()["gateway"]
    os.kill(before, number)
    statuses: list[int] = []
    with ThreadPoolExecutor(8) as pool:

        def back() -> bool:
            statuses.extend(pool.map(lambda _: _ask(stack), range(8)))
            return stack.pids().get("gateway", before) != before

        wait_for(back, "the gateway is back", 60)
    return statuses


def test_a_gateway_that_is_killed(mortal: Stack) -> None:
    """kill -9: a plain request that ran gets 503, a stream breaks off; who arrives meanwhile is answered a little later."""
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=mortal.url, timeout=30) as client:
        plain = pool.submit(_plain, mortal)
        wait_for(lambda: len(mortal.leases()) == 1, "a plain request runs")
        with client.stream("POST", CHAT, json=endless("slow", stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            statuses = _arrivals_during(mortal, signal.SIGKILL)
            rest: list[str] = []
            with pytest.raises(httpx.TransportError):
                # What came before the end stays in the list.
                rest.extend(lines)
            assert "data: [DONE]" not in rest
        refused = plain.result()
    assert set(statuses) == {200}
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "service_unavailable"
    mortal.wait_until_free()


def test_a_gateway_that_is_shut_down(mortal: Stack) -> None:
    """SIGTERM: a stream that runs ends whole, and who arrives meanwhile is answered by the next gateway."""
    body = chat_body("slow", max_tokens=100, ignore_eos=True, stream=True)
    with (
        httpx.Client(base_url=mortal.url, timeout=30) as client,
        client.stream("POST", CHAT, json=body) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        statuses = _arrivals_during(mortal, signal.SIGTERM)
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    assert set(statuses) == {200}
    mortal.wait_until_free()
