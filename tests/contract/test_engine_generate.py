"""EngineService over loopback gRPC, with the scripted backend: the whole engine except llama.cpp."""

from __future__ import annotations

import asyncio
import json

import pytest
from caravan.core.v1 import chat_pb2
from caravan.core.v1 import generation_pb2 as generation
from caravan.engine.v1 import engine_service_pb2 as pb

from services.engine.scripted_vocabulary import MESSAGE_END
from tests.support.engine import running_engine

SLOW = "demo=scripted:?step_ms=5&tokens=100000&context=8000"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


async def test_an_answer_is_started_then_deltas_then_finished() -> None:
    """One Started, Deltas with text and tokens, one Finished with usage; the end token is counted."""
    async with running_engine("demo=scripted:?tokens=6") as client:
        answer = await client.ask("hi")
        assert answer.reason == generation.FINISH_REASON_STOP
        assert len(answer.tokens) == 7
        assert answer.tokens[-1] == MESSAGE_END
        assert len(answer.text.split()) == 6
        usage = answer.finished[0].usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (
            answer.started[0].prompt_tokens,
            7,
        )
        assert answer.finished[0].prefill_time.ToMicroseconds() > 0


async def test_max_tokens_ends_an_answer_by_length() -> None:
    """The last token is delivered; ignore_eos goes on past the end token."""
    async with running_engine("demo=scripted:?tokens=6") as client:
        short = await client.ask("hi", max_tokens=3)
        assert (short.reason, len(short.tokens)) == (generation.FINISH_REASON_LENGTH, 3)
        long = await client.ask("hi", max_tokens=20, ignore_eos=True)
        assert (long.reason, len(long.tokens)) == (generation.FINISH_REASON_LENGTH, 20)
        assert long.tokens[:7] == (await client.ask("hi")).tokens


async def test_max_tokens_is_clipped_to_the_context() -> None:
    """An answer ends by length where the context is full."""
    async with running_engine("demo=scripted:?tokens=500&context=64") as client:
        answer = await client.ask([65] * 60, max_tokens=100)
        assert (answer.reason, len(answer.tokens)) == (generation.FINISH_REASON_LENGTH, 4)


@pytest.mark.parametrize(
    ("text", "stop", "shown", "found"),
    [
        ("one two three", "two", "one ", "two"),
        ("one two", "two three", "one two", ""),
        ("one tw", "x", "one tw", ""),
    ],
)
async def test_stop_texts(text: str, stop: str, shown: str, found: str) -> None:
    """A stop text is trimmed and named; text held back for one that does not come is delivered."""
    async with running_engine(f"demo=scripted:?text={text}") as client:
        answer = await client.ask("hi", stop=[stop])
        assert (answer.text, answer.finished[0].stop_text) == (shown, found)
        assert answer.reason == generation.FINISH_REASON_STOP


async def test_held_text_is_delivered_when_the_answer_ends_by_length() -> None:
    """Peers lose it."""
    async with running_engine("demo=scripted:?text=abcdef") as client:
        answer = await client.ask("hi", stop=["cdefg"], max_tokens=4)
        assert answer.text == "abcd"


async def test_an_answer_that_nobody_reads_before_its_end_is_few_deltas() -> None:
    """With the same tokens, and a log probability for each."""
    async with running_engine("demo=scripted:?tokens=40&step_ms=5") as client:
        first, second = (client.request("hi", max_tokens=40) for _ in range(2))
        first.top_logprobs = second.top_logprobs = 1
        second.whole = True
        read, whole = await client.run(first), await client.run(second)
        assert whole.tokens == read.tokens
        assert whole.text == read.text
        assert whole.deltas <= 4 < read.deltas
        assert len(whole.logprobs) == len(whole.tokens)


async def test_a_resumed_answer_goes_on() -> None:
    """Prompt tokens with a part of the answer give the rest of it."""
    async with running_engine("demo=scripted:?tokens=40") as client:
        prompt = client.tokenize("<|im_start|>assistant\n")
        whole = await client.ask(prompt)
        rest = await client.ask(prompt + whole.tokens[:17])
        assert rest.tokens == whole.tokens[17:]


async def test_log_probabilities_come_with_each_token() -> None:
    """One per token, with as many alternatives as were asked for, best first."""
    async with running_engine("demo=scripted:?tokens=6") as client:
        request = client.request("hi")
        request.top_logprobs = 3
        answer = await client.run(request)
        assert [entry.token_id for entry in answer.logprobs] == answer.tokens
        assert all(len(entry.top) == 3 for entry in answer.logprobs)
        assert all(entry.top[0].token_id == entry.token_id for entry in answer.logprobs)
        assert b"".join(entry.token for entry in answer.logprobs).decode() == answer.text


async def test_bias_and_penalties_change_what_is_chosen() -> None:
    """A banned token is not chosen; what is penalized comes less often."""
    async with running_engine("demo=scripted:?text=aaaaaaaa") as client:
        ban = [generation.LogitBias(token_id=ord("a"), bias=-100)]
        banned = await client.ask("hi", logit_bias=ban, max_tokens=8)
        assert ord("a") not in banned.tokens


async def test_tool_calls_are_parsed_where_tools_are_given() -> None:
    """The template of this model shows no tools, so they are refused and not ignored."""
    async with running_engine(f"demo=scripted:?text={CALL}") as client:
        plain = await client.ask("hi")
        assert plain.text == CALL
        request = client.request("hi")
        request.chat.tools.add(name="add", parameters_json=json.dumps({"type": "object"}))
        error = await client.refusal(request)
        assert (error.reason, error.param) == ("UNSUPPORTED_FIELD", "tools")
        request.chat.tool_choice.mode = chat_pb2.ToolChoice.MODE_NONE
        assert (await client.run(request)).text == CALL


async def test_cancel_ends_the_stream_and_frees_the_sequence() -> None:
    """The stream finishes as cancelled with its partial usage; the cells are free again."""
    async with running_engine(SLOW) as client:
        free = (await client.status()).load.free_cells
        request = client.request("hi")
        running = asyncio.ensure_future(client.run(request))
        await client.until(lambda load: load.active_sequences == 1)
        found = await client.stub.Cancel(pb.CancelRequest(request_id=request.request_id))
        assert found.found
        answer = await running
        assert answer.reason == generation.FINISH_REASON_CANCELLED
        assert answer.finished[0].usage.completion_tokens == len(answer.tokens)
        assert (await client.until_idle()).free_cells == free
        again = await client.stub.Cancel(pb.CancelRequest(request_id=request.request_id))
        assert not again.found


async def test_a_request_that_waits_can_be_cancelled() -> None:
    """Also without a sequence: one Started, one Finished."""
    async with running_engine(SLOW, MAX_SEQUENCES="1") as client:
        first = asyncio.ensure_future(client.ask("hi"))
        await client.until(lambda load: load.active_sequences == 1)
        request = client.request("ho")
        second = asyncio.ensure_future(client.run(request))
        await client.until(lambda load: load.queued_requests == 1)
        phases = [row.phase for row in await client.inflight()]
        assert phases[-1] == pb.REQUEST_PHASE_QUEUED
        await client.stub.Cancel(pb.CancelRequest(request_id=request.request_id))
        assert (await second).reason == generation.FINISH_REASON_CANCELLED
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await client.until_idle()


async def test_a_client_that_leaves_frees_its_sequence() -> None:
    """The end of the call ends the request (I5), in every phase of many requests."""
    async with running_engine(SLOW, MAX_SEQUENCES="4") as client:
        calls = [asyncio.ensure_future(client.ask("x" * n)) for n in range(1, 40)]
        await client.until(lambda load: load.active_sequences == 4)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        load = await client.until_idle()
        assert load.free_cells == 4 * 8000
        assert await client.inflight() == []
        assert (await client.ask("hi", max_tokens=2)).reason == generation.FINISH_REASON_LENGTH


async def test_requests_in_flight_are_listed_oldest_first() -> None:
    """With phase, age and counts."""
    async with running_engine(SLOW) as client:
        calls = [asyncio.ensure_future(client.ask("a"))]
        await client.until(lambda load: load.active_sequences == 1)
        calls.append(asyncio.ensure_future(client.ask("b")))
        await client.until(lambda load: load.active_sequences == 2)
        rows = await client.inflight()
        assert [row.request_id for row in rows] == ["test-1", "test-2"]
        assert rows[0].prompt_tokens > 0
        assert rows[0].age.ToMicroseconds() >= rows[1].age.ToMicroseconds() > 0
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await client.until_idle()


async def test_a_failed_batch_fails_its_requests_and_the_engine_lives_on() -> None:
    """DECODE_FAILED with llama.cpp's code; the next request is served (W59)."""
    async with running_engine("demo=scripted:?tokens=20&fail_at=3") as client:
        error = await client.refusal(client.request("hi"))
        assert (error.reason, error.metadata) == ("DECODE_FAILED", {"code": "-3"})
        answer = await client.ask("hi")
        assert answer.reason == generation.FINISH_REASON_STOP
        await client.until_idle()


async def test_many_streams_at_once_get_what_each_would_get_alone() -> None:
    """Continuous batching does not mix requests up."""
    async with running_engine("demo=scripted:?tokens=30", MAX_SEQUENCES="8") as client:
        prompts = ["x" * (7 * n) for n in range(1, 40)]
        together = await asyncio.gather(*(client.ask(prompt) for prompt in prompts))
        alone = [await client.ask(prompt) for prompt in prompts[:5]]
        assert [answer.tokens for answer in together[:5]] == [answer.tokens for answer in alone]
        assert all(answer.reason == generation.FINISH_REASON_STOP for answer in together)
