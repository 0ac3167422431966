"""The KV cache as clients of the gateway see it: options in, what was reused out, prefill and the end of conversations."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest
from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.inference.v1 import inference_service_pb2 as pb
from caravan.openai.v1 import openai_service_pb2 as openai_pb
from google.api.httpbody_pb2 import HttpBody

from services.gateway.metrics import MODEL_LABELS_MAX
from services.runtime.errors import CaravanError, from_rpc_error
from tests.support.coordinator import until
from tests.support.gateway import error_of, running
from tests.support.gateway_peers import KEY, FakeEngine, delta, finished, hang, started

PROMPT = chat_pb2.ChatPrompt(messages=[chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content="hi")])
WARM = finished(finish_key=KEY, cache_hit=generation_pb2.CACHE_HIT_EXACT)
SHOWN = {"finish_key": KEY.hex(), "cache_hit": "exact", "engine_id": "engine-1"}


async def test_options_reach_the_engine_and_the_route() -> None:
    """The `caravan` object becomes CacheOptions; the conversation is a hint for the route."""
    options = {"parent_key": KEY.hex(), "session_id": "s-1", "cache_salt": "blue", "cache": False}
    async with running() as rig:
        await rig.chat_bytes(caravan=options)
        assert rig.engine.requests[0].cache == generation_pb2.CacheOptions(
            parent_key=KEY, session_id="s-1", salt="blue", bypass=True
        )
        assert rig.coordinator.routes[0].session_id == "s-1"
        await rig.chat_bytes()
        assert not rig.engine.requests[1].HasField("cache")


async def test_an_answer_tells_where_it_came_from() -> None:
    """A request with a `caravan` object, an empty one too, gets one back; others are OpenAI's to the byte."""
    async with running(started(), delta("a"), WARM) as rig:
        plain = json.loads(await rig.chat_bytes(caravan={}))
        assert plain["caravan"] == SHOWN
        assert plain["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
        body = HttpBody(data=b'{"model": "demo", "prompt": "hi", "caravan": {}}')
        call = rig.openai.CreateCompletion(openai_pb.CreateCompletionRequest(body=body))
        (older,) = [json.loads(part.body.data)["caravan"] async for part in call]
        assert older == {**SHOWN, "engine_id": "engine-2"}
        assert b"caravan" not in (await rig.chat_bytes()).replace(b"caravan-1", b"")


async def test_a_stream_tells_it_in_the_chunk_that_ends_the_choice() -> None:
    """Only the chunk with the finish reason has the object, with or without the usage."""
    async with running(started(), delta("a"), WARM) as rig:
        body = await rig.chat_bytes(
            stream=True, stream_options={"include_usage": True}, caravan={"session_id": "s"}
        )
        lines = [line.removeprefix("data: ") for line in body.decode().split("\n\n")[:-2]]
        chunks = [json.loads(line) for line in lines]
        assert [chunk.get("caravan") for chunk in chunks] == [None, None, SHOWN, None]
        assert chunks[2]["choices"][0]["finish_reason"] == "stop"
        assert chunks[3]["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


async def test_typed_clients_see_hits_and_keys() -> None:
    """Started has the kind of the hit, Finished the key for the next turn."""
    first = started()
    first.started.cache_hit = generation_pb2.CACHE_HIT_EXACT
    async with running(first, WARM) as rig:
        options = generation_pb2.CacheOptions(parent_key=KEY, session_id="s-2", salt="red")
        request = pb.ChatRequest(model="demo", prompt=PROMPT, cache=options)
        events = [event async for event in rig.inference.Chat(request)]
        assert events[0].started.cache_hit == generation_pb2.CACHE_HIT_EXACT
        assert events[1].finished.finish_key == KEY
        assert events[1].finished.cache_hit == generation_pb2.CACHE_HIT_EXACT
        text = pb.CompleteRequest(model="demo", text="Once", cache=options)
        assert [event async for event in rig.inference.Complete(text)]
        assert [request.cache for request in rig.engine.requests] == [options, options]


async def test_prefill_is_a_request_with_a_lease() -> None:
    """It is routed, counted and released like any other, and answers with the key of its prompt."""
    options = generation_pb2.CacheOptions(session_id="s-3")
    async with running() as rig:
        call = rig.inference.PrefillOnly(
            pb.PrefillOnlyRequest(model="demo", chat=PROMPT, cache=options)
        )
        answer = await call
        assert answer == pb.PrefillOnlyResponse(
            prompt_tokens=9,
            cached_tokens=4,
            cache_hit=generation_pb2.CACHE_HIT_PARTIAL,
            finish_key=KEY,
            engine_id="engine-1",
        )
        (prefill,) = rig.engine.prefills
        assert (prefill.chat, prefill.cache) == (PROMPT, options)
        assert dict(await call.initial_metadata())["x-request-id"] == prefill.request_id
        await rig.idle()
        assert rig.coordinator.outcomes == ["FINISHED"]
        assert rig.count("finished", api="prefill") == 1


@pytest.mark.parametrize(
    "prompt", [{"text": "Once upon"}, {"tokens": pb.TokenList(ids=[1, 2])}], ids=["text", "tokens"]
)
async def test_texts_and_tokens_can_be_prefilled(prompt: dict[str, Any]) -> None:
    """Every kind of prompt reaches the engine."""
    async with running() as rig:
        await rig.inference.PrefillOnly(pb.PrefillOnlyRequest(model="demo", **prompt))
        (prefill,) = rig.engine.prefills
        assert prefill.text == prompt.get("text", "")
        assert list(prefill.tokens.ids) == ([1, 2] if "tokens" in prompt else [])


async def test_a_client_that_leaves_ends_its_prefill() -> None:
    """The engine's call is cancelled and the lease given back (I5, I6)."""
    async with running() as rig:
        rig.engine.prefill_steps = [hang]
        call = rig.inference.PrefillOnly(pb.PrefillOnlyRequest(model="demo", text="Once"))
        await until(lambda: rig.engine.running == 1)
        call.cancel()
        await rig.idle()
        assert rig.engine.cancelled == [rig.engine.prefills[0].request_id]
        assert rig.coordinator.outcomes == ["CANCELLED"]


async def test_a_prefill_goes_to_a_second_engine() -> None:
    """An engine that drains has computed nothing: another one does."""
    async with running() as rig:
        second = FakeEngine()
        await second.start()
        rig.coordinator.engines.append(second)
        rig.engine.prefill_steps = [CaravanError("DRAINING", "Leaving.")]
        answer = await rig.inference.PrefillOnly(pb.PrefillOnlyRequest(model="demo", text="Once"))
        assert answer.engine_id == "engine-2"
        await rig.idle()
        assert rig.coordinator.outcomes == ["FAILED", "FINISHED"]
        await second.kill()


@pytest.mark.parametrize(
    ("theirs", "param"), [("messages", "chat.messages"), ("prompt", "prompt"), (None, None)]
)
async def test_a_prompt_that_no_engine_takes(theirs: str | None, param: str | None) -> None:
    """The engine's refusal comes through, in the names of the typed API."""
    async with running() as rig:
        rig.engine.prefill_steps = [
            CaravanError("CONTEXT_LENGTH_EXCEEDED", "Too long.", param=theirs)
        ]
        call = rig.inference.PrefillOnly(pb.PrefillOnlyRequest(model="demo", text="Once"))
        error = from_rpc_error(await error_of(call), service="gateway")
        assert (error.reason, error.param) == ("CONTEXT_LENGTH_EXCEEDED", param)
        await rig.idle()
        assert rig.coordinator.outcomes == ["REFUSED"]


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (pb.PrefillOnlyRequest(text="a"), "model"),
        (pb.PrefillOnlyRequest(model="demo"), "prompt"),
        (pb.PrefillOnlyRequest(model="demo", text=""), "text"),
        (pb.PrefillOnlyRequest(model="demo", chat=chat_pb2.ChatPrompt()), "chat.messages"),
        (
            pb.PrefillOnlyRequest(
                model="demo", text="a", cache=generation_pb2.CacheOptions(parent_key=b"short")
            ),
            "cache.parent_key",
        ),
        (
            pb.PrefillOnlyRequest(
                model="demo", text="a", cache=generation_pb2.CacheOptions(session_id="é" * 65)
            ),
            "cache.session_id",
        ),
        (
            pb.PrefillOnlyRequest(
                model="demo", text="a", cache=generation_pb2.CacheOptions(salt="s" * 257)
            ),
            "cache.salt",
        ),
    ],
)
async def test_mistakes_are_named(request_: pb.PrefillOnlyRequest, param: str) -> None:
    """What no engine takes reaches none."""
    async with running() as rig:
        error = await error_of(rig.inference.PrefillOnly(request_))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert from_rpc_error(error, service="gateway").param == param
        assert rig.coordinator.routes == []
        assert rig.count("refused", api="prefill") == 1


async def test_a_conversation_ends_on_every_engine() -> None:
    """All engines of the model are asked; one that is gone keeps nothing; the second time there is nothing."""
    async with running() as rig:
        second, gone = FakeEngine(), FakeEngine()
        for engine in (second, gone):
            await engine.start()
            rig.coordinator.engines.append(engine)
        await gone.kill()
        for engine in (rig.engine, second):
            engine.conversations = {("", "s-1"), ("", "s-2"), ("blue", "s-1")}
        end = pb.EndSessionRequest(model="demo", session_id="s-1")
        assert (await rig.inference.EndSession(end)).found
        left = {("", "s-2"), ("blue", "s-1")}
        assert rig.engine.conversations == second.conversations == left
        salted = pb.EndSessionRequest(model="demo", session_id="s-1", salt="blue")
        assert (await rig.inference.EndSession(salted)).found
        assert rig.engine.conversations == second.conversations == {("", "s-2")}
        assert not (await rig.inference.EndSession(end)).found
        await second.kill()


async def test_the_end_of_a_conversation_needs_a_model_and_an_id() -> None:
    """An unknown model is an error, not silence."""
    async with running() as rig:
        unknown = rig.inference.EndSession(pb.EndSessionRequest(model="gpt-9", session_id="s"))
        assert (await error_of(unknown)).code() is grpc.StatusCode.NOT_FOUND
        for session_id in ("", "s" * 129):
            request = pb.EndSessionRequest(model="demo", session_id=session_id)
            error = from_rpc_error(
                await error_of(rig.inference.EndSession(request)), service="gateway"
            )
            assert (error.reason, error.param) == ("INVALID_VALUE", "session_id")
        request = pb.EndSessionRequest(model="demo", session_id="s", salt="s" * 257)
        error = from_rpc_error(await error_of(rig.inference.EndSession(request)), service="gateway")
        assert (error.reason, error.param) == ("INVALID_VALUE", "salt")


async def test_reuse_is_counted_by_model_and_kind() -> None:
    """Prompt tokens of finished requests, and those that were not computed again."""
    async with running(started(), WARM) as rig:
        await rig.chat_bytes()
        await rig.inference.PrefillOnly(pb.PrefillOnlyRequest(model="demo", text="Once"))
        await rig.idle()

        def value(name: str, **labels: str) -> float | None:
            return rig.registry.get_sample_value(f"caravan_gateway_{name}", labels)

        assert value("prompt_tokens_total", model="demo") == 3 + 9
        assert value("cached_prompt_tokens_total", model="demo", hit="exact") == 1
        assert value("cached_prompt_tokens_total", model="demo", hit="partial") == 4


async def test_labels_are_bounded() -> None:
    """However many models there were, only so many have series of their own (I4)."""
    async with running(started(), WARM) as rig:
        for number in range(MODEL_LABELS_MAX + 3):
            await rig.chat_bytes(model=f"model-{number}")
        await rig.idle()
        samples = {
            sample.labels["model"]: sample.value
            for metric in rig.registry.collect()
            for sample in metric.samples
            if sample.name == "caravan_gateway_prompt_tokens_total"
        }
        assert len(samples) == MODEL_LABELS_MAX + 1
        assert samples["(others)"] == 3 * 3
