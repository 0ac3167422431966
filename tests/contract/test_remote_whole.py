"""Answers that nobody reads before their end, and how often the others are told, through a remote engine."""

from __future__ import annotations

import pytest
from caravan.core.v1 import generation_pb2

from services.dev.provider.faults import Fault, Kind
from services.dev.provider.script import Script
from tests.support.remote import running_remote

PROVIDERS = ["openai", "anthropic", "gemini"]
STREAMING = {"openai": '"stream":true', "anthropic": '"stream":true', "gemini": "stream"}


def short() -> generation_pb2.StopConditions:
    """As short as answers in one piece are."""
    return generation_pb2.StopConditions(max_tokens=512)


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_short_whole_answer_is_one_piece(provider: str) -> None:
    """With the same text, reason and usage as the streamed one."""
    async with running_remote(Script(tokens=50), provider=provider) as rig:
        streamed = await rig.run(rig.request(stop=short()))
        whole = await rig.run(rig.request(stop=short(), whole=True))
        assert (whole.pieces, whole.deltas) == (1, 1)
        assert streamed.pieces > 1
        assert len(whole.text.split()) == 50
        assert whole.reason == streamed.reason
        assert whole.usage.completion_tokens == streamed.usage.completion_tokens
        assert whole.usage.prompt_tokens == streamed.usage.prompt_tokens
        messages = [m async for m in rig.stub.Generate(rig.request(stop=short(), whole=True))]
        assert len(messages) == 1, "start, text and end are known together"
        asked = [received.path + received.body.decode() for received in rig.provider.requests]
        assert [STREAMING[provider] in said for said in asked] == [True, False, False]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("status", [429, 503])
async def test_a_refusal_of_a_whole_answer_is_tried_again(provider: str, status: int) -> None:
    """As of any other."""
    async with running_remote(Script(tokens=5), provider=provider) as rig:
        rig.provider.faults.add(Fault(Kind.STATUS, status=status))
        assert (await rig.run(rig.request(stop=short(), whole=True))).reason == "STOP"
        assert len(rig.provider.requests) == 2


async def test_a_long_whole_answer_is_told_in_few_deltas() -> None:
    """The first at once, the others a quarter of a second apart."""
    script = Script(tokens=60, pace_s=0.01)
    async with running_remote(script) as rig:
        answer = await rig.run(rig.request(whole=True))
        assert answer.pieces >= 60
        assert answer.deltas <= 6
        assert len(answer.text.split()) == 60


@pytest.mark.parametrize(("gather", "least", "most"), [("0s", 30, 60), ("0.2s", 2, 6)])
async def test_deltas_gather(gather: str, least: int, most: int) -> None:
    """As long as the deployment says."""
    script = Script(tokens=60, pace_s=0.01)
    async with running_remote(script, gather=gather) as rig:
        answer = await rig.run()
        assert least <= answer.deltas <= most
        assert len(answer.text.split()) == 60


async def test_gathering_is_no_silence_of_the_provider() -> None:
    """The time between two bytes may be shorter than that between two deltas."""
    script = Script(tokens=40, pace_s=0.02)
    async with running_remote(script, gather="1s", timeouts={"betweenBytes": "0.3s"}) as rig:
        answer = await rig.run()
        assert answer.reason == "STOP"
        assert answer.deltas <= 8
