"""Taking an engine out of service: what runs finishes or moves, no token is lost, and the process ends in good order."""

from __future__ import annotations

import asyncio
import random
import re
import signal
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc
import pytest
from caravan.core.v1 import generation_pb2 as generation
from caravan.engine.v1 import engine_service_pb2 as pb
from caravan.engine.v1 import engine_service_pb2_grpc as pb_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.engine.outbox import Ending
from services.runtime.channel import open_channel
from services.runtime.errors import CaravanError, from_rpc_error
from services.runtime.generate_events import each
from tests.support.cache import running_cache
from tests.support.engine import DEMO_MODEL, Answer, EngineClient, running_engine
from tests.support.processes import log_line, process

PORT = re.compile(rb"listening on port (\d+)")
SERVING = re.compile(rb"serving demo")
SLOW = "demo=scripted:?step_ms=3&tokens=100000&context=8000"
HEALTH = health_pb2.HealthCheckRequest(service="caravan.engine.v1.EngineService")


async def moved(client: EngineClient, request: pb.GenerateRequest) -> Answer:
    """What arrived of an answer that must end with DRAINING."""
    answer, error = Answer(), None
    try:
        async for event in each(client.stub.Generate(request)):
            answer.add(event)
    except grpc.aio.AioRpcError as raised:
        error = from_rpc_error(raised, service="engine")
    assert error is not None
    assert error.reason == "DRAINING"
    return answer


async def test_an_answer_that_is_complete_has_one_end() -> None:
    """Also where the engine gives up on what is left before the end was sent (I1)."""
    async with running_engine(SLOW) as client:
        call = client.stub.Generate(client.request("hi", max_tokens=5000))
        events = each(call)
        await anext(events)
        (row,) = client.engine.inflight.oldest_first()
        row.outbox.end(Ending(generation.FINISH_REASON_STOP, "", 2, 1, 0.0, 0.0, 0.0))
        client.engine.abandon()
        kinds = [event.WhichOneof("event") async for event in events]
        assert kinds[-1] == "finished"
        assert await call.code() is grpc.StatusCode.OK


async def test_what_is_left_after_the_grace_goes_on_elsewhere() -> None:
    """Ended with DRAINING at any moment, an answer is completed by another engine to the token."""
    rng = random.Random(5)
    model = "demo=scripted:?step_ms=1&tokens=60"
    async with running_engine(model, MAX_SEQUENCES="3") as first, running_engine(model) as second:
        for _ in range(8):
            requests = [first.request(f"{'hi ' * 90}{number}") for number in range(5)]
            running = [asyncio.ensure_future(moved(first, request)) for request in requests]
            wanted = rng.randint(0, 40)
            await first.until(lambda load: load.active_sequences == 3)
            async with asyncio.timeout(20):
                while first.engine._decoder.generated < wanted:  # noqa: ASYNC110 - another thread's
                    await asyncio.sleep(0.001)
            first.engine.drain(0)
            for request, part in zip(requests, await asyncio.gather(*running), strict=True):
                request.resume.token_ids.extend(part.tokens)
                if not part.tokens:
                    request.ClearField("resume")
                rest = await second.run(request)
                request.ClearField("resume")
                whole = await second.run(request)
                assert part.tokens + rest.tokens == whole.tokens
                assert part.text + rest.text == whole.text
            assert first.engine.inflight.depth == 0
            first.engine._decoder.generated = 0
            first.engine.undrain()


async def test_what_an_engine_computed_is_saved_when_it_hands_over() -> None:
    """Prompt and answer so far are in its store before the gateway is told."""
    async with running_engine(SLOW, RESIDENTS="0") as client:
        request = client.request("hi " * 200, max_tokens=2000)
        running = asyncio.ensure_future(moved(client, request))
        await client.until(lambda load: load.phase == pb.ENGINE_PHASE_GENERATING)
        async with asyncio.timeout(20):
            while client.engine._decoder.generated < 100:  # noqa: ASYNC110 - another thread's
                await asyncio.sleep(0.005)
        client.engine.drain(0)
        part = await running
        assert client.metric("caravan_kv_pack_seconds_count", reason="shutdown") == 1
        client.engine.undrain()
        computed = client.metric("caravan_prompt_tokens_total")
        request.resume.token_ids.extend(part.tokens)
        request.stop.max_tokens = len(part.tokens) + 3
        rest = await client.run(request)
        assert rest.cached == rest.started[0].prompt_tokens
        assert client.metric("caravan_prompt_tokens_total") - computed <= 2


async def test_another_engine_goes_on_from_what_was_saved(tmp_path: Path) -> None:
    """Handed over, prompt and answer are restored and not computed: the rest is that of the undisturbed run, also at a
    temperature at which the noise of another batch would show."""
    fields = {"temperature": 1.3, "seed": 4, "max_tokens": 260, "ignore_eos": True}
    async with running_cache() as cache:
        kv: dict[str, Any] = {"CACHE": cache.address, "KV_ROOTS": f"disk:{tmp_path}:64MiB"}
        async with (
            running_engine(DEMO_MODEL, ID="first", **kv) as first,
            running_engine(DEMO_MODEL, ID="second", **kv) as second,
        ):
            await first.until_joined()
            await second.until_joined()
            request = first.request("Tell me a story about a dog. " * 20, **fields)
            running = asyncio.ensure_future(moved(first, request))
            async with asyncio.timeout(20):
                while first.engine._decoder.generated < 150:  # noqa: ASYNC110 - another thread's
                    await asyncio.sleep(0.002)
            first.engine.drain(0)
            part = await running
            await first.until_saved()
            request.resume.token_ids.extend(part.tokens)
            rest = await second.run(request)
            assert first.metric("caravan_engine_requests_moved_total") == 1
            assert second.metric("caravan_engine_requests_resumed_total") == 1
            assert second.metric("caravan_prompt_tokens_total") == 1
            assert rest.cached == rest.started[0].prompt_tokens
    # On an engine of its own: where in the cells a sequence lies moves the last bits of its logits too.
    async with running_engine(DEMO_MODEL) as undisturbed:
        request.ClearField("resume")
        whole = await undisturbed.run(request)
        assert part.tokens + rest.tokens == whole.tokens
        assert part.text + rest.text == whole.text


async def test_requests_that_run_finish_within_the_grace() -> None:
    """Nothing new is taken meanwhile, and undrained the engine serves again."""
    async with running_engine("demo=scripted:?step_ms=2&tokens=60") as client:
        running = asyncio.ensure_future(client.ask("hi"))
        await client.until(lambda load: load.active_sequences == 1)
        client.engine.drain(60)
        assert (await client.refusal(client.request("ho"))).reason == "DRAINING"
        assert (await running).reason == generation.FINISH_REASON_STOP
        assert (await client.status()).load.phase == pb.ENGINE_PHASE_DRAINING
        client.engine.undrain()
        assert (await client.status()).load.phase == pb.ENGINE_PHASE_IDLE
        assert (await client.ask("ho", max_tokens=3)).tokens


async def test_a_drain_that_is_undone_in_time_moves_nobody() -> None:
    """The grace of the drain before does not come due afterwards; a shorter one replaces a longer one."""
    async with running_engine(SLOW) as client:
        request = client.request("hi")
        running = asyncio.ensure_future(moved(client, request))
        await client.until(lambda load: load.active_sequences == 1)
        client.engine.drain(0.02)
        client.engine.undrain()
        assert (await client.ask("ho", max_tokens=30)).reason == generation.FINISH_REASON_LENGTH
        assert not running.done()
        client.engine.drain(60)
        client.engine.drain(0.01)
        assert (await running).tokens


async def test_a_stop_is_told_when_the_last_request_has_ended() -> None:
    """Not before, and not when it was undone."""
    stopped = asyncio.Event()
    async with running_engine(SLOW) as client:
        client.engine.on_stopped = stopped.set
        request = client.request("hi", max_tokens=20)
        running = asyncio.ensure_future(client.run(request))
        await client.until(lambda load: load.active_sequences == 1)
        client.engine.drain(60, stop=True)
        client.engine.undrain()
        await running
        await client.until_idle()
        assert not stopped.is_set()
        client.engine.drain(60, stop=True)
        assert stopped.is_set()


async def test_a_drain_for_good_is_not_undone() -> None:
    """A process that ends does not take requests because a coordinator asks it to."""
    async with running_engine(SLOW) as client:
        client.engine.drain(60, for_good=True)
        client.engine.undrain()
        assert (await client.refusal(client.request("ho"))).reason == "DRAINING"


def engine(
    model: str = SLOW, **settings: str
) -> AbstractAsyncContextManager[asyncio.subprocess.Process]:
    """An engine process."""
    return process("engine", **{"CARAVAN_ENGINE_MODEL": model, **settings})


async def _terminated(
    running: asyncio.subprocess.Process, port: int, max_tokens: int
) -> tuple[Answer, CaravanError | None, str]:
    """Sends SIGTERM while a request runs: its answer, the error that ended it, and the rest of the log."""
    answer, error = Answer(), None
    async with open_channel(f"127.0.0.1:{port}") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        stub = pb_grpc.EngineServiceStub(channel)
        request = pb.GenerateRequest(request_id="a", text="hi")
        request.stop.max_tokens = max_tokens
        try:
            async for event in each(stub.Generate(request)):
                answer.add(event)
                if answer.deltas == 5 and event.HasField("delta"):
                    running.send_signal(signal.SIGTERM)
                    await log_line(running, re.compile(rb"draining"))
                    told = (await health.Check(HEALTH)).status
                    assert told == health_pb2.HealthCheckResponse.NOT_SERVING
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        await stub.Generate(pb.GenerateRequest(request_id="b")).read()
                    assert from_rpc_error(refused.value, service="engine").reason == "DRAINING"
        except grpc.aio.AioRpcError as raised:
            error = from_rpc_error(raised, service="engine")
    assert running.stderr is not None
    async with asyncio.timeout(20):
        log = (await running.stderr.read()).decode()
        assert await running.wait() == 0
    assert "Traceback" not in log
    return answer, error, log


async def test_sigterm_moves_what_does_not_finish() -> None:
    """Running requests get their time, then end with DRAINING; the process ends with 0 long before the grace is over."""
    settings = {"CARAVAN_DRAIN_GRACE_S": "60", "CARAVAN_ENGINE_DRAIN_FINISH_S": "0.5"}
    async with engine(**settings) as running:
        port = int((await log_line(running, PORT))[1])
        await log_line(running, SERVING)
        answer, error, _log = await _terminated(running, port, 7000)
        assert error is not None
        assert error.reason == "DRAINING"
        assert len(answer.tokens) > 20
        assert not answer.finished


async def test_sigterm_lets_short_requests_finish() -> None:
    """By default they have half of the grace."""
    async with engine(CARAVAN_DRAIN_GRACE_S="60") as running:
        port = int((await log_line(running, PORT))[1])
        await log_line(running, SERVING)
        answer, error, _log = await _terminated(running, port, 60)
        assert error is None
        assert answer.reason == generation.FINISH_REASON_LENGTH


async def test_a_decode_that_hangs_does_not_hold_its_requests() -> None:
    """They are told to move when the grace is over."""
    model = f"{SLOW}&stall_at=20&stall_ms=60000"
    async with engine(model, CARAVAN_DRAIN_GRACE_S="0.4") as running:
        port = int((await log_line(running, PORT))[1])
        await log_line(running, SERVING)
        answer, error, log = await _terminated(running, port, 7000)
        assert error is not None
        assert error.reason == "DRAINING"
        assert "did not end in time" in log
        assert 5 <= len(answer.tokens) < 20


async def test_a_time_to_finish_beyond_the_grace_is_refused() -> None:
    """One clear line, exit code 2."""
    settings = {"CARAVAN_DRAIN_GRACE_S": "1", "CARAVAN_ENGINE_DRAIN_FINISH_S": "2"}
    async with engine(**settings) as running:
        async with asyncio.timeout(30):
            _, errors = await running.communicate()
        assert running.returncode == 2
        assert "CARAVAN_ENGINE_DRAIN_FINISH_S" in errors.decode()
