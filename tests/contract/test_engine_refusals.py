"""What the engine refuses, by which reason and parameter, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import grpc
import pytest
from caravan.core.v1 import chat_pb2
from caravan.core.v1 import generation_pb2 as generation
from caravan.engine.v1 import engine_service_pb2 as pb

from services.runtime.errors import CaravanError
from tests.support.engine import EngineClient, running_engine

SLOW = "demo=scripted:?step_ms=5&tokens=100000&context=8000"
Change = Callable[[pb.GenerateRequest], object]


def _bad_role(request: pb.GenerateRequest) -> None:
    request.chat.messages.add(content="x")


def _image(request: pb.GenerateRequest) -> None:
    message = request.chat.messages.add(role=chat_pb2.ROLE_USER)
    message.parts.add(text="What is this?")
    message.parts.add().image.url = "https://example.org/a.png"


def _empty_part(request: pb.GenerateRequest) -> None:
    request.chat.messages.add(role=chat_pb2.ROLE_USER).parts.add()


def _both(request: pb.GenerateRequest) -> None:
    request.chat.messages[0].parts.add(text="x")


def _named_tool(request: pb.GenerateRequest) -> None:
    request.chat.tools.add(name="f")
    request.chat.tool_choice.mode = chat_pb2.ToolChoice.MODE_NAMED
    request.chat.tool_choice.name = "g"


BAD: dict[str, tuple[Change, str, str | None]] = {
    "no id": (lambda r: r.ClearField("request_id"), "INVALID_VALUE", "request_id"),
    "long id": (lambda r: setattr(r, "request_id", "é" * 65), "INVALID_VALUE", "request_id"),
    "no prompt": (lambda r: r.ClearField("chat"), "INVALID_VALUE", "prompt"),
    "empty text": (lambda r: setattr(r, "text", ""), "INVALID_VALUE", "prompt"),
    "no messages": (lambda r: r.chat.ClearField("messages"), "INVALID_VALUE", "messages"),
    "no role": (_bad_role, "INVALID_VALUE", "messages[1].role"),
    "image": (_image, "UNSUPPORTED_FIELD", "messages[1].parts[1]"),
    "part without a kind": (_empty_part, "UNSUPPORTED_FIELD", "messages[1].parts[0]"),
    "content and parts": (_both, "INVALID_VALUE", "messages[0].content"),
    "unknown token": (lambda r: r.tokens.ids.extend([1, 512]), "INVALID_VALUE", "prompt[1]"),
    "too long": (
        lambda r: setattr(r, "text", "x" * 5000),
        "CONTEXT_LENGTH_EXCEEDED",
        "prompt",
    ),
    "max_tokens": (lambda r: setattr(r.stop, "max_tokens", 0), "INVALID_VALUE", "stop.max_tokens"),
    "stops": (lambda r: r.stop.stop.extend(["x"] * 17), "INVALID_VALUE", "stop"),
    "empty stop": (lambda r: r.stop.stop.extend(["a", ""]), "INVALID_VALUE", "stop[1]"),
    "long stop": (lambda r: r.stop.stop.append("é" * 129), "INVALID_VALUE", "stop[0]"),
    "logprobs": (lambda r: setattr(r, "top_logprobs", 21), "INVALID_VALUE", "top_logprobs"),
    "temperature": (
        lambda r: setattr(r.sampling, "temperature", 3),
        "INVALID_VALUE",
        "sampling.temperature",
    ),
    "grammar kind": (
        lambda r: r.sampling.grammar.SetInParent(),
        "INVALID_VALUE",
        "sampling.grammar",
    ),
    "schema": (
        lambda r: setattr(r.sampling.grammar, "json_schema", "nope"),
        "INVALID_VALUE",
        "sampling.grammar",
    ),
    "scripted grammar": (
        lambda r: setattr(r.sampling.grammar, "json_schema", "{}"),
        "UNSUPPORTED_FIELD",
        "sampling.grammar",
    ),
    "tool choice": (
        lambda r: setattr(r.chat.tool_choice, "mode", chat_pb2.ToolChoice.MODE_REQUIRED),
        "INVALID_VALUE",
        "tool_choice",
    ),
    "named tool": (_named_tool, "INVALID_VALUE", "tool_choice"),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_request_is_refused_by_reason_and_parameter(name: str) -> None:
    """Every mistake has its reason and names its field."""
    change, reason, param = BAD[name]
    async with running_engine("demo=scripted:?tokens=4&context=4096") as client:
        request = client.request("hi")
        change(request)
        error = await client.refusal(request)
        assert (error.reason, error.param) == (reason, param)


async def test_a_prompt_that_is_too_long_says_by_how_much() -> None:
    """Both numbers are in the message and in the metadata."""
    async with running_engine("demo=scripted:?context=100") as client:
        error = await client.refusal(client.request([65] * 100))
        assert error.metadata == {
            "param": "prompt",
            "prompt_tokens": "100",
            "context_tokens": "100",
        }
        assert "100 tokens" in error.message


async def test_an_id_in_flight_is_refused() -> None:
    """And the request that has it goes on."""
    async with running_engine(SLOW) as client:
        request = client.request("hi")
        first = asyncio.ensure_future(client.run(request))
        await client.until(lambda load: load.active_sequences == 1)
        assert (await client.refusal(request)).reason == "DUPLICATE_REQUEST"
        assert len(await client.inflight()) == 1
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await client.until_idle()


async def test_beyond_the_queue_requests_are_refused_with_a_time() -> None:
    """CAPACITY_EXHAUSTED carries counts and a RetryInfo; what was admitted goes on."""
    async with running_engine(SLOW, MAX_SEQUENCES="2", MAX_WAITING="1") as client:
        calls = [asyncio.ensure_future(client.ask(f"{n}")) for n in range(3)]
        await client.until(lambda load: (load.active_sequences, load.queued_requests) == (2, 1))
        error = await client.refusal(client.request("one too many"))
        assert error.reason == "CAPACITY_EXHAUSTED"
        assert error.retry_after_s == 1.0
        assert (error.metadata["active"], error.metadata["capacity"]) == ("3", "3")
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await client.until_idle()


async def test_while_the_model_loads_requests_are_told_to_come_again() -> None:
    """MODEL_LOADING with a retry time; the status shows the progress."""
    async with running_engine("demo=scripted:?load_ms=1500", ready=False) as client:
        error = await client.refusal(client.request("hi"))
        assert (error.reason, error.retry_after_s) == ("MODEL_LOADING", 1.0)
        status = await client.status()
        assert status.load.phase == pb.ENGINE_PHASE_LOADING
        assert status.load.load_progress < 1
        await client.until(lambda load: load.phase == pb.ENGINE_PHASE_IDLE)
        assert (await client.ask("hi")).reason == generation.FINISH_REASON_STOP


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("demo=scripted:?load_error=no+luck", "no luck"),
        ("demo=models/missing.gguf", "cannot be read"),
        ("demo=pyproject.toml", "not a GGUF file"),
    ],
)
async def test_a_model_that_cannot_be_loaded_is_named(model: str, why: str) -> None:
    """The engine stays up, says what is wrong in its status, and refuses with MODEL_INVALID."""
    async with running_engine(model, ready=False) as client:
        await client.until(lambda load: load.phase == pb.ENGINE_PHASE_FAILED)
        assert why in (await client.status()).load.failure
        error = await client.refusal(client.request("hi"))
        assert error.reason == "MODEL_INVALID"
        assert why in error.message


async def test_a_draining_engine_takes_nothing_new_and_ends_what_runs() -> None:
    """DRAINING with a retry time."""
    async with running_engine("demo=scripted:?step_ms=2&tokens=50") as client:
        running = asyncio.ensure_future(client.ask("hi"))
        await client.until(lambda load: load.active_sequences == 1)
        client.engine.drain(60)
        error = await client.refusal(client.request("ho"))
        assert (error.reason, error.retry_after_s) == ("DRAINING", 1.0)
        assert (await client.status()).load.phase == pb.ENGINE_PHASE_DRAINING
        assert (await running).reason == generation.FINISH_REASON_STOP


async def _mixed(client: EngineClient, rng: random.Random, number: int) -> None:
    request = client.request("hi" * rng.randint(1, 30), max_tokens=rng.randint(1, 20))
    name = rng.choice([*BAD, "good", "good", "leave", "deadline"])
    if name in BAD:
        BAD[name][0](request)
    timeout = 0.001 if name == "deadline" else 20
    call = client.stub.Generate(request, timeout=timeout)
    try:
        async for _event in call:
            if name == "leave":
                call.cancel()
    except (grpc.aio.AioRpcError, asyncio.CancelledError, CaravanError):
        assert name != "good"


async def test_a_thousand_mixed_requests_leave_nothing_behind() -> None:
    """Good, bad, abandoned and late ones: no sequence, cell or row of the table stays."""
    async with running_engine("demo=scripted:?tokens=10", MAX_WAITING="200") as client:
        free = (await client.status()).load.free_cells
        rng = random.Random(11)
        for _ in range(20):
            await asyncio.gather(*(_mixed(client, rng, n) for n in range(50)))
        load = await client.until_idle()
        assert load.free_cells + load.resident_cells == free
        assert client.engine.inflight.depth == 0
        assert client.engine._jobs == {}
        assert (await client.ask("hi")).reason == generation.FINISH_REASON_STOP
