"""Requests that outlive their engines, over real gRPC: the same text, one ending, nothing twice, nothing left (I1, I6; W3)."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.inference.v1 import inference_service_pb2 as inference_pb
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.runtime.errors import CaravanError, from_rpc_error
from services.runtime.telemetry import OtelTracing
from tests.support.coordinator import until
from tests.support.gateway import Rig, error_of, running
from tests.support.gateway_peers import KEY, FakeEngine, delta, finished, hang, started
from tests.support.mortal_engines import (
    BEFORE_START,
    PROMPT_TOKENS,
    TOKENS,
    Fate,
    MortalEngine,
    Story,
    Way,
    token_id,
    whole_text,
)

SEED = 77
PROMPT = chat_pb2.ChatPrompt(messages=[chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content="hi")])
STALL_S = 0.4


@dataclass
class Told:
    """What a client got."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


EXPECTED = Told(whole_text(SEED), PROMPT_TOKENS, TOKENS, cached_tokens=1)


@asynccontextmanager
async def telling(
    *fates: Fate, engines: int = 3, step: int = 1, **settings: Any
) -> AsyncIterator[tuple[Rig, Story]]:
    """A gateway and engines that share one story."""
    story = Story(list(fates), step=step)
    mortals = [MortalEngine(story) for _ in range(engines)]
    async with running(engines=mortals, **settings) as rig:
        yield rig, story


async def _plain(rig: Rig) -> Told:
    answer = json.loads(await rig.chat_bytes(seed=SEED))
    return _told(answer["choices"][0]["message"]["content"], answer["usage"])


async def _streamed(rig: Rig) -> Told:
    options = {"include_usage": True}
    body = await rig.chat_bytes(stream=True, stream_options=options, seed=SEED)
    *events, done, rest = body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    ended = [chunk for chunk in chunks if chunk["choices"] and chunk["choices"][0]["finish_reason"]]
    assert len(ended) == 1, "one ending"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert [delta.get("role") for delta in deltas].count("assistant") == 1
    return _told("".join(delta.get("content", "") for delta in deltas), chunks[-1]["usage"])


def _told(text: str, usage: dict[str, Any]) -> Told:
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Told(text, usage["prompt_tokens"], usage["completion_tokens"], cached)


async def _typed(rig: Rig) -> Told:
    sampling = generation_pb2.Sampling(seed=SEED)
    request = inference_pb.ChatRequest(model="demo", prompt=PROMPT, sampling=sampling)
    events = [event async for event in rig.inference.Chat(request, timeout=20)]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["started", *["delta"] * (len(events) - 2), "finished"]
    ids = [value for event in events for value in event.delta.token_ids]
    assert ids == [token_id(SEED, position) for position in range(TOKENS)]
    usage = events[-1].finished.usage
    assert events[-1].finished.finish_key == KEY
    return Told(
        "".join(event.delta.text for event in events),
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.cached_tokens,
    )


ASK = {"plain": _plain, "streamed": _streamed, "typed": _typed}
LOSSES = {
    "before the start": [Fate(Way.DIES, BEFORE_START)],
    "after the start": [Fate(Way.DIES, 0)],
    "in the middle": [Fate(Way.DIES, 4)],
    "between tokens of a character": [Fate(Way.ENDS, 5)],
    "after the last token": [Fate(Way.DIES, TOKENS)],
    "twice": [Fate(Way.DIES, 2), Fate(Way.DIES, 7)],
    "twice at the same token": [Fate(Way.ENDS, 3), Fate(Way.ENDS, 3)],
    "stalled": [Fate(Way.STALLS, 3)],
    "stalled before the start": [Fate(Way.STALLS, BEFORE_START)],
    "draining": [Fate(Way.DRAINS, 6)],
    "full": [Fate(Way.FULL, BEFORE_START), Fate(Way.FULL, BEFORE_START)],
}


@pytest.mark.parametrize("fates", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
async def test_the_client_notices_nothing(ask: Any, fates: list[Fate]) -> None:
    """Whatever befalls the engines, the text is that of one that lived; usage counts once; every lease is released once."""
    async with telling(*fates, stall_s=STALL_S) as (rig, story):
        told = await ask(rig)
        assert told.text == EXPECTED.text
        assert (told.prompt_tokens, told.completion_tokens) == (PROMPT_TOKENS, TOKENS)
        await rig.idle()
        assert len(story.calls) == len(rig.coordinator.routes) == 1 + len(fates)
        assert rig.coordinator.outcomes[-1] == "FINISHED"
        assert "FINISHED" not in rig.coordinator.outcomes[:-1]
        released = [lease_id for lease_id, _ in rig.coordinator.releases]
        assert len(released) == len(set(released)) == 1 + len(fates)
        assert rig.count("finished") == 1


async def test_the_cache_is_told_of_once() -> None:
    """What later engines reuse of the prompt does not count: the client has waited for its prompt once."""
    async with telling(Fate(Way.ENDS, 4)) as (rig, _):
        assert (await _typed(rig)).cached_tokens == 1
        assert (await _typed(rig)).cached_tokens == 4, "an answer of one engine is told as it says"


async def test_the_next_engine_is_asked_for_the_rest() -> None:
    """It gets the same request with the tokens that the client has, goes before others, and is not the one that was lost."""
    async with telling(Fate(Way.DIES, 4), Fate(Way.ENDS, 6)) as (rig, story):
        await _streamed(rig)
        await rig.idle()
        first, second, third = story.calls
        assert not first.HasField("resume")
        ids = [token_id(SEED, position) for position in range(6)]
        assert list(second.resume.token_ids) == ids[:4]
        assert list(third.resume.token_ids) == ids
        assert first.request_id == second.request_id == third.request_id
        before, after, last = rig.coordinator.routes
        assert (before.resumed, before.may_fall_back, list(before.avoid_incarnations)) == (
            False,
            True,
            [],
        )
        assert (after.resumed, after.may_fall_back) == (True, False)
        lost = [engine.incarnation for engine in rig.coordinator.engines if engine.requests]
        assert len(after.avoid_incarnations) == 1
        assert set(after.avoid_incarnations) < set(last.avoid_incarnations) < set(lost)
        assert rig.coordinator.finish_keys == [b"", b"", KEY]
        assert rig.migrations("ENGINE_LOST", "moved") == 2
        seconds = rig.registry.get_sample_value("caravan_migration_seconds_count")
        assert seconds == 2


async def test_a_lease_is_given_back_before_the_next_is_asked_for() -> None:
    """The coordinator knows a request by its id, once at a time."""
    seen: list[int] = []

    async with telling(Fate(Way.ENDS, 4)) as (rig, _):

        async def hold() -> None:
            with suppress(TimeoutError):
                await until(lambda: len(rig.coordinator.routes) == 2, deadline_s=0.2)
            seen.append(len(rig.coordinator.routes))

        rig.coordinator.hold_release = hold
        await _plain(rig)
        await rig.idle()
        assert seen == [1, 2]


async def test_a_release_that_was_missed_does_not_block_the_way() -> None:
    """Where the coordinator still holds the request's former lease, it is asked until it has let go of that."""

    async def grant() -> None:
        return

    ghost = CaravanError("DUPLICATE_REQUEST", "It is in flight.", request_id="r")
    async with telling(Fate(Way.ENDS, 4)) as (rig, _):
        rig.coordinator.refusals = [grant, ghost, ghost]
        assert (await _plain(rig)).text == EXPECTED.text


async def test_an_answer_that_is_complete_stays_with_its_engine() -> None:
    """An engine that hangs behind its last event has answered: nothing moves any more."""
    async with running(started(), delta("a"), finished(), hang, stall_s=0.2) as rig:
        assert b'"content":"a"' in await rig.chat_bytes()
        await rig.idle()
        assert len(rig.engine.requests) == 1
        assert rig.coordinator.outcomes == ["FINISHED"]


async def test_a_prefill_may_take_its_time() -> None:
    """PrefillOnly has one answer and no signs of life: its silence is no stall. Its engine's loss moves it like any request."""

    async def compute() -> None:
        # Several times what a stream may be silent.
        await asyncio.wait({asyncio.create_task(hang())}, timeout=0.6)

    async with running(engines=[FakeEngine(), FakeEngine()], stall_s=0.1) as rig:
        rig.coordinator.engines[0].prefill_steps = [compute, CaravanError("DRAINING", "Going.")]
        request = inference_pb.PrefillOnlyRequest(model="demo", text="a prompt")
        answer = await rig.inference.PrefillOnly(request, timeout=20)
        assert answer.finish_key == KEY
        await rig.idle()
        assert [len(engine.prefills) for engine in rig.coordinator.engines] == [1, 1]
        assert rig.migrations("DRAINING", "moved") == 1


async def test_a_trace_tells_of_the_move() -> None:
    """The request's span says which engine was left and why, and when another went on."""
    exporter = InMemorySpanExporter()
    tracing = OtelTracing("gateway", SimpleSpanProcessor(exporter))
    async with telling(Fate(Way.ENDS, 4), tracing=tracing) as (rig, _):
        await _plain(rig)
        await rig.idle()
    (span,) = exporter.get_finished_spans()
    names = [event.name for event in span.events]
    assert names == ["first_token", "left engine-1: ENGINE_LOST", "moved"]
    assert (span.attributes or {})["caravan.engine_id"] == "engine-2"
    tracing.shutdown()


async def test_a_seed_is_drawn_once() -> None:
    """A client that gave no seed gets one answer all the same, and another one the next time."""
    async with telling(Fate(Way.ENDS, 4)) as (rig, story):
        text = json.loads(await rig.chat_bytes())["choices"][0]["message"]["content"]
        first, second = story.calls
        assert first.sampling.HasField("seed")
        assert first.sampling.seed == second.sampling.seed
        assert text == whole_text(first.sampling.seed)
        await rig.chat_bytes()
        assert story.calls[-1].sampling.seed != first.sampling.seed


async def test_the_only_engine_dies_and_comes_back() -> None:
    """The request waits for the engine's next life and goes on there."""
    async with telling(Fate(Way.DIES, 5), engines=1) as (rig, story):
        asking = asyncio.create_task(_streamed(rig))
        await until(lambda: len(rig.coordinator.routes) == 2)
        again = MortalEngine(story)
        await again.start()
        rig.coordinator.engine_joined(again)
        assert (await asking).text == EXPECTED.text
        await rig.idle()
        await again.kill()


@pytest.mark.parametrize("way", [Way.DIES, Way.STALLS, Way.DRAINS])
async def test_what_must_not_run_twice_does_not(way: Way) -> None:
    """A deployment that is not idempotent: once an engine may have begun, its loss is the end, with the reason."""
    async with telling(Fate(way, 2), stall_s=STALL_S) as (rig, story):
        rig.coordinator.idempotent = False
        error = from_rpc_error(await error_of(rig.chat(seed=SEED)), service="gateway")
        reasons = {
            Way.DIES: "ENGINE_LOST",
            Way.STALLS: "ENGINE_STALLED",
            Way.DRAINS: "DRAINING",
        }
        assert error.reason == reasons[way]
        await until(lambda: not rig.coordinator.held)
        assert len(story.calls) == 1
        assert rig.coordinator.outcomes == ["FAILED"]


async def test_what_must_not_run_twice_may_be_refused_twice() -> None:
    """An engine where it has only waited has not begun it, so that another one may."""
    async with telling(Fate(Way.FULL, BEFORE_START), Fate(Way.DRAINS, BEFORE_START)) as (rig, _):
        rig.coordinator.idempotent = False
        assert (await _plain(rig)).text == EXPECTED.text


async def test_what_an_engine_cannot_compute_is_not_moved() -> None:
    """A request that fails one engine would fail all of them, one after the other."""
    async with telling(Fate(Way.FAILS, 2)) as (rig, story):
        error = from_rpc_error(await error_of(rig.chat(stream=True)), service="gateway")
        assert error.reason == "DECODE_FAILED"
        await rig.idle()
        assert len(story.calls) == 1


async def test_moves_are_bounded() -> None:
    """A request that loses every engine ends with why, once."""
    fates = [Fate(Way.ENDS, 1 + number) for number in range(6)]
    async with telling(*fates, engines=8, migrations_max=3) as (rig, story):
        error = from_rpc_error(await error_of(rig.chat(stream=True)), service="gateway")
        assert error.reason == "ENGINE_LOST"
        await rig.idle()
        assert len(story.calls) == 4
        assert rig.coordinator.outcomes == ["FAILED"] * 4
        assert rig.migrations("ENGINE_LOST", "moved") == 3
        assert rig.count("failed") == 1


async def test_a_client_that_leaves_on_the_way() -> None:
    """A request that waits for its next engine ends with its client, and the lease that comes late is given back."""
    async with telling(Fate(Way.DIES, 3), engines=1) as (rig, story):
        call = rig.chat(stream=True)
        await call.read()
        await until(lambda: len(rig.coordinator.routes) == 2)
        call.cancel()
        await until(lambda: len(rig.gateway.sessions) == 0)
        again = MortalEngine(story)
        await again.start()
        rig.coordinator.engine_joined(again)
        await rig.idle()
        assert rig.coordinator.outcomes == ["FAILED", "CANCELLED"]
        assert again.requests == []
        assert rig.migrations("ENGINE_LOST", "cancelled") == 1
        await again.kill()


async def test_a_deadline_that_passes_on_the_way() -> None:
    """The client is told, and nothing is left."""
    async with telling(Fate(Way.DIES, 3), engines=1) as (rig, story):
        error = await error_of(rig.chat(timeout=0.7))
        assert from_rpc_error(error, service="gateway").reason == "DEADLINE_EXCEEDED"
        await until(lambda: len(rig.gateway.sessions) == 0)
        assert len(story.calls) == 1
        again = MortalEngine(story)
        await again.start()
        rig.coordinator.engine_joined(again)
        await rig.idle()
        assert again.requests == []
        await again.kill()


@pytest.mark.parametrize("number", range(4))
async def test_many_requests_at_a_time_lose_their_engines(number: int) -> None:
    """Engines fail under many streams, anywhere in them: every client gets its own whole text. The number is the seed."""
    rng = random.Random(number)
    ways = [Way.ENDS, Way.DRAINS, Way.FULL, Way.STALLS]
    fates = [Fate(rng.choice(ways), rng.randint(BEFORE_START, TOKENS)) for _ in range(40)]
    settings = {"stall_s": STALL_S, "migrations_max": 50}
    # A life that stalled is avoided by those whom it has failed: there are enough for all.
    async with telling(*fates, engines=12, step=rng.randint(1, 4), **settings) as (rig, _):

        async def one(seed: int) -> None:
            answer = json.loads(await rig.chat_bytes(seed=seed))
            assert answer["choices"][0]["message"]["content"] == whole_text(seed)

        await asyncio.gather(*(one(seed) for seed in range(40)))
        await rig.idle()
        released = [lease_id for lease_id, _ in rig.coordinator.releases]
        assert len(released) == len(set(released)) == len(rig.coordinator.grants)
