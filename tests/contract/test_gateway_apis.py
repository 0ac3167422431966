"""The two public APIs of the gateway over real gRPC."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as coordinator_pb
from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.inference.v1 import inference_service_pb2 as pb
from caravan.openai.v1 import openai_service_pb2 as openai_pb
from google.api.httpbody_pb2 import HttpBody
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.runtime.errors import CaravanError, from_rpc_error
from services.runtime.generate_events import together
from services.runtime.telemetry import OtelTracing
from tests.support.coordinator import until
from tests.support.gateway import error_of, openai_error, running
from tests.support.gateway_peers import Step, delta, finished, hang, started

PROMPT = chat_pb2.ChatPrompt(messages=[chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content="hi")])


def _model(name: str, ready: int) -> coordinator_pb.Model:
    context_tokens = 512 if ready else 0
    model = coordinator_pb.Model(name=name, context_tokens=context_tokens, ready_engines=ready)
    model.created.seconds = 1_700_000_000
    return model


async def test_a_stream_is_events_and_a_plain_answer_is_json() -> None:
    """The content type stands in the first message; the id of the request is a response header."""
    async with running() as rig:
        call = rig.chat(stream=True)
        parts = [part.body async for part in call]
        assert parts[0].content_type == "text/event-stream; charset=utf-8"
        assert b"".join(p.data for p in parts).endswith(b"data: [DONE]\n\n")
        assert len(parts) <= 3, "at most one message per delta, and one for the end"
        request_id = dict(await call.initial_metadata())["x-request-id"]
        assert rig.engine.requests[0].request_id == request_id
        assert f'"id":"chatcmpl-{request_id.removeprefix("req-")}"'.encode() in parts[0].data
        plain = [part.body async for part in rig.chat()]
        assert [p.content_type for p in plain] == ["application/json"]
        assert json.loads(plain[0].data)["choices"][0]["message"]["content"] == "Hello you"


async def test_events_that_come_together_go_out_together() -> None:
    """A whole answer in one message of the engine is one message to the client, and each event of it counts."""
    answer = together([started(), delta("Hello"), delta(" you"), finished()])
    async with running(answer) as rig:
        parts = [part.body async for part in rig.chat(stream=True)]
        assert len(parts) == 1
        assert parts[0].data.count(b'"content":"') == 3, "the role, and two deltas"
        assert parts[0].data.endswith(b"data: [DONE]\n\n")
        call = rig.inference.Chat(pb.ChatRequest(model="demo", prompt=PROMPT))
        kinds = [event.WhichOneof("event") async for event in call]
        assert kinds == ["started", "delta", "delta", "finished"]
        await rig.idle()
        assert rig.count("finished") == 2


async def test_text_that_comes_with_a_cancel_is_not_lost() -> None:
    """What a stream's client would have been shown a moment before the end is shown before the error."""
    end = finished(generation_pb2.FINISH_REASON_CANCELLED)
    go_on = asyncio.Event()

    async def pause() -> None:
        await go_on.wait()

    script = (started(), delta("Hello"), pause, together([delta(" you"), end]))
    async with running(*script) as rig:
        call = rig.chat(stream=True)
        first = await call.read()
        go_on.set()
        last = await call.read()
        assert b"Hello" in first.body.data
        assert b" you" in last.body.data
        assert b'"code":"request_cancelled"' in last.body.data


async def test_completions() -> None:
    """The older endpoint has its own form, and its own series."""
    body = HttpBody(data=b'{"model": "demo", "prompt": "hi"}')
    async with running() as rig:
        call = rig.openai.CreateCompletion(openai_pb.CreateCompletionRequest(body=body))
        parts = [json.loads(part.body.data) async for part in call]
        assert parts[0]["object"] == "text_completion"
        assert parts[0]["choices"][0]["text"] == "Hello you"
        await rig.idle()
        assert rig.count("finished", api="completion") == 1


async def test_a_bad_body_reaches_nobody() -> None:
    """A mistake is answered at once with OpenAI's error, the id of the request, and is counted."""
    async with running() as rig:
        error = await error_of(rig.chat(b'{"model": "demo", "messages": [], "temprature": 1}'))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert openai_error(error)["param"] == "temprature"
        assert dict(error.trailing_metadata() or ())["x-request-id"].startswith("req-")
        assert rig.coordinator.routes == []
        assert rig.count("refused") == 1


async def test_models() -> None:
    """Models are listed and shown one by one, with our own fields under a name of their own."""
    async with running() as rig:
        rig.coordinator.models = [_model("a/b", 0), _model("demo", 2)]
        listed = json.loads((await rig.openai.ListModels(openai_pb.ListModelsRequest())).body.data)
        assert listed["object"] == "list"
        assert [model["id"] for model in listed["data"]] == ["a/b", "demo"]
        shown = [model["caravan"]["context_tokens"] for model in listed["data"]]
        assert shown == [None, 512], "of a provider's model nobody may know"
        one = await rig.openai.GetModel(openai_pb.GetModelRequest(model="demo"))
        assert json.loads(one.body.data) == {
            "id": "demo",
            "object": "model",
            "created": 1_700_000_000,
            "owned_by": "caravan",
            "caravan": {"context_tokens": 512, "ready_engines": 2},
        }
        error = await error_of(rig.openai.GetModel(openai_pb.GetModelRequest(model="gpt-9")))
        assert openai_error(error)["code"] == "model_not_found"
        typed = await rig.inference.ListModels(pb.ListModelsRequest())
        assert [(m.name, m.ready) for m in typed.models] == [("a/b", False), ("demo", True)]


async def test_silence_is_filled_with_comments() -> None:
    """While no event comes, a stream gets a comment at every interval, and is not disturbed by it."""
    go_on = asyncio.Event()

    async def wait() -> None:
        await go_on.wait()

    script: tuple[Step, ...] = (started(), wait, delta("a"), finished())
    async with running(*script, keepalive_s=0.1) as rig:
        call = rig.chat(stream=True)
        first, second = (await call.read()).body, (await call.read()).body
        assert (first.data, second.data) == (b": keepalive\n\n", b": keepalive\n\n")
        assert first.content_type == "text/event-stream; charset=utf-8"
        go_on.set()
        rest = b""
        while (part := await call.read()) is not grpc.aio.EOF:
            rest += part.body.data
        assert b'"content":"a"' in rest
        assert rest.endswith(b"data: [DONE]\n\n")


async def test_an_error_within_the_first_interval_is_a_status() -> None:
    """No byte is sent before the first tokens or the first comment, so that errors keep their HTTP status."""
    async with running(started(), CaravanError("DECODE_FAILED", "Broken.")) as rig:
        call = rig.chat(stream=True)
        error = await error_of(call)
        assert error.code() is grpc.StatusCode.INTERNAL
        assert not await call.initial_metadata(), "headers would have fixed the HTTP status"


async def test_typed_chat() -> None:
    """gRPC clients get Started with the id for CancelRequest, Deltas and Finished as messages."""
    logprobs = [generation_pb2.TokenLogprob(token_id=7, token=b"a", logprob=-1)]
    script = (started(), delta("a", token_ids=[7], logprobs=logprobs), finished())
    async with running(*script) as rig:
        request = pb.ChatRequest(model="demo", prompt=PROMPT, top_logprobs=0)
        call = rig.inference.Chat(request)
        events = [event async for event in call]
        assert [event.WhichOneof("event") for event in events] == ["started", "delta", "finished"]
        assert events[0].started == pb.Started(
            request_id=str(dict(await call.initial_metadata())["x-request-id"]),
            prompt_tokens=3,
            cached_tokens=1,
            engine_id="engine-1",
        )
        assert events[1].delta == pb.Delta(text="a", token_ids=[7], logprobs=logprobs)
        assert events[2].finished.usage.completion_tokens == 2
        assert rig.engine.requests[0].HasField("top_logprobs")


async def test_typed_complete_and_cancel() -> None:
    """A text is continued; CancelRequest goes to the coordinator, and what is not in flight is an error."""
    script = (started(), hang)
    async with running(*script) as rig:
        call = rig.inference.Complete(pb.CompleteRequest(model="demo", text="Once"))
        first: Any = await call.read()
        await rig.inference.CancelRequest(
            pb.CancelRequestRequest(request_id=first.started.request_id)
        )
        assert rig.coordinator.cancels == [first.started.request_id]
        unknown = rig.inference.CancelRequest(pb.CancelRequestRequest(request_id="req-0"))
        assert (await error_of(unknown)).code() is grpc.StatusCode.NOT_FOUND
        call.cancel()
        await rig.idle()


async def test_a_cancelled_request_finishes_for_typed_clients() -> None:
    """The contract says so: the stream ends with FINISH_REASON_CANCELLED and status OK."""
    script = (started(), finished(generation_pb2.FINISH_REASON_CANCELLED))
    async with running(*script) as rig:
        call = rig.inference.Chat(pb.ChatRequest(model="demo", prompt=PROMPT))
        events = [event async for event in call]
        assert events[-1].finished.reason == generation_pb2.FINISH_REASON_CANCELLED
        await rig.idle()
        assert rig.coordinator.outcomes == ["CANCELLED"]


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (pb.ChatRequest(prompt=PROMPT), "model"),
        (pb.ChatRequest(model="demo"), "prompt.messages"),
        (
            pb.ChatRequest(
                model="demo",
                prompt=PROMPT,
                sampling=generation_pb2.Sampling(temperature=float("nan")),
            ),
            "sampling.temperature",
        ),
        (
            pb.ChatRequest(
                model="demo", prompt=PROMPT, stop=generation_pb2.StopConditions(max_tokens=0)
            ),
            "stop.max_tokens",
        ),
        (pb.ChatRequest(model="demo", prompt=PROMPT, top_logprobs=21), "top_logprobs"),
    ],
)
async def test_typed_mistakes(request_: pb.ChatRequest, param: str) -> None:
    """The typed API has the same rules, with paths of its own."""
    async with running() as rig:
        error = await error_of(rig.inference.Chat(request_))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert from_rpc_error(error, service="gateway").param == param


async def test_more_requests_than_the_gateway_holds() -> None:
    """Beyond its bound the gateway refuses with a retry time, and takes requests again when others end (I4)."""
    async with running(hang, max_requests=1) as rig:
        call = rig.chat()
        await until(lambda: rig.engine.running == 1)
        error = await error_of(rig.chat())
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert from_rpc_error(error, service="gateway").metadata["capacity"] == "1"
        call.cancel()
        await rig.idle()
        rig.engine.script = (started(), delta("a"), finished())
        assert b'"content":"a"' in await rig.chat_bytes()


async def test_one_trace_from_the_client_to_the_engine() -> None:
    """The span is a child of the client's, and the engine's call carries it on; the client's own id is an attribute."""
    exporter = InMemorySpanExporter()
    tracing = OtelTracing("gateway", SimpleSpanProcessor(exporter))
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    async with running(tracing=tracing) as rig:
        request: Any = openai_pb.CreateChatCompletionRequest(
            body=HttpBody(data=b'{"model":"demo","messages":[{"role":"user","content":"x"}]}')
        )
        metadata = (
            ("traceparent", f"00-{trace_id}-b7ad6b7169203331-01"),
            ("x-request-id", "theirs"),
        )
        async for _ in rig.openai.CreateChatCompletion(request, metadata=metadata):
            pass
        await rig.idle()
        assert trace_id in rig.engine.metadata[0]["traceparent"]
    (span,) = exporter.get_finished_spans()
    assert span.name == "chat"
    assert f"{span.context.trace_id:032x}" == trace_id
    attributes = dict(span.attributes or {})
    assert attributes["gen_ai.request.model"] == "demo"
    assert attributes["gen_ai.usage.input_tokens"] == 3
    assert attributes["caravan.client_request_id"] == "theirs"
    tracing.shutdown()
