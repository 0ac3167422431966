"""Answers of an engine in front of a provider: gRPC at one end, HTTP at the other."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from caravan.core.v1 import chat_pb2
from caravan.engine.v1 import engine_service_pb2 as pb
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.dev.provider.faults import Fault, Kind
from services.dev.provider.script import Script
from services.engine.remote.estimate import prompt_tokens
from services.runtime.errors import CaravanError
from services.runtime.telemetry import OtelTracing
from tests.support.remote import running_remote

PROVIDERS = ("openai", "anthropic", "gemini", "litellm", "openai_compatible")


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_an_answer_of_each_provider(provider: str) -> None:
    """One start, the text, one end with the provider's own counts; nothing is left behind."""
    async with running_remote(
        Script(text="one two three", cached_tokens=1), provider=provider
    ) as rig:
        answer = await rig.run()
        assert answer.text == "one two three"
        assert answer.reason == "STOP"
        assert answer.pieces >= 1
        assert answer.usage.completion_tokens == 3
        assert answer.usage.cached_tokens == 1
        assert answer.usage.prompt_tokens > 1
        await rig.idle()
        assert rig.sample("caravan_remote_requests_total", outcome="succeeded") == 1
        assert rig.sample("caravan_remote_attempts_total", outcome="succeeded") == 1
        assert rig.sample("caravan_generated_tokens_total") == 3


async def test_the_length_that_was_asked_for() -> None:
    """A limit of the request reaches the provider, and so does its reason to stop."""
    async with running_remote(Script(tokens=50)) as rig:
        request = rig.request()
        request.stop.max_tokens = 4
        answer = await rig.run(request)
        assert answer.reason == "LENGTH"
        assert answer.usage.completion_tokens == 4


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_tool_is_called(provider: str) -> None:
    """Its name and id come once, and the pieces of its arguments are one JSON object."""
    async with running_remote(provider=provider) as rig:
        request = rig.request()
        request.chat.tools.add(name="look", parameters_json='{"type": "object", "properties": {}}')
        request.chat.tool_choice.mode = chat_pb2.ToolChoice.MODE_REQUIRED
        answer = await rig.run(request)
        assert answer.reason == "TOOL_CALLS"
        assert {call.index for call in answer.calls} == {0}
        assert [call.name for call in answer.calls if call.name] == ["look"]
        assert len([call.id for call in answer.calls if call.id]) == 1
        assert isinstance(json.loads("".join(c.arguments_json for c in answer.calls)), dict)


async def test_log_probabilities_are_those_of_all_tokens() -> None:
    """Also where several pieces are told together."""
    async with running_remote(Script(tokens=20)) as rig:
        answer = await rig.run(rig.request(top_logprobs=2))
        assert b"".join(entry.token for entry in answer.logprobs).decode() == answer.text
        assert {len(entry.top) for entry in answer.logprobs} == {2}


async def test_what_anthropic_is_told_and_tells_besides() -> None:
    """An answer's longest length, which it asks for; and the stop text that was met."""
    script = Script(text="one two three")
    async with running_remote(script, provider="anthropic", defaultMaxTokens=77) as rig:
        request = rig.request()
        request.stop.stop.append("three")
        answer = await rig.run(request)
        assert rig.provider.requests[0].json()["max_tokens"] == 77
        assert (answer.text.strip(), answer.reason) == ("one two", "STOP")
        assert answer.finished[0].stop_text == "three"


async def test_what_comes_together_is_one_message() -> None:
    """Pieces that the provider sends in one write, or that come while the writer is busy, travel together."""
    async with running_remote(Script(tokens=500)) as rig:
        answer = await rig.run()
        assert answer.pieces == 500
        assert answer.deltas < 50


async def test_a_request_costs_what_the_table_says() -> None:
    """Tokens times price, told with the end, to the coordinator by tenant, and in the metrics."""
    price = {"inputUsd": 2, "outputUsd": 8, "cachedInputUsd": 1}
    async with running_remote(Script(tokens=10, cached_tokens=1), price=price) as rig:
        answer = await rig.run(rig.request(tenant="ants"))
        usage = answer.usage
        nanousd = (usage.prompt_tokens - 1) * 2000 + 1000 + 10 * 8000
        assert answer.finished[0].cost_nanousd == nanousd
        await rig.idle()
        (spent,) = rig.engine.endpoint.accounts.spend.report()
        assert (spent.tenant, spent.nanousd, spent.requests) == ("ants", nanousd, 1)
        assert spent.completion_tokens == 10
        assert rig.sample("caravan_remote_cost_usd_total") == pytest.approx(nanousd / 1e9)
        assert rig.sample("caravan_remote_cached_prompt_tokens_total") == 1
        assert rig.sample("caravan_remote_first_byte_seconds_count") == 1


@pytest.mark.parametrize("who", ["caller", "deadline", "timeout"])
async def test_a_call_that_is_given_up_costs_its_prompt(who: str) -> None:
    """The provider has read it, and charges it, also where nothing of the answer has come: else leaving early would be free."""
    options: dict[str, Any] = {"price": {"inputUsd": 2, "outputUsd": 8}, "retry": {"maxRetries": 0}}
    if who == "timeout":
        options["timeouts"] = {"firstByte": "0.2s"}
    async with running_remote(**options) as rig:
        rig.provider.faults.add(Fault(Kind.HANG))
        request = rig.request(tenant="ants")
        running = asyncio.create_task(rig.run(request, 0.3 if who == "deadline" else None))
        await rig.provider.wait_for_requests(1)
        if who == "caller":
            running.cancel()
        ends = asyncio.CancelledError if who == "caller" else CaravanError
        with pytest.raises(ends):
            await running
        await rig.idle()
        (spent,) = rig.engine.endpoint.accounts.spend.report()
        assert (spent.tenant, spent.requests, spent.completion_tokens) == ("ants", 1, 0)
        assert spent.prompt_tokens == prompt_tokens(request) > 0
        assert spent.nanousd == spent.prompt_tokens * 2000


async def test_an_answer_that_is_cut_off_costs_what_its_text_is_worth() -> None:
    """A piece may be many tokens: to count pieces alone would charge too little wherever usage comes with the end."""
    script = Script(text=" ".join(["extraordinarily"] * 10))
    async with running_remote(script, price={"inputUsd": 0, "outputUsd": 8}) as rig:
        rig.provider.faults.add(Fault(Kind.CUT, after=4))
        assert (await rig.refusal()).reason == "PROVIDER_UNREACHABLE"
        await rig.idle()
        (spent,) = rig.engine.endpoint.accounts.spend.report()
        assert 14 <= spent.completion_tokens <= 18  # 4 pieces of about 16 characters.
        assert spent.nanousd == spent.completion_tokens * 8000


async def test_a_trace_has_a_part_for_each_attempt() -> None:
    """One span for the request with what was used, and below it one for each call with what became of it."""
    spans = InMemorySpanExporter()
    tracing = OtelTracing("engine", SimpleSpanProcessor(spans))
    async with running_remote(Script(tokens=4), tracing=tracing) as rig:
        rig.provider.faults.add(Fault(Kind.STATUS, status=503))
        await rig.run()
        await rig.idle()
    tracing.shutdown()
    first, second, request = spans.get_finished_spans()
    assert request.name == "generate"
    told = dict(request.attributes or {})
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.provider.name"] == "openai"
    assert told["gen_ai.request.model"] == "gpt-4o-mini"
    assert told["gen_ai.usage.output_tokens"] == 4
    for number, span in enumerate((first, second), 1):
        assert span.name == "attempt"
        assert span.parent is not None
        assert span.parent.span_id == request.context.span_id
        assert dict(span.attributes or {})["caravan.attempt"] == number
    assert first.status.description == "provider_failed"
    assert second.status.is_ok or second.status.is_unset


async def test_a_silent_stream_is_told_to_be_alive() -> None:
    """While the provider thinks, progress comes; the times of the end say for how long it thought."""
    async with running_remote(Script(tokens=1, delay_s=0.3)) as rig:
        answer = await rig.run()
        assert answer.progress >= 2
        assert answer.finished[0].prefill_time.ToMilliseconds() >= 280


async def test_connections_are_used_again() -> None:
    """An answer that was read to its end leaves its connection to the next one."""
    async with running_remote(Script(tokens=3)) as rig:
        for _ in range(5):
            await rig.run()
        assert len({request.connection for request in rig.provider.requests}) == 1


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
async def test_a_request_that_is_cancelled_ends_as_cancelled(provider: str) -> None:
    """Cancel ends the stream with FINISH_REASON_CANCELLED and what was used, and closes the provider's. What the provider tells
    at the beginning does not count what follows."""
    async with running_remote(Script(tokens=1000, pace_s=0.01), provider=provider) as rig:
        request = rig.request()
        running = asyncio.create_task(rig.run(request))
        await rig.until(lambda: any(row.pieces > 3 for row in rig.engine.inflight.oldest_first()))
        assert (await rig.stub.Cancel(pb.CancelRequest(request_id=request.request_id))).found
        answer = await running
        assert answer.reason == "CANCELLED"
        assert 3 < answer.usage.completion_tokens < 1000
        assert answer.usage.prompt_tokens > 0
        async with asyncio.timeout(5):
            await rig.provider.requests[0].closed_by_client.wait()
        await rig.idle()
        assert rig.sample("caravan_remote_requests_total", outcome="cancelled") == 1
        assert not (await rig.stub.Cancel(pb.CancelRequest(request_id=request.request_id))).found


async def test_a_client_that_leaves_closes_the_call_of_the_provider() -> None:
    """The provider sees the close; what was used until then is counted (I5, I6)."""
    async with running_remote(Script(tokens=1000, pace_s=0.01)) as rig:
        call = rig.stub.Generate(rig.request(tenant="bees"))
        await call.read()
        await rig.until(lambda: any(row.pieces > 3 for row in rig.engine.inflight.oldest_first()))
        call.cancel()
        async with asyncio.timeout(5):
            await rig.provider.requests[0].closed_by_client.wait()
        await rig.idle()
        (spent,) = rig.engine.endpoint.accounts.spend.report()
        assert spent.tenant == "bees"
        assert spent.completion_tokens > 3
        assert rig.engine.endpoint.breaker.status(0).failures == 0


async def test_what_the_engine_says_of_itself() -> None:
    """Model, load and requests in flight, as gateways and the coordinator read them."""
    async with running_remote(Script(tokens=1000, pace_s=0.01), workers=3) as rig:
        status = await rig.stub.GetStatus(pb.GetStatusRequest())
        assert status.model.name == "chat"
        assert status.model.provider == "openai"
        assert status.model.max_sequences == 3
        assert status.model.cache_support == pb.CACHE_SUPPORT_OFF
        assert status.model.cache_note
        assert status.load.phase == pb.ENGINE_PHASE_IDLE
        call = rig.stub.Generate(rig.request())
        await rig.until(lambda: any(row.pieces for row in rig.engine.inflight.oldest_first()))
        status = await rig.stub.GetStatus(pb.GetStatusRequest())
        assert status.load.phase == pb.ENGINE_PHASE_GENERATING
        assert status.load.active_sequences == 1
        (row,) = (await rig.stub.ListInflight(pb.ListInflightRequest())).requests
        assert row.phase == pb.REQUEST_PHASE_GENERATING
        assert row.completion_tokens > 0
        call.cancel()
        await rig.idle()


async def test_methods_that_need_the_model_itself() -> None:
    """What a provider cannot do is refused by name, or answered with nothing."""
    async with running_remote() as rig:
        with pytest.raises(Exception, match="keeps no prompts"):
            await rig.stub.PrefillOnly(pb.PrefillOnlyRequest(request_id="p"))
        assert not (await rig.stub.EndSession(pb.EndSessionRequest(session_id="s"))).found
        keys = [bytes(32), bytes([1] * 32)]
        pieces = [p async for p in rig.stub.FetchBlocks(pb.FetchBlocksRequest(keys=keys))]
        assert [(p.key, p.missing) for p in pieces] == [(key, True) for key in keys]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"request_id": ""}, "INVALID_VALUE"),
        ({"request_id": "x" * 129}, "INVALID_VALUE"),
        ({"tenant": "x" * 129}, "INVALID_VALUE"),
        ({"resume": pb.Resume(token_ids=[1])}, "UNSUPPORTED_FIELD"),
    ],
)
async def test_requests_that_are_refused(change: dict[str, object], reason: str) -> None:
    """What cannot be asked of the provider never reaches it, and leaves nothing behind."""
    async with running_remote() as rig:
        request = rig.request()
        request.MergeFrom(pb.GenerateRequest(**change))  # type: ignore[arg-type]
        if change.get("request_id") == "":
            request.request_id = ""
        error = await rig.refusal(request)
        assert error.reason == reason
        assert not rig.provider.requests
        await rig.idle()


async def test_an_id_is_in_flight_once() -> None:
    """A second request of the same id is refused, and the first goes on."""
    async with running_remote(Script(tokens=20, pace_s=0.01)) as rig:
        request = rig.request()
        running = asyncio.create_task(rig.run(request))
        await rig.until(lambda: rig.engine.inflight.depth == 1)
        assert (await rig.refusal(request)).reason == "DUPLICATE_REQUEST"
        assert (await running).pieces == 20


async def test_a_slow_reader_holds_the_provider_back() -> None:
    """What waits for a client that does not read is bounded: beyond it nothing more is taken from the provider (I4)."""
    async with running_remote(Script(text=("x" * 1000 + " ") * 20_000, tokens=20_000)) as rig:
        call = rig.stub.Generate(rig.request())
        await call.read()
        (row,) = rig.engine.inflight.oldest_first()
        # gRPC's own buffers take some; then the outbox fills, and the count of pieces stands still.
        counts = [-1, row.pieces]
        async with asyncio.timeout(10):
            while counts[-1] != counts[-2]:
                await asyncio.sleep(0.2)
                counts.append(row.pieces)
        assert row.outbox.is_full
        assert row.pieces < 10_000
        call.cancel()
        await rig.idle()


async def test_a_filter_ends_an_answer_with_its_reason() -> None:
    """A provider that holds back the rest says so; the text until then stays."""
    async with running_remote(Script(tokens=10)) as rig:
        rig.provider.faults.add(Fault(Kind.FILTERED, after=4))
        answer = await rig.run()
        assert answer.reason == "CONTENT_FILTER"
        assert answer.pieces >= 4
        await rig.idle()
        assert rig.sample("caravan_remote_requests_total", outcome="content_filtered") == 1


async def test_a_deadline_of_the_caller_ends_the_call() -> None:
    """The call of the provider is closed when the caller's time is over."""
    async with running_remote(Script(tokens=1000, pace_s=0.05)) as rig:
        with pytest.raises(CaravanError) as raised:
            await rig.run(timeout_s=0.3)
        assert raised.value.reason == "DEADLINE_EXCEEDED"
        async with asyncio.timeout(5):
            await rig.provider.requests[0].closed_by_client.wait()
        await rig.idle()
