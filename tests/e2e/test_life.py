"""The life of `caravan up`: deaths, restarts, the end."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import pytest

from services.cli import ports
from tests.support.stack import CHAT, Stack, alive, chat_body, endless, running
from tests.support.waiting import wait_for

pytestmark = pytest.mark.e2e
MODELS = {"fast": "scripted:?", "slow": "scripted:?step_ms=20"}
LOADING = {"loading": "scripted:?load_ms=1500"}


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose processes may be killed."""
    with running(tmp_path_factory.mktemp("mortal"), MODELS | LOADING) as stack:
        yield stack


def _answers(stack: Stack, model: str = "fast") -> bool:
    try:
        with httpx.Client(base_url=stack.url, timeout=10) as client:
            return client.post(CHAT, json=chat_body(model, max_tokens=2)).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("name", ["engine-0", "gateway", "coordinator", "cache", "envoy"])
def test_what_is_killed_comes_back(mortal: Stack, name: str) -> None:
    """kill -9 of any process: it runs again at the same address, endpoints.json is true, requests work, others stayed; of an
    engine it is told."""
    before = mortal.processes()
    os.kill(before[name]["pid"], signal.SIGKILL)
    wait_for(lambda: mortal.pids().get(name) != before[name]["pid"], "its death is known")
    wait_for(lambda: name in mortal.pids() and _answers(mortal), "it works again", 60)
    after = mortal.processes()
    changed = {n for n in before if before[n]["pid"] != after[n]["pid"]}
    assert changed == {name}
    assert after[name] | {"pid": 0} == before[name] | {"pid": 0}
    assert any(line.startswith(f"{name} was ended by SIGKILL") for line in mortal.lines)
    if name.startswith("engine"):
        wait_for(lambda: f"{name} is ready again" in mortal.lines, "its return is told", 5)
    mortal.wait_until_free()


def _texts(lines: Iterable[str]) -> list[str]:
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]


def test_a_death_in_mid_answer_is_not_noticed(mortal: Stack) -> None:
    """An engine that dies under a stream comes back and goes on: the text of one that lived, one end, the lease released."""
    body = chat_body("slow", seed=3, max_tokens=60, ignore_eos=True, stream=True)
    with httpx.Client(base_url=mortal.url, timeout=60) as client:
        expected = _texts(client.post(CHAT, json=body).text.split("\n\n"))
        with client.stream("POST", CHAT, json=body) as response:
            lines = response.iter_lines()
            first = next(lines)
            os.kill(mortal.pids()["engine-1"], signal.SIGKILL)
            rest = [line for line in lines if line]
    assert "".join(_texts([first, *rest])) == "".join(expected)
    assert rest[-1] == "data: [DONE]"
    assert not any('"error"' in line for line in rest)
    mortal.wait_until_free()


def test_a_model_that_loads_again_stays_known(mortal: Stack) -> None:
    """While its only engine is being replaced a request waits (it had a lease on the dead one), or gets 503 with Retry-After."""
    os.kill(mortal.pids()["engine-2"], signal.SIGKILL)
    wait_for(lambda: "engine-2" not in mortal.pids(), "its death is known")
    codes = set()
    with httpx.Client(base_url=mortal.url, timeout=20) as client:

        def answered() -> bool:
            response = client.post(CHAT, json=chat_body("loading", max_tokens=2))
            if response.status_code == 200:
                return True
            assert response.status_code == 503, response.text
            assert int(response.headers["retry-after"]) >= 1
            codes.add(response.json()["error"]["code"])
            return False

        wait_for(answered, "the model answers again", 60)
    assert codes <= {"model_loading", "no_engine", "engine_lost", "service_unavailable"}


def _listening(stack: Stack) -> list[str]:
    addresses = [process["address"] for process in stack.processes().values()]
    return [a for a in addresses if not ports.is_free(int(a.rpartition(":")[2]))]


def test_ctrl_c_finishes_what_runs(tmp_path: Path) -> None:
    """Ctrl-C: the running stream ends whole, code 0, no process, no port, no endpoints.json left."""
    with running(tmp_path, MODELS) as stack:
        pids = list(stack.pids().values())
        addresses = _listening(stack)
        assert len(addresses) == len(pids) == 6
        body = chat_body("slow", max_tokens=50, ignore_eos=True, stream=True)
        with (
            httpx.Client(base_url=stack.url, timeout=20) as client,
            client.stream("POST", CHAT, json=body) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            stack.interrupt()
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert stack.process.wait(30) == 0
        assert alive(pids) == []
        assert all(ports.is_free(int(a.rpartition(":")[2])) for a in addresses)
        assert not (tmp_path / "endpoints.json").exists()


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    """The second Ctrl-C does not wait for a stream that would run for long; nothing is left."""
    with running(tmp_path, {"slow": "scripted:?step_ms=20"}) as stack:
        pids = list(stack.pids().values())
        begun = threading.Event()

        def read() -> None:
            with httpx.Client(base_url=stack.url, timeout=30) as client:
                try:
                    with client.stream("POST", CHAT, json=endless("slow", stream=True)) as response:
                        for _ in response.iter_raw():
                            begun.set()
                except httpx.TransportError:
                    return

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(10)
        stack.interrupt()
        wait_for(
            lambda: any("Ctrl-C again" in line for line in stack.lines), "it says what it does"
        )
        stack.interrupt()
        stack.process.wait(8)
        reader.join(10)
        assert alive(pids) == []


def test_kill_9_of_the_command_leaves_no_orphan(tmp_path: Path) -> None:
    """When `caravan up` itself is killed its processes end, and the state directory can be used again."""
    with running(tmp_path, {"fast": "scripted:?"}) as stack:
        pids = list(stack.pids().values())
        stack.process.kill()
        stack.process.wait()
        wait_for(lambda: not alive(pids), "all processes are gone", 20)
    with running(tmp_path, {"fast": "scripted:?"}) as stack:
        assert _answers(stack)
