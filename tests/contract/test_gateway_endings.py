"""Invariant I1 over real gRPC: one terminal event and one release for every request, whatever dies (W1, W3, W4)."""

from __future__ import annotations

import asyncio
import json
from contextlib import nullcontext
from typing import Any

import grpc
import pytest
from caravan.core.v1 import generation_pb2

from services.runtime.errors import CaravanError, from_rpc_error
from tests.support.coordinator import until
from tests.support.gateway import Rig, error_of, openai_error, running
from tests.support.gateway_peers import ANSWER, FakeEngine, delta, finished, hang, started

LEFT_S = 2.0
"""More than a client that has left should hold anything, on a busy machine."""


def _last_error(body: bytes) -> dict[str, object]:
    shown: dict[str, object] = json.loads(body.strip().split(b"\n\n")[-1].removeprefix(b"data: "))
    assert set(shown) == {"error"}
    error = shown["error"]
    assert isinstance(error, dict)
    return error


async def _stream_until_error(rig: Rig, **fields: Any) -> tuple[bytes, grpc.aio.AioRpcError]:
    body = b""
    try:
        async for part in rig.chat(stream=True, **fields):
            body += part.body.data
    except grpc.aio.AioRpcError as error:
        return body, error
    raise AssertionError("the stream did not fail")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_finished_request_releases_its_lease_once(stream: bool) -> None:
    """A request that finishes is released with that outcome, exactly once, and counted once."""
    async with running() as rig:
        await rig.chat_bytes(stream=stream)
        await rig.idle()
        assert rig.coordinator.outcomes == ["FINISHED"]
        assert (rig.count("finished"), rig.count("cancelled"), rig.count("failed")) == (1, 0, 0)
        assert rig.engine.cancelled == []


async def test_an_engine_that_refuses_ends_the_request_with_its_own_words() -> None:
    """A refusal of the engine reaches the client with its reason, `param` in the names of the OpenAI API."""
    refusal = CaravanError(
        "CONTEXT_LENGTH_EXCEEDED",
        "Too long.",
        param="chat",
        prompt_tokens="50",
        context_tokens="40",
    )
    async with running(refusal) as rig:
        error = await error_of(rig.chat(stream=True))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert openai_error(error) == {
            "message": "Too long.",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "context_length_exceeded",
        }
        assert from_rpc_error(error, service="gateway").metadata["prompt_tokens"] == "50"
        await rig.idle()
        assert rig.coordinator.outcomes == ["REFUSED"]
        assert len(rig.engine.requests) == 1, "what is wrong with a request is not tried again"


async def test_an_engine_that_ends_without_a_terminal_is_lost() -> None:
    """Without a move left, a stream of the engine that just ends is an error for the client, after the first byte an event (W3)."""
    async with running(started(), delta("a"), migrations_max=0) as rig:
        body, error = await _stream_until_error(rig)
        assert _last_error(body)["code"] == "engine_lost"
        assert b"[DONE]" not in body
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        await rig.idle()
        assert rig.coordinator.outcomes == ["FAILED"]
        assert len(rig.engine.requests) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_dies_in_the_middle(stream: bool) -> None:
    """When the process of the engine goes away and no other may be tried, the request ends with ENGINE_LOST."""
    async with running(started(), delta("a"), hang, migrations_max=0) as rig:
        call = rig.chat(stream=stream)
        reading = asyncio.create_task(error_of(call))
        await until(lambda: rig.engine.running == 1)
        if stream:
            await call.initial_metadata()
        await rig.engine.kill()
        error = await reading
        assert from_rpc_error(error, service="gateway").reason == "ENGINE_LOST"
        await until(lambda: not rig.coordinator.held)
        assert rig.coordinator.outcomes == ["FAILED"]


async def test_an_engine_that_died_before_the_first_event_is_replaced_once() -> None:
    """A lease on an engine that cannot be reached is given back, and another engine answers."""
    async with running() as rig:
        dead = FakeEngine()
        await dead.start()
        await dead.kill()
        rig.coordinator.engines.insert(0, dead)
        assert b"Hello you" in await rig.chat_bytes()
        await rig.idle()
        assert rig.coordinator.outcomes == ["FAILED", "FINISHED"]
        assert rig.migrations("ENGINE_LOST", "moved") == 1


async def test_dead_engines_are_tried_within_a_bound() -> None:
    """A request takes no more leases than it may, each released once (I4)."""
    async with running(engines=[FakeEngine() for _ in range(4)], migrations_max=2) as rig:
        for engine in rig.coordinator.engines:
            await engine.kill()
        error = await error_of(rig.chat())
        assert from_rpc_error(error, service="gateway").reason == "ENGINE_LOST"
        await until(lambda: not rig.coordinator.held)
        assert rig.coordinator.outcomes == ["FAILED", "FAILED", "FAILED"]
        assert rig.migrations("ENGINE_LOST", "failed") == 2


async def test_an_engine_that_comes_back_is_used_at_once() -> None:
    """A connection that failed is not kept: it would refuse for a while though the engine is there again."""
    async with running(migrations_max=0) as rig:
        await rig.chat_bytes()
        await rig.engine.kill()
        await error_of(rig.chat())
        again = FakeEngine(ANSWER, rig.engine.address)
        await again.start()
        assert b"Hello you" in await rig.chat_bytes()
        await again.kill()


@pytest.mark.parametrize("reason", ["CAPACITY_EXHAUSTED", "DRAINING"])
async def test_an_engine_without_room_is_replaced_once(reason: str) -> None:
    """An engine that has no room or drains has not begun: the next lease is tried, with the id of the request."""
    async with running(CaravanError(reason, "Not now.", retry_after_s=2.0)) as rig:
        other = FakeEngine(ANSWER)
        await other.start()
        rig.coordinator.engines.append(other)
        assert b"Hello you" in await rig.chat_bytes()
        await rig.idle()
        assert len(rig.coordinator.outcomes) == 2
        assert other.requests[0].request_id == rig.engine.requests[0].request_id
        await other.kill()


async def test_a_refusal_keeps_its_retry_time() -> None:
    """When there is no room anywhere, the client is told when to come back."""
    async with running() as rig:
        rig.coordinator.refusals = [CaravanError("CAPACITY_EXHAUSTED", "Full.", retry_after_s=3.2)]
        error = await error_of(rig.chat(stream=True))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(error.trailing_metadata() or ())["retry-after"] == "4"
        assert rig.count("refused") == 1
        assert rig.engine.requests == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_the_first_event(stream: bool) -> None:
    """The engine's call is cancelled and the lease released, though the engine has said nothing yet."""
    async with running(hang) as rig:
        call = rig.chat(stream=stream)
        await until(lambda: rig.engine.running == 1)
        call.cancel()
        async with asyncio.timeout(LEFT_S):
            await rig.idle()
        assert rig.engine.cancelled == [rig.engine.requests[0].request_id]
        assert rig.coordinator.outcomes == ["CANCELLED"]
        assert rig.count("cancelled") == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_in_the_middle(stream: bool) -> None:
    """The same after some tokens, for plain requests too, which have shown their client nothing."""
    async with running(started(), delta("a"), hang) as rig:
        call = rig.chat(stream=stream)
        if stream:
            await call.read()
        await until(lambda: rig.engine.running == 1)
        call.cancel()
        async with asyncio.timeout(LEFT_S):
            await rig.idle()
        assert len(rig.engine.cancelled) == 1
        assert rig.coordinator.outcomes == ["CANCELLED"]


async def test_a_client_that_stops_reading_and_leaves() -> None:
    """A call that waits in a write, because its client reads no more, still learns that the client has left."""
    flood = [delta("x" * 60_000) for _ in range(200)]
    async with running(started(), *flood, hang) as rig:
        call = rig.chat(stream=True)
        await call.read()
        await until(lambda: rig.engine.running == 1)
        call.cancel()
        async with asyncio.timeout(LEFT_S):
            await rig.idle()
        assert rig.coordinator.outcomes == ["CANCELLED"]


async def test_a_client_that_leaves_while_the_route_is_asked_for() -> None:
    """A lease that is granted to a request that is gone is given back (I6)."""
    answer = asyncio.Event()

    async def wait() -> None:
        await answer.wait()

    async with running() as rig:
        rig.coordinator.refusals = [wait]
        call = rig.chat()
        await until(lambda: len(rig.coordinator.routes) == 1)
        call.cancel()
        await until(lambda: len(rig.gateway.sessions) == 0)
        assert rig.coordinator.grants == {}
        answer.set()
        await until(lambda: rig.coordinator.outcomes == ["CANCELLED"])
        assert rig.engine.requests == []


async def test_a_coordinator_that_hangs_is_not_waited_for() -> None:
    """The client is told when the session with it is over; nothing of the request is left when it wakes up."""
    answer = asyncio.Event()

    async def wait() -> None:
        await answer.wait()

    async with running(
        interval_ms=50, coordinator_timeout_s=0.2, coordinator_patience_s=0.2
    ) as rig:
        rig.coordinator.refusals = [wait]
        call = rig.chat()
        await until(lambda: len(rig.coordinator.routes) == 1)
        rig.coordinator.silent = rig.coordinator.deaf = True
        error = await error_of(call)
        known = from_rpc_error(error, service="gateway")
        assert (known.reason, known.metadata["service"]) == ("SERVICE_UNAVAILABLE", "coordinator")
        assert known.retry_after_s is not None
        answer.set()
        await until(lambda: len(rig.gateway.background) == 0)
        assert not rig.coordinator.held


async def test_the_deadline_of_the_client_reaches_the_engine() -> None:
    """A client with a deadline gets DEADLINE_EXCEEDED, and the engine is cancelled then."""
    async with running(started(), hang) as rig:
        error = await error_of(rig.chat(timeout=0.4))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(LEFT_S):
            await rig.idle()
        assert len(rig.engine.cancelled) == 1
        assert len(rig.coordinator.outcomes) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_cancel_request_ended(stream: bool) -> None:
    """An answer that ends by CancelRequest is an error for OpenAI clients: it is neither complete nor cut by a limit."""
    script = (started(), delta("a"), finished(generation_pb2.FINISH_REASON_CANCELLED))
    async with running(*script) as rig:
        if stream:
            body, error = await _stream_until_error(rig)
            assert _last_error(body)["code"] == "request_cancelled"
        else:
            error = await error_of(rig.chat())
        assert error.code() is grpc.StatusCode.CANCELLED
        await rig.idle()
        assert rig.coordinator.outcomes == ["CANCELLED"]
        assert rig.count("cancelled") == 1


async def test_an_error_in_the_middle_is_an_event_and_a_status() -> None:
    """REST clients see an event, gRPC clients a status; [DONE] would say that the answer is complete."""
    async with running(started(), delta("a"), CaravanError("DECODE_FAILED", "Broken.")) as rig:
        body, error = await _stream_until_error(rig)
        assert _last_error(body) == {
            "message": "Broken.",
            "type": "server_error",
            "param": None,
            "code": "decode_failed",
        }
        assert b"[DONE]" not in body
        assert error.code() is grpc.StatusCode.INTERNAL


async def test_draining_cancels_what_outlives_the_grace_and_gives_leases_back() -> None:
    """A gateway that stops leaves nothing behind at the coordinator, before its session there ends."""
    async with running(started(), delta("a"), hang) as rig:
        call = rig.chat(stream=True)
        await call.read()
        await rig.gateway.stop()
        assert rig.coordinator.held == set()
        assert rig.coordinator.outcomes == ["CANCELLED"]
        await until(lambda: rig.engine.running == 0)


async def test_many_requests_at_a_time_all_end() -> None:
    """Finished, refused and left requests, mixed: every lease is released exactly once."""
    async with running(started(), delta("a"), delta("b"), finished()) as rig:

        async def one(number: int) -> None:
            call = rig.chat(stream=number % 2 == 0)
            if number % 3 == 0:
                call.cancel()
            with pytest.raises(asyncio.CancelledError) if number % 3 == 0 else nullcontext():
                async for _ in call:
                    pass

        await asyncio.gather(*(one(number) for number in range(60)))
        await rig.idle()
        released = [lease_id for lease_id, _ in rig.coordinator.releases]
        assert len(released) == len(set(released)) == len(rig.coordinator.grants)
