"""Clients that write down all that they are told, so that a disturbed answer can be compared with an undisturbed one.

Each checks the form of its stream by itself: one start, one end, nothing after it, and as many tokens as the usage says. So a
token that comes twice or not at all fails here even where the text looks right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import httpx
from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.inference.v1 import inference_service_pb2 as pb
from caravan.inference.v1 import inference_service_pb2_grpc as stubs

from tests.support.stack import CHAT

TIMEOUT_S: Final = 90.0
Seen = Callable[[int], None]
"""Is told the number of events with tokens that a client has had so far."""
_FINISH: Final = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
    generation_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


class RefusedError(Exception):
    """The answer ended with an error, as a client sees it. `status` is 0 where the error came inside the stream."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code


@dataclass(frozen=True)
class Said:
    """A whole answer. `tools` are names and arguments of tool calls; `token_ids` are told by the typed API only."""

    text: str
    tools: tuple[tuple[str, str], ...]
    finish: str
    prompt_tokens: int
    completion_tokens: int
    token_ids: tuple[int, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Question:
    """What is asked. `body` is a chat request of the OpenAI API without `model` and `stream`."""

    body: dict[str, Any]

    def rest(self, model: str, **more: Any) -> dict[str, Any]:
        """As a body of the OpenAI API."""
        return {"model": model, **self.body, **more}

    def typed(self, model: str) -> pb.ChatRequest:
        """As a request of the typed API."""
        body = self.body
        request = pb.ChatRequest(
            model=model,
            prompt=chat_pb2.ChatPrompt(
                messages=[_message(message) for message in body["messages"]],
                tools=[_tool(tool["function"]) for tool in body.get("tools", ())],
            ),
            stop=generation_pb2.StopConditions(
                max_tokens=body["max_tokens"], ignore_eos=body.get("ignore_eos", False)
            ),
        )
        request.sampling.temperature = body["temperature"]
        if "seed" in body:
            request.sampling.seed = body["seed"]
        return request


def _message(message: dict[str, str]) -> chat_pb2.ChatMessage:
    role = chat_pb2.Role.Value(f"ROLE_{message['role'].upper()}")
    return chat_pb2.ChatMessage(role=role, content=message["content"])


def _tool(function: dict[str, Any]) -> chat_pb2.Tool:
    return chat_pb2.Tool(
        name=function["name"],
        description=function.get("description", ""),
        parameters_json=json.dumps(function.get("parameters", {})),
    )


@dataclass
class _Collected:
    """The pieces of one choice."""

    text: str = ""
    tools: list[list[str]] = field(default_factory=list)
    finish: list[str] = field(default_factory=list)
    usage: list[dict[str, Any]] = field(default_factory=list)
    events: int = 0

    def take(self, chunk: dict[str, Any]) -> None:
        if chunk.get("usage"):
            self.usage.append(chunk["usage"])
        for choice in chunk["choices"]:
            assert not self.finish, f"after the end came {chunk}"
            delta = choice["delta"]
            self.text += delta.get("content") or ""
            for call in delta.get("tool_calls", ()):
                self.take_call(call)
            if delta.get("content") or delta.get("tool_calls"):
                self.events += 1
            if choice["finish_reason"]:
                self.finish.append(choice["finish_reason"])

    def take_call(self, call: dict[str, Any]) -> None:
        if "id" in call:
            assert call["index"] == len(self.tools), f"a tool call begins twice: {call}"
            self.tools.append([call["function"]["name"], ""])
        self.tools[call["index"]][1] += call["function"].get("arguments", "")

    def said(self) -> Said:
        assert len(self.finish) == 1, f"{len(self.finish)} ends"
        assert len(self.usage) == 1, f"{len(self.usage)} usages"
        tools = tuple((name, arguments) for name, arguments in self.tools)
        return _said(self.text, tools, self.finish[0], self.usage[0])


def _said(
    text: str, tools: tuple[tuple[str, str], ...], finish: str, usage: dict[str, Any]
) -> Said:
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    return Said(text, tools, finish, usage["prompt_tokens"], usage["completion_tokens"])


def streamed(url: str, model: str, question: Question, seen: Seen) -> Said:
    """Asks the OpenAI API for a stream. Raises RefusedError, and httpx.TransportError where the connection breaks."""
    body = question.rest(model, stream=True, stream_options={"include_usage": True})
    with (
        httpx.Client(base_url=url, timeout=TIMEOUT_S) as client,
        client.stream("POST", CHAT, json=body) as response,
    ):
        if response.status_code != 200:
            response.read()
            raise _refused(response)
        return _read_events(response.iter_lines(), seen)


def _read_events(lines: Iterable[str], seen: Seen) -> Said:
    collected = _Collected()
    done = False
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        assert not done, f"after [DONE] came {data}"
        if data == "[DONE]":
            done = True
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            raise RefusedError(0, chunk["error"]["code"], chunk["error"]["message"])
        before = collected.events
        collected.take(chunk)
        if collected.events > before:
            seen(collected.events)
    assert done, "the stream ended without [DONE]"
    return collected.said()


def plain(url: str, model: str, question: Question) -> Said:
    """Asks the OpenAI API for a whole answer. Raises RefusedError, and httpx.TransportError where the connection breaks."""
    response = httpx.post(url + CHAT, json=question.rest(model), timeout=TIMEOUT_S)
    if response.status_code != 200:
        raise _refused(response)
    answer = response.json()
    (choice,) = answer["choices"]
    message = choice["message"]
    calls = message.get("tool_calls") or ()
    tools = tuple((call["function"]["name"], call["function"]["arguments"]) for call in calls)
    return _said(message["content"] or "", tools, choice["finish_reason"], answer["usage"])


def _refused(response: httpx.Response) -> RefusedError:
    try:
        error = response.json()["error"]
        return RefusedError(response.status_code, error["code"], error["message"])
    except (ValueError, KeyError, TypeError):
        return RefusedError(response.status_code, "", response.text)


def typed(channel: grpc.Channel, model: str, question: Question, seen: Seen) -> Said:
    """Asks the typed API. Raises grpc.RpcError."""
    text, ids, kinds, events = "", list[int](), list[str](), 0
    tools: list[list[str]] = []
    finished = pb.Finished()
    started = pb.Started()
    # A channel that was refused answers for a while that it is refused; who waits for it learns when the way is there again.
    call = stubs.InferenceServiceStub(channel).Chat(
        question.typed(model), timeout=TIMEOUT_S, wait_for_ready=True
    )
    for event in call:
        kind = event.WhichOneof("event")
        assert kind is not None
        kinds.append(kind)
        if kind == "started":
            started = event.started
        elif kind == "finished":
            finished = event.finished
        else:
            events += 1
            text += event.delta.text
            ids.extend(event.delta.token_ids)
            for piece in event.delta.tool_calls:
                if piece.id:
                    assert piece.index == len(tools), f"a tool call begins twice: {piece}"
                    tools.append([piece.name, ""])
                tools[piece.index][1] += piece.arguments_json
            seen(events)
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert set(kinds[1:-1]) <= {"delta"}, kinds
    usage = finished.usage
    assert usage.prompt_tokens == started.prompt_tokens
    assert len(ids) == usage.completion_tokens, (len(ids), usage.completion_tokens)
    calls = tuple((name, arguments) for name, arguments in tools)
    finish = _FINISH[finished.reason]
    return Said(text, calls, finish, usage.prompt_tokens, usage.completion_tokens, tuple(ids))
