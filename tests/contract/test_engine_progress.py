"""Streams with nothing to send say that they are alive, as long as the engine works."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from caravan.engine.v1 import engine_service_pb2 as pb

from services.engine.outbox import Outbox
from services.engine.progress import ProgressTimer
from services.runtime.generate_events import each
from tests.support.engine import running_engine


async def test_a_long_prompt_tells_how_far_it_is() -> None:
    """Progress grows up to the length of the prompt; an answer that comes fast has none."""
    model = "demo=scripted:?prefill_ms_per_token=0.6&tokens=5&context=8000"
    async with running_engine(model, PROGRESS_S="0.05") as client:
        answer = await client.ask([65] * 2000)
        done = [event.prompt_tokens_done for event in answer.progress]
        assert len(done) >= 3
        assert done == sorted(done)
        assert 0 < done[0] < done[-1] <= 2000
        assert (await client.ask([66] * 20)).progress == []


async def test_a_request_that_waits_hears_that_others_go_on() -> None:
    """Without a sequence of its own it is told that nothing of its prompt is done; one that generates needs no telling."""
    model = "demo=scripted:?step_ms=2&tokens=250"
    async with running_engine(model, PROGRESS_S="0.05", MAX_SEQUENCES="1") as client:
        first = asyncio.ensure_future(client.ask("hi"))
        await client.until(lambda load: load.active_sequences == 1)
        second = asyncio.ensure_future(client.ask("ho"))
        assert (await first).progress == []
        waited = (await second).progress
        assert len(waited) >= 3
        assert {event.prompt_tokens_done for event in waited} == {0}


async def test_a_decode_that_hangs_is_silence() -> None:
    """Neither the stream that it computes nor one that waits is told anything until it returns."""
    model = "demo=scripted:?step_ms=1&tokens=50&stall_at=20&stall_ms=700"
    async with running_engine(model, PROGRESS_S="0.02", MAX_SEQUENCES="1") as client:
        loop = asyncio.get_running_loop()
        stalled = client.request("hi")
        waiting = asyncio.ensure_future(client.ask("ho"))
        times = [loop.time() async for _event in each(client.stub.Generate(stalled))]
        assert max(later - earlier for earlier, later in pairwise(times)) > 0.5
        assert (await waiting).tokens


async def test_progress_can_be_turned_off() -> None:
    """0: never."""
    model = "demo=scripted:?prefill_ms_per_token=0.2&tokens=5&context=8000"
    async with running_engine(model, PROGRESS_S="0") as client:
        assert (await client.ask([65] * 1000)).progress == []


async def test_only_silent_streams_are_told_and_only_while_the_thread_goes_round() -> None:
    """One tick of silence is needed; a token, or a thread that stands still, makes it quiet again."""
    rounds, outbox = 0, Outbox()
    timer = ProgressTimer(1.0, lambda: rounds, lambda: [(outbox, 7)])

    async def told() -> pb.Progress | None:
        taking = asyncio.ensure_future(outbox.take())
        await asyncio.sleep(0)
        if not taking.done():
            taking.cancel()
            return None
        done = taking.result().prompt_tokens_done
        return None if done is None else pb.Progress(prompt_tokens_done=done)

    timer.tick()
    timer.tick()
    assert await told() is None
    for turn in range(3):
        rounds += 1
        timer.tick()
        assert (await told() is None) == (turn == 0)
    outbox.add(1, "a")
    assert await told() is None
    rounds += 1
    timer.tick()
    assert await told() is None
    timer.tick()
    assert await told() is None
    rounds += 1
    timer.tick()
    assert (await told()) == pb.Progress(prompt_tokens_done=7)
