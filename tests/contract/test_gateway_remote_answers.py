"""Answers of remote engines, as clients of the gateway see them: pieces without tokens, refusals, prices, images."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest
from caravan.core.v1 import chat_pb2, generation_pb2, scheduling_pb2
from caravan.inference.v1 import inference_service_pb2 as pb

from services.runtime.errors import CaravanError, from_rpc_error
from tests.support.gateway import Rig, error_of, openai_error, running
from tests.support.gateway_peers import FakeEngine, finished
from tests.support.remote_answers import GOOD, piece

PROMPT = chat_pb2.ChatPrompt(messages=[chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content="hi")])


async def _content(rig: Rig, **fields: Any) -> str:
    answer = json.loads(await rig.chat_bytes(**fields))
    return str(answer["choices"][0]["message"]["content"])


async def _broken_stream(rig: Rig) -> tuple[bytes, CaravanError]:
    """What came before the error, and the error."""
    shown = b""
    try:
        async for part in rig.chat(stream=True):
            shown += part.body.data
    except grpc.aio.AioRpcError as error:
        return shown, from_rpc_error(error, service="gateway")
    raise AssertionError("the stream did not break")


@pytest.mark.parametrize("reason", ["ENGINE_LOST", "DRAINING"])
async def test_pieces_cannot_be_resumed(reason: str) -> None:
    """Once there is text whose tokens nobody knows, a loss is the end: nothing is said twice, and no Resume is sent."""
    script = [*GOOD[:2], CaravanError(reason, "Gone.", retry_after_s=1.0)]
    async with running(engines=[FakeEngine(script), FakeEngine(script)]) as rig:
        shown, error = await _broken_stream(rig)
        assert error.reason == reason
        assert shown.count(b"Hello") == 1
        await rig.idle()
        calls = [request for engine in rig.coordinator.engines for request in engine.requests]
        assert len(calls) == len(rig.coordinator.routes) == 1


async def test_an_answer_without_pieces_moves() -> None:
    """Before the first piece another engine may begin anew, without a Resume."""
    gone = CaravanError("DRAINING", "Going.", retry_after_s=1.0)
    async with running(engines=[FakeEngine([GOOD[0], gone]), FakeEngine(GOOD)]) as rig:
        assert await _content(rig) == "Hello"
        await rig.idle()
        (again,) = rig.coordinator.engines[1].requests
        assert not again.HasField("resume")


async def test_pieces_are_counted_where_there_are_no_tokens() -> None:
    """The first piece stops the clock of the first token; what comes together shares the time before."""
    call = chat_pb2.ToolCallDelta(index=0, id="c", name="f", arguments_json="{}")
    script = (GOOD[0], piece("a"), piece("bcd", pieces=3), piece("", refusal="no"))
    tool = piece("", tool_calls=[call], pieces=0)
    async with running(*script, tool, finished()) as rig:
        await rig.chat_bytes(stream=True)
        await rig.idle()
        assert rig.sample("caravan_time_to_first_token_seconds_count") == 1
        assert rig.sample("caravan_inter_token_seconds_count") == 3 + 1 + 1


async def test_the_engine_is_told_what_it_needs() -> None:
    """Whether the seed is the client's; and the priority: the client's, or the one with which the coordinator admitted it."""
    async with running() as rig:
        rig.coordinator.default_priority = scheduling_pb2.PRIORITY_BACKGROUND
        await rig.chat_bytes(caravan={"priority": "high"}, seed=5)
        await rig.chat_bytes()
        chosen, drawn = rig.engine.requests
        assert (chosen.sampling.seed, chosen.seed_drawn) == (5, False)
        assert (drawn.sampling.HasField("seed"), drawn.seed_drawn) == (True, True)
        assert [asked.priority for asked in rig.coordinator.routes] == [
            scheduling_pb2.PRIORITY_HIGH,
            scheduling_pb2.PRIORITY_UNSPECIFIED,
        ]
        assert chosen.priority == scheduling_pb2.PRIORITY_HIGH
        assert drawn.priority == scheduling_pb2.PRIORITY_BACKGROUND


async def test_usage_that_is_known_at_the_end() -> None:
    """A provider counts at the end: no client sees the zeros of the start as the result."""
    async with running(*GOOD) as rig:
        usage = json.loads(await rig.chat_bytes())["usage"]
        assert (usage["prompt_tokens"], usage["total_tokens"]) == (3, 5)
        await rig.idle()
        assert rig.sample("caravan_gateway_prompt_tokens_total", model="demo") == 3


async def test_a_refusal_a_filter_and_a_price() -> None:
    """In all three forms of answer."""
    end = finished(generation_pb2.FINISH_REASON_CONTENT_FILTER, cost_nanousd=1_250_000)
    async with running(GOOD[0], piece("", refusal="I "), piece("", refusal="can't."), end) as rig:
        plain = json.loads(await rig.chat_bytes(caravan={}))
        (choice,) = plain["choices"]
        assert (choice["message"]["content"], choice["message"]["refusal"]) == (None, "I can't.")
        assert choice["finish_reason"] == "content_filter"
        assert plain["caravan"]["cost_usd"] == 0.00125
        body = (await rig.chat_bytes(stream=True, caravan={})).decode()
        chunks = [json.loads(event[6:]) for event in body.split("\n\n")[:-2]]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(delta.get("refusal", "") for delta in deltas) == "I can't."
        assert chunks[-1]["choices"][0]["finish_reason"] == "content_filter"
        assert chunks[-1]["caravan"]["cost_usd"] == 0.00125
        typed = rig.inference.Chat(pb.ChatRequest(model="demo", prompt=PROMPT))
        events = [event async for event in typed]
        assert "".join(event.delta.refusal for event in events) == "I can't."
        assert sum(event.delta.pieces for event in events) == 2
        assert events[-1].finished.cost_nanousd == 1_250_000
        assert events[-1].finished.reason == generation_pb2.FINISH_REASON_CONTENT_FILTER


async def test_an_answer_without_a_price_has_none() -> None:
    """What costs nothing, or nobody knows what, has no `cost_usd`."""
    async with running(*GOOD) as rig:
        assert "cost_usd" not in json.loads(await rig.chat_bytes(caravan={}))["caravan"]


async def test_images_reach_the_engine_and_its_refusal_the_client() -> None:
    """The path is that of the client's own body."""
    no = CaravanError("UNSUPPORTED_FIELD", "Text only.", param="messages[0].parts[1]")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,YQ=="}}
    content = [{"type": "text", "text": "What is this?"}, image]
    async with running(no) as rig:
        messages = [{"role": "user", "content": content}]
        error = openai_error(await error_of(rig.chat(messages=messages)))
        assert error["param"] == "messages[0].content[1]"
        (request,) = rig.engine.requests
        assert request.chat.messages[0].parts[1].image.data == b"a"


async def test_a_large_image_passes() -> None:
    """As large as the body may be at Envoy, through both calls."""
    data = "QUJD" * (7 * 1024 * 1024)
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    async with running() as rig:
        messages = [{"role": "user", "content": [image]}]
        assert await _content(rig, messages=messages) == "Hello you"
        (request,) = rig.engine.requests
        assert len(request.chat.messages[0].parts[0].image.data) == 21 * 1024 * 1024


async def test_a_prefill_that_the_provider_cannot_do() -> None:
    """The client is told that the method is not there, not that something broke; nobody else is asked."""
    no = CaravanError(
        "UNSUPPORTED_METHOD", "No prefill here.", method="PrefillOnly", provider="openai"
    )
    async with running(engines=[FakeEngine(), FakeEngine()]) as rig:
        rig.engine.prefill_steps = [no]
        request = pb.PrefillOnlyRequest(model="demo", text="a prompt")
        error = from_rpc_error(
            await error_of(rig.inference.PrefillOnly(request)), service="gateway"
        )
        assert (error.reason, error.metadata["method"]) == ("UNSUPPORTED_METHOD", "PrefillOnly")
        assert error.row.http_status == 501
        await rig.idle()
        assert len(rig.coordinator.routes) == 1
