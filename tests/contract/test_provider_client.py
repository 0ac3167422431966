"""The HTTP client against the scripted provider: real connections, each way to fail, in each wire."""

from __future__ import annotations

import asyncio
import logging

import pytest
from caravan.core.v1 import generation_pb2
from caravan.engine.v1 import engine_service_pb2 as pb

from services.dev.provider.faults import Fault, Kind
from services.dev.provider.script import Script
from services.dev.provider.server import ScriptedProvider
from services.engine.remote.failure import Failure, ProviderError
from services.engine.remote.phases import Timeouts
from services.engine.remote.provider import Provider
from services.engine.remote.sse import EVENT_BYTES_MAX
from tests.support.ports import free_port
from tests.support.provider_caller import KEY, caller

PROVIDERS = [Provider.OPENAI, Provider.ANTHROPIC, Provider.GEMINI]
STOP = generation_pb2.FINISH_REASON_STOP
every_wire = pytest.mark.parametrize("kind", PROVIDERS, ids=lambda kind: kind.value)


@every_wire
async def test_an_answer_and_its_usage(kind: Provider) -> None:
    """Text, reason and counts come as they were sent, and the credential where the provider looks for it."""
    script = Script(text="one two three", cached_tokens=1)
    async with ScriptedProvider(script, accepted_keys=[KEY]) as provider:
        async with caller(provider.base_url, kind) as it:
            outcome = await it.call()
        assert it.text == "one two three"
        assert outcome.reason == STOP
        assert outcome.usage is not None
        assert outcome.usage.completion_tokens > 0
        assert outcome.usage.cached_tokens == 1
        assert outcome.usage.prompt_tokens >= 1
        received = provider.requests[0]
        assert received.key == KEY
        assert KEY not in received.path + str(received.query)


@every_wire
async def test_a_connection_is_used_again(kind: Provider) -> None:
    """The end of an answer is read, so that the next call needs no connection of its own, nor one after a refusal."""
    async with (
        ScriptedProvider(Script(tokens=3)) as provider,
        caller(provider.base_url, kind) as it,
    ):
        await it.call()
        provider.faults.add(Fault(Kind.STATUS, status=500))
        await it.failure()
        await it.call()
        assert {request.connection for request in provider.requests} == {1}


async def test_what_comes_together_is_handed_over_together() -> None:
    """An answer that is sent at once is few reads."""
    async with ScriptedProvider(Script(tokens=200)) as provider, caller(provider.base_url) as it:
        await it.call(stop=generation_pb2.StopConditions(max_tokens=200))
        assert len(it.text.split()) == 200
        assert it.batches < 50


@every_wire
@pytest.mark.parametrize(
    ("status", "failure"),
    [
        (401, Failure.UNAUTHORIZED),
        (403, Failure.FORBIDDEN),
        (404, Failure.NOT_FOUND),
        (408, Failure.SERVER_ERROR),
        (413, Failure.REJECTED),
        (429, Failure.RATE_LIMITED),
        (503, Failure.SERVER_ERROR),
    ],
)
async def test_statuses(kind: Provider, status: int, failure: Failure) -> None:
    """Each status is the failure that it means, with the time after which to come back."""
    async with ScriptedProvider() as provider, caller(provider.base_url, kind) as it:
        provider.faults.add(Fault(Kind.STATUS, status=status, retry_after="7"))
        error = await it.failure()
        assert error.failure is failure
        assert error.retry_after_s == 7


@every_wire
async def test_reasons_of_a_refusal(kind: Provider) -> None:
    """What the body says counts more than the status."""
    async with ScriptedProvider() as provider, caller(provider.base_url, kind) as it:
        provider.faults.add(Fault(Kind.STATUS, status=400, reason="context_length"))
        assert (await it.failure()).failure is Failure.CONTEXT_LENGTH_EXCEEDED


@every_wire
async def test_an_answer_that_is_filtered(kind: Provider) -> None:
    """The rest of the answer is held back; what came stays."""
    async with ScriptedProvider() as provider, caller(provider.base_url, kind) as it:
        provider.faults.add(Fault(Kind.FILTERED, after=2))
        outcome = await it.call()
        assert outcome.reason == generation_pb2.FINISH_REASON_CONTENT_FILTER
        assert it.text


@every_wire
async def test_an_error_within_the_stream(kind: Provider) -> None:
    """It began with 200 all the same."""
    async with ScriptedProvider() as provider, caller(provider.base_url, kind) as it:
        provider.faults.add(Fault(Kind.ERROR_EVENT, after=2, status=503, reason="overloaded"))
        assert (await it.failure()).failure is Failure.SERVER_ERROR
        assert it.text


@every_wire
@pytest.mark.parametrize("after", [None, 0, 2])
async def test_a_cut(kind: Provider, after: int | None) -> None:
    """Before the status line, before the first byte of the body, and behind it."""
    async with ScriptedProvider() as provider, caller(provider.base_url, kind) as it:
        provider.faults.add(Fault(Kind.CUT, after=after))
        assert (await it.failure()).failure is Failure.NETWORK
        await it.call()  # The next one is none the worse for it.


@every_wire
async def test_an_end_without_an_ending(kind: Provider) -> None:
    """Without finish reason an answer is cut off; with it, only the marker is missing. Gemini's marker is the reason."""
    async with (
        ScriptedProvider(Script(tokens=6)) as provider,
        caller(provider.base_url, kind) as it,
    ):
        provider.faults.add(Fault(Kind.UNTERMINATED, after=2))
        assert (await it.failure()).failure is Failure.NETWORK
        provider.faults.add(Fault(Kind.UNTERMINATED))
        if kind is Provider.GEMINI:
            assert (await it.failure()).failure is Failure.NETWORK
        else:
            assert (await it.call()).reason == STOP
        provider.faults.add(Fault(Kind.EMPTY))
        assert (await it.failure()).failure is Failure.NETWORK


@every_wire
@pytest.mark.parametrize(
    "fault",
    [
        Fault(Kind.GARBAGE, after=2),
        Fault(Kind.OVERSIZED, after=2, size=EVENT_BYTES_MAX + 1),
        Fault(Kind.CONTENT_TYPE),
    ],
    ids=["garbage", "oversized", "page"],
)
async def test_what_is_no_answer(kind: Provider, fault: Fault) -> None:
    """It is the provider's failure, and is not quoted."""
    async with ScriptedProvider() as provider, caller(provider.base_url, kind) as it:
        provider.faults.add(fault)
        error = await it.failure()
        assert error.failure is Failure.SERVER_ERROR
        assert "<" not in error.message


@pytest.mark.parametrize(
    ("fault", "phase"),
    [
        (Fault(Kind.HANG), "first_byte"),
        (Fault(Kind.DELAY_BODY, seconds=60), "first_byte"),
        (Fault(Kind.HANG, after=2), "between_bytes"),
        (Fault(Kind.PAUSE, after=2, seconds=60), "between_bytes"),
    ],
    ids=["no-headers", "no-body", "hang", "pause"],
)
async def test_time_outs(fault: Fault, phase: str) -> None:
    """Each phase has its own limit, and the provider sees that nobody listens any more."""
    timeouts = Timeouts(first_byte_s=0.2, between_bytes_s=0.25)
    async with ScriptedProvider() as provider, caller(provider.base_url, timeouts=timeouts) as it:
        provider.faults.add(fault)
        error = await it.failure()
        assert error.failure is Failure.TIMEOUT
        assert error.metadata["waited_for"] == phase
        limit_ms = 200 if phase == "first_byte" else 250
        assert limit_ms <= int(error.metadata["elapsed_ms"]) < limit_ms + 2000
        await asyncio.wait_for(provider.requests[0].closed_by_client.wait(), 10)


async def test_a_long_answer_is_not_a_stuck_one() -> None:
    """There is no limit for the whole: an answer may take longer than any of the phases (W28)."""
    timeouts = Timeouts(first_byte_s=0.3, between_bytes_s=0.3)
    script = Script(tokens=8, pace_s=0.08)
    async with (
        ScriptedProvider(script) as provider,
        caller(provider.base_url, timeouts=timeouts) as it,
    ):
        loop = asyncio.get_running_loop()
        began = loop.time()
        await it.call()
        assert loop.time() - began > 0.5


async def test_nobody_listens() -> None:
    """A refused connection is a failure of the network."""
    async with caller(f"http://127.0.0.1:{free_port()}/v1") as it:
        assert (await it.failure()).failure is Failure.NETWORK


async def test_a_connection_that_is_never_made() -> None:
    """A server that accepts, and never shakes hands, is not reached in time."""
    held = []

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        async with caller(f"https://127.0.0.1:{port}/v1", timeouts=Timeouts(connect_s=0.1)) as it:
            error = await it.failure()
        assert error.failure is Failure.TIMEOUT
        assert error.metadata["waited_for"] == "connect"
    finally:
        for writer in held:
            writer.close()
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize("fault", [Fault(Kind.HANG), Fault(Kind.HANG, after=2)])
async def test_a_cancelled_call_closes_the_stream(fault: Fault) -> None:
    """The provider sees the close at once, and may stop computing (I5)."""
    async with ScriptedProvider() as provider, caller(provider.base_url) as it:
        provider.faults.add(fault)
        task = asyncio.ensure_future(it.call())
        await provider.wait_for_requests(1)
        if fault.after:
            await it.heard.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(provider.requests[0].closed_by_client.wait(), 10)
        await it.call()


async def test_no_error_holds_the_credential(caplog: pytest.LogCaptureFixture) -> None:
    """Not one that no header can carry, whatever libraries say of it; nor do they log headers."""
    caplog.set_level(logging.DEBUG)
    secret = "sk-line\nbreak-0123456789"
    async with ScriptedProvider() as provider, caller(provider.base_url) as it:
        request = it.wire.request(pb.GenerateRequest(text="x"), "m")
        with pytest.raises(ProviderError) as caught:
            async with it.client.stream(request, it.wire.credential_headers(secret)):
                pass
        assert caught.value.failure is Failure.UNAUTHORIZED
        assert "0123456789" not in repr(caught.value) + str(
            caught.getrepr(chain=True, style="short")
        )
        await it.call()
        assert len(provider.requests) == 1
    assert KEY not in caplog.text
