"""The scripted provider over real HTTP: every wire, every fault, and what it saw."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import openai
import pytest

from services.dev.provider.faults import Fault, Kind
from services.dev.provider.script import Script
from services.dev.provider.server import ScriptedProvider
from tests.support.provider import KEY, WIRES, data_of, post, send

WIRE = pytest.mark.parametrize("wire", WIRES)


@pytest.fixture
async def provider() -> AsyncIterator[ScriptedProvider]:
    async with ScriptedProvider(Script(text="one two three", cached_tokens=1)) as running:
        yield running


@pytest.fixture
async def client(provider: ScriptedProvider) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=provider.base_url, api_key=KEY, max_retries=0
    ) as running:
        yield running


def said(wire: str, answer: httpx.Response) -> str:
    """The text of a streamed answer."""
    events = data_of(answer)
    if wire == "openai":
        choices = [choice for event in events for choice in event["choices"]]
        return "".join(choice["delta"].get("content") or "" for choice in choices)
    if wire == "anthropic":
        deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
        return "".join(delta["text"] for delta in deltas)
    return "".join(e["candidates"][0]["content"]["parts"][0]["text"] for e in events)


@WIRE
async def test_a_stream_has_the_whole_text(provider: ScriptedProvider, wire: str) -> None:
    answer = await send(provider, post(wire))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert said(wire, answer) == "one two three"
    request = provider.requests[0]
    assert (request.key, request.status, request.pieces) == (KEY, 200, 3)
    assert not request.closed_by_client.is_set()


@WIRE
async def test_a_plain_answer_has_the_same_text(provider: ScriptedProvider, wire: str) -> None:
    answer = await send(provider, post(wire, stream=False))
    found = answer.json()
    if wire == "openai":
        assert found["choices"][0]["message"]["content"] == "one two three"
    elif wire == "anthropic":
        assert found["content"] == [{"type": "text", "text": "one two three"}]
        assert found["usage"]["input_tokens"] == 2
    else:
        assert found["candidates"][0]["content"]["parts"] == [{"text": "one two three"}]


async def test_usage_is_told_the_way_of_each_wire(provider: ScriptedProvider) -> None:
    """OpenAI: at the end. Anthropic: in two parts, without the cached tokens. Gemini: the sum so far, with each chunk."""
    events = data_of(await send(provider, post("openai")))
    assert [e["usage"]["completion_tokens"] for e in events if "usage" in e] == [3]
    events = data_of(await send(provider, post("anthropic")))
    assert events[0]["message"]["usage"]["input_tokens"] == 2
    assert events[0]["message"]["usage"]["cache_read_input_tokens"] == 1
    assert [e["usage"]["output_tokens"] for e in events if e["type"] == "message_delta"] == [3]
    events = data_of(await send(provider, post("gemini")))
    assert [e["usageMetadata"]["candidatesTokenCount"] for e in events] == [1, 2, 3, 3]


async def test_the_official_client_streams(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="any", messages=[{"role": "user", "content": "hi"}], stream=True, max_tokens=2
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "one two"
    assert chunks[-1].choices[0].finish_reason == "length"
    models = await client.models.list()
    assert [model.id for model in models.data] == ["scripted"]


async def test_the_official_client_calls_a_tool(client: openai.AsyncOpenAI) -> None:
    schema: dict[str, object] = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
    }
    stream = await client.chat.completions.create(
        model="any",
        messages=[{"role": "user", "content": "hi"}],
        tools=[{"type": "function", "function": {"name": "count", "parameters": schema}}],
        tool_choice={"type": "function", "function": {"name": "count"}},
        stream=True,
    )
    choices = [chunk.choices[0] async for chunk in stream]
    calls = [call for choice in choices for call in choice.delta.tool_calls or []]
    assert calls[0].function is not None
    assert calls[0].function.name == "count"
    arguments = "".join(call.function.arguments or "" for call in calls if call.function)
    assert json.loads(arguments) == {"n": 1}
    assert choices[-1].finish_reason == "tool_calls"


async def test_the_official_client_gets_json_and_log_probabilities(
    client: openai.AsyncOpenAI,
) -> None:
    schema: dict[str, object] = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
    }
    answer = await client.chat.completions.create(
        model="any",
        messages=[{"role": "user", "content": "hi"}],
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        logprobs=True,
        top_logprobs=2,
    )
    choice = answer.choices[0]
    assert json.loads(choice.message.content or "") == {"a": True}
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [len(token.top_logprobs) for token in choice.logprobs.content] == [2, 2]


async def test_the_official_client_raises_what_it_should(
    provider: ScriptedProvider, client: openai.AsyncOpenAI
) -> None:
    async def ask() -> None:
        await client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": "hi"}]
        )

    provider.faults.add(Fault(Kind.STATUS, status=429, retry_after="7"))
    with pytest.raises(openai.RateLimitError) as limited:
        await ask()
    assert limited.value.response.headers["retry-after"] == "7"
    provider.faults.add(Fault(Kind.STATUS, reason="context_length"))
    with pytest.raises(openai.BadRequestError) as long:
        await ask()
    assert long.value.code == "context_length_exceeded"
    provider.accepted_keys = {"another"}
    with pytest.raises(openai.AuthenticationError, match=KEY):
        await ask()


@WIRE
async def test_keys_can_be_rotated(provider: ScriptedProvider, wire: str) -> None:
    provider.accepted_keys = {"new"}
    refused = await send(provider, post(wire))
    # Gemini calls a wrong key a bad argument.
    assert refused.status_code == (400 if wire == "gemini" else 401)
    assert "error" in refused.json()
    assert (await send(provider, post(wire, key="new"))).status_code == 200


@WIRE
@pytest.mark.parametrize("status", [400, 403, 404, 429, 500, 503])
async def test_every_status_has_a_body(provider: ScriptedProvider, wire: str, status: int) -> None:
    provider.faults.add(Fault(Kind.STATUS, status=status))
    answer = await send(provider, post(wire))
    assert answer.status_code == status
    assert answer.json()["error"]["message"] == "scripted failure"
    assert provider.requests[0].fault == "status"


@WIRE
@pytest.mark.parametrize("after", [None, 0, 2])
async def test_a_cut_leaves_the_answer_without_an_end(
    provider: ScriptedProvider, wire: str, after: int | None
) -> None:
    provider.faults.add(Fault(Kind.CUT, after=after))
    with pytest.raises(httpx.RemoteProtocolError):
        await send(provider, post(wire))
    request = provider.requests[0]
    assert (request.pieces, request.status) == (after or 0, None if after is None else 200)
    assert not request.closed_by_client.is_set()


@pytest.mark.parametrize("after", [None, 0, 2])
async def test_a_client_that_leaves_is_seen(provider: ScriptedProvider, after: int | None) -> None:
    provider.faults.add(Fault(Kind.HANG, after=after))
    asking = asyncio.create_task(send(provider, post("openai")))
    await provider.wait_for_requests(1)
    asking.cancel()
    request = provider.requests[0]
    await asyncio.wait_for(request.done.wait(), 5)
    assert request.closed_by_client.is_set()
    assert request.ended is not None


async def test_pace_and_delays_are_kept(provider: ScriptedProvider) -> None:
    provider.script = Script(tokens=6, pace_s=0.02, delay_s=0.05)
    await send(provider, post("openai"))
    provider.faults.add(Fault(Kind.DELAY, seconds=0.1))
    provider.script = Script(tokens=6)
    await send(provider, post("openai"))
    took = [(r.ended or 0.0) - r.started for r in provider.requests]
    assert took[0] >= 0.15
    assert took[1] >= 0.1


@WIRE
async def test_an_error_event_ends_a_stream(provider: ScriptedProvider, wire: str) -> None:
    provider.faults.add(Fault(Kind.ERROR_EVENT, after=1, reason="overloaded"))
    events = data_of(await send(provider, post(wire)))
    assert "error" in events[-1]


@WIRE
async def test_a_filter_ends_an_answer(provider: ScriptedProvider, wire: str) -> None:
    provider.faults.add(Fault(Kind.FILTERED, after=1))
    answer = await send(provider, post(wire))
    assert said(wire, answer) == "one"
    assert {"openai": "content_filter", "anthropic": "refusal", "gemini": "SAFETY"}[
        wire
    ] in answer.text


async def test_pages_and_empty_bodies(provider: ScriptedProvider) -> None:
    provider.faults.add(Fault(Kind.CONTENT_TYPE))
    provider.faults.add(Fault(Kind.EMPTY))
    page = await send(provider, post("openai"))
    assert page.headers["content-type"] == "text/html"
    empty = await send(provider, post("openai"))
    assert (empty.status_code, empty.content) == (200, b"")


async def test_connections_are_kept(provider: ScriptedProvider) -> None:
    async with httpx.AsyncClient(base_url=provider.base_url) as client:
        for wire in WIRES:
            asked = post(wire)
            answer = await client.post(asked.path, headers=asked.headers, json=asked.body)
            assert answer.status_code == 200
    assert [request.connection for request in provider.requests] == [1, 1, 1]


BAD_BODIES: list[bytes] = [
    b"",
    b"[1]",
    b'{"model": "m"}',
    b'{"model": "m", "messages": []}',
    b'{"messages": 3}',
    b'{"model": "m", "messages": [{"role": "user", "content": [{"type": "text"}]}]}',
    b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "stop": 5}',
    b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 0}',
    b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}',
    b'{"model": "m", "messages": [{"content": "x"}], "tools": [{"type": "function", "function": 3}]}',
]
BAD_SCHEMA = {"type": "array", "minItems": "many"}


async def test_a_bad_schema_is_refused(provider: ScriptedProvider) -> None:
    wanted = {"type": "json_schema", "json_schema": {"schema": BAD_SCHEMA}}
    assert (await send(provider, post("openai", response_format=wanted))).status_code == 400


@pytest.mark.parametrize("body", BAD_BODIES)
async def test_bad_requests_are_refused(provider: ScriptedProvider, body: bytes) -> None:
    async with httpx.AsyncClient(base_url=provider.base_url) as client:
        answer = await client.post("/chat/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_what_is_no_http_is_dropped(provider: ScriptedProvider) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", provider.port)
    writer.write(b"\x00\x01 nonsense\r\n\r\n")
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    assert (await send(provider, post("openai"))).status_code == 200


async def test_it_is_controlled_by_hand(provider: ScriptedProvider) -> None:
    async with httpx.AsyncClient(base_url=f"{provider.origin}/_control") as control:
        added = await control.post("/faults", json={"kind": "status", "status": 503, "times": 2})
        assert [fault["kind"] for fault in added.json()["faults"]] == ["status"]
        assert (await send(provider, post("openai"))).status_code == 503
        assert (await control.delete("/faults")).json() == {"faults": []}
        assert (await send(provider, post("openai"))).status_code == 200
        await control.post("/script", json={"echo": True})
        assert said("openai", await send(provider, post("openai", "like this"))) == "like this"
        await control.post("/keys", json={"accepted": ["x"]})
        assert (await send(provider, post("openai"))).status_code == 401
        listed = (await control.get("/requests")).json()["requests"]
        assert [request["status"] for request in listed] == [503, 200, 200, 401]
        assert KEY not in json.dumps(listed)
        assert (await control.post("/faults", json={"kind": "melt"})).status_code == 400
        assert (await control.post("/faults", content=b"{")).status_code == 400
        assert (await control.get("/nothing")).status_code == 404


async def test_it_ends_while_a_request_hangs() -> None:
    async with ScriptedProvider() as provider:
        provider.faults.add(Fault(Kind.HANG))
        asking = asyncio.create_task(send(provider, post("openai")))
        await provider.wait_for_requests(1)
    with pytest.raises(httpx.HTTPError):
        await asking
    assert provider.requests[0].ended is not None
