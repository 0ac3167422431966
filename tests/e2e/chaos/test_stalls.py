"""Engines that say nothing any more, and are not dead: their requests move within the time of a stall (I1)."""

from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from random import Random

import httpx
import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator.limits import RETURN_S
from tests.support.chaos_clients import Question, Said, streamed, typed
from tests.support.chaos_load import MODEL, SOURCE, questions
from tests.support.chaos_proxy import FreezingProxy, freezing_proxy
from tests.support.chaos_stack import STALL_S, Chaos
from tests.support.stack import CHAT, endless
from tests.support.waiting import wait_for

pytestmark = pytest.mark.e2e
MOVED_S = STALL_S * 1.25
"""Silence is measured in four ticks, so it takes a quarter more at most."""
MARGIN_S = 6.0
"""For a machine that does other things, far below any other timeout."""


class Interrupted:
    """A stream that is interrupted once, when it has had some of its answer; `seen` is for the client."""

    def __init__(self, at: int) -> None:
        self._at = at
        self.engine_id = ""
        self.since = 0.0

    def watch(self, chaos: Chaos, events: int) -> str:
        """The engine that serves, once: when it is time."""
        if self.engine_id or events < self._at:
            return ""
        self.engine_id = chaos.serving(MODEL)
        self.since = time.monotonic()
        return self.engine_id


def _undisturbed(chaos: Chaos, question: Question) -> Said:
    return typed(chaos.door, MODEL, question, lambda _: None)


@pytest.mark.parametrize("api", ["streamed", "typed"])
def test_a_process_that_stands_still(chaos: Chaos, random: Random, api: str) -> None:
    """SIGSTOP in mid-answer: the rest comes from the other engine; when it goes on, its old attempt has no effect."""
    chaos.wait_until_ready(MODEL, 2)
    question = questions(random, 1)[0]
    expected = _undisturbed(chaos, question)
    stopped = Interrupted(at=10)
    ends: list[int] = []

    def seen(events: int) -> None:
        engine_id = stopped.watch(chaos, events)
        if engine_id:
            ends.append(chaos.stack.pids()[engine_id])
            os.kill(ends[0], signal.SIGSTOP)

    try:
        if api == "typed":
            said = typed(chaos.door, MODEL, question, seen)
        else:
            said = streamed(chaos.stack.url, MODEL, question, seen)
        took_s = time.monotonic() - stopped.since
        assert said == expected
        assert ends, "the engine was not stopped"
        assert took_s < MOVED_S + MARGIN_S
    finally:
        for pid in ends:
            os.kill(pid, signal.SIGCONT)
    chaos.wait_until_ready(MODEL, 2)
    chaos.wait_until_nothing_is_left()
    assert _undisturbed(chaos, question) == expected


def test_the_only_engine_stands_still_for_a_while(chaos: Chaos, random: Random) -> None:
    """There is no other to go on with the answer, so it goes on there, a short while after the engine is back."""
    chaos.wait_until_ready(MODEL, 2)
    other = chaos.stack.engine_names()[1]
    chaos.drain(other)
    question = questions(random, 1)[0]
    expected = _undisturbed(chaos, question)
    stopped = Interrupted(at=10)

    def go_on(pid: int) -> None:
        try:
            waits = pb.INFLIGHT_PHASE_QUEUED
            wait_for(
                lambda: [r for r in chaos.inflight() if r.phase == waits], "it waits for another"
            )
        finally:
            os.kill(pid, signal.SIGCONT)

    with ThreadPoolExecutor(max_workers=1) as pool:
        going_on: list[Future[None]] = []

        def seen(events: int) -> None:
            engine_id = stopped.watch(chaos, events)
            if engine_id:
                pid = chaos.stack.pids()[engine_id]
                os.kill(pid, signal.SIGSTOP)
                going_on.append(pool.submit(go_on, pid))

        said = typed(chaos.door, MODEL, question, seen)
        took_s = time.monotonic() - stopped.since
    assert said == expected
    going_on[0].result()
    assert took_s < MOVED_S + RETURN_S + MARGIN_S
    chaos.undrain(other)
    chaos.wait_until_ready(MODEL, 2)
    chaos.wait_until_nothing_is_left()


def test_a_client_that_leaves_a_process_that_stands_still(chaos: Chaos) -> None:
    """Its lease is free at once, and the sequence as soon as the process goes on (I5)."""
    chaos.wait_until_ready(MODEL, 2)
    with (
        httpx.Client(base_url=chaos.stack.url, timeout=30) as client,
        client.stream("POST", CHAT, json=endless(MODEL, stream=True)) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        pid = chaos.stack.pids()[chaos.serving(MODEL)]
        os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(lambda: not chaos.inflight(), "the lease is free")
    finally:
        os.kill(pid, signal.SIGCONT)
    chaos.wait_until_ready(MODEL, 2)
    chaos.wait_until_nothing_is_left()


class Registration:
    """Keeps an engine known to the coordinator at an address of the test's choice: the engine itself has no such setting."""

    def __init__(self, chaos: Chaos, engine_id: str, address: str) -> None:
        self._engine_id = engine_id
        self._address = address
        self._stop: queue.Queue[None] = queue.Queue()
        self._call = chaos.coordinator.JoinEngine(self._messages())
        next(self._call)

    def _messages(self) -> Iterator[pb.JoinEngineRequest]:
        load = engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_IDLE)
        registration = pb.EngineRegistration(
            engine_id=self._engine_id,
            address=self._address,
            model=engine_pb.ModelInfo(name=MODEL, max_sequences=8, context_tokens=4096),
            load=load,
            incarnation="one-life",
        )
        yield pb.JoinEngineRequest(register=registration)
        while True:
            try:
                return self._stop.get(timeout=0.3)
            except queue.Empty:
                yield pb.JoinEngineRequest(report=pb.EngineReport(load=load))

    def end(self) -> None:
        """The engine leaves."""
        self._stop.put(None)
        self._call.cancel()


@pytest.fixture
def proxied(chaos: Chaos) -> Iterator[FreezingProxy]:
    """A third engine, `proxied`, that can be reached through a proxy only; the two others are out of service meanwhile."""
    alone = {"CARAVAN_ENGINE_COORDINATOR": ""}
    engine = chaos.add_engine("proxied", MODEL, SOURCE, **alone)
    with freezing_proxy(engine.environment["CARAVAN_ENGINE_ADDRESS"]) as proxy:
        chaos.wait_until_serving(engine)
        registration = Registration(chaos, "proxied", proxy.address)
        others = chaos.stack.engine_names()
        for name in others:
            chaos.drain(name)
        yield proxy
        registration.end()
    chaos.engines.pop("proxied").kill()
    for name in others:
        chaos.undrain(name)


def test_a_connection_that_leads_nowhere(
    chaos: Chaos, proxied: FreezingProxy, random: Random
) -> None:
    """No byte passes, and nothing is closed: the stream moves, though the engine and its registration seem well."""
    question = questions(random, 1)[0]
    expected = _undisturbed(chaos, question)
    cut = Interrupted(at=10)

    def seen(events: int) -> None:
        if cut.watch(chaos, events):
            proxied.freeze()
            for name in chaos.stack.engine_names():
                chaos.undrain(name)

    said = streamed(chaos.stack.url, MODEL, question, seen)
    took_s = time.monotonic() - cut.since
    assert cut.engine_id == "proxied"
    assert took_s < MOVED_S + MARGIN_S
    assert said == expected
    proxied.thaw()
    chaos.wait_until_nothing_is_left()
