"""Answers of another deployment than the one asked for, as clients of the gateway see them."""

from __future__ import annotations

import json
from typing import Any

from caravan.core.v1 import chat_pb2
from caravan.inference.v1 import inference_service_pb2 as pb

from services.runtime.errors import CaravanError, from_rpc_error
from tests.support.gateway import error_of, openai_error, running
from tests.support.mortal_engines import Fate, MortalEngine, Story, Way

PROMPT = chat_pb2.ChatPrompt(messages=[chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content="hi")])


async def _header(call: Any) -> str | None:
    found = dict(await call.initial_metadata()).get("x-caravan-deployment")
    return None if found is None else str(found)


async def test_the_answer_keeps_the_name_that_was_asked_for() -> None:
    """`model` is the client's word; header, `caravan` object and metrics name who answered."""
    async with running() as rig:
        rig.coordinator.serving_model = "spare"
        call = rig.chat(caravan={})
        answer = json.loads((await call.read()).body.data)
        assert answer["model"] == "demo"
        assert answer["caravan"]["deployment"] == "spare"
        assert await _header(call) == "spare"
        body = await rig.chat_bytes(stream=True, caravan={})
        shown = [json.loads(line[6:]) for line in body.decode().split("\n\n")[:-2]]
        assert {chunk["model"] for chunk in shown} == {"demo"}
        assert shown[-1]["caravan"]["deployment"] == "spare"
        await rig.idle()
        series = "caravan_gateway_prompt_tokens_total"
        assert rig.registry.get_sample_value(series, {"model": "spare"}) == 6
        assert rig.registry.get_sample_value(series, {"model": "demo"}) is None


async def test_the_deployment_that_was_asked_for_is_not_repeated() -> None:
    """Without a fallback the `caravan` object has no `deployment`; the header names it all the same."""
    async with running() as rig:
        call = rig.chat(caravan={})
        assert "deployment" not in json.loads((await call.read()).body.data)["caravan"]
        assert await _header(call) == "demo"
        typed = rig.inference.Chat(pb.ChatRequest(model="demo", prompt=PROMPT))
        await typed.read()
        assert await _header(typed) == "demo"


async def test_a_name_that_no_header_can_hold_is_quoted() -> None:
    """An engine that was started by hand may have any name."""
    async with running() as rig:
        rig.coordinator.serving_model = "modèle 1"
        call = rig.chat()
        await call.read()
        assert await _header(call) == "mod%C3%A8le%201"


async def test_a_prompt_that_the_fallback_cannot_hold() -> None:
    """The client knows the context of the model that it named; the error says whose was too small."""
    refusal = CaravanError(
        "CONTEXT_LENGTH_EXCEEDED",
        "Too long.",
        param="chat",
        prompt_tokens="50",
        context_tokens="40",
    )
    async with running(refusal) as rig:
        rig.coordinator.serving_model = "spare"
        error = await error_of(rig.chat())
        assert (
            openai_error(error)["message"]
            == "Too long. It is served by 'spare' in place of 'demo'."
        )
        assert dict(error.trailing_metadata() or ())["x-caravan-deployment"] == "spare"
        assert from_rpc_error(error, service="gateway").metadata["context_tokens"] == "40"


async def test_an_answer_that_has_begun_stays_with_its_deployment() -> None:
    """The rest is asked of the fallback that began it; what has not begun is asked for by its own name again."""
    story = Story([Fate(Way.FULL, -1), Fate(Way.ENDS, 4)])
    async with running(engines=[MortalEngine(story) for _ in range(3)]) as rig:
        rig.coordinator.serving_model = "spare"
        await rig.chat_bytes(seed=1)
        asked = [(route.model, route.may_fall_back) for route in rig.coordinator.routes]
        assert asked == [("demo", True), ("demo", True), ("spare", False)]
