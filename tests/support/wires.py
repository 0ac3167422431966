"""Wires of providers for tests: requests with little in them, their bodies, and answers read from recorded events."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.engine.v1 import engine_service_pb2 as pb

from services.engine.remote.provider import Provider
from services.engine.remote.wire import AnswerReader, Piece, Wire
from services.engine.remote.wires import wire_for
from services.runtime.clock import CountingIds, ManualClock

MAX_TOKENS = 777
SECRET = "sk-secret-0123456789"


def wire_of(provider: Provider) -> Wire:
    """A wire whose redactor knows SECRET, at 1000 s after the epoch."""
    return wire_for(
        provider,
        redact=lambda text: text.replace(SECRET, "[redacted]"),
        clock=ManualClock(),
        ids=CountingIds(),
        default_max_tokens=MAX_TOKENS,
    )


def user(text: str = "Hello", **more: Any) -> chat_pb2.ChatMessage:
    """A message of the user."""
    return chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content=text, **more)


def system(text: str) -> chat_pb2.ChatMessage:
    """Instructions."""
    return chat_pb2.ChatMessage(role=chat_pb2.ROLE_SYSTEM, content=text)


def assistant(text: str = "", *calls: chat_pb2.ToolCall) -> chat_pb2.ChatMessage:
    """What the model said, and which tools it called."""
    return chat_pb2.ChatMessage(role=chat_pb2.ROLE_ASSISTANT, content=text, tool_calls=calls)


def call(call_id: str, name: str, arguments: str) -> chat_pb2.ToolCall:
    """A call that the model made."""
    return chat_pb2.ToolCall(id=call_id, name=name, arguments_json=arguments)


def result(call_id: str, text: str) -> chat_pb2.ChatMessage:
    """What a tool returned."""
    return chat_pb2.ChatMessage(role=chat_pb2.ROLE_TOOL, content=text, tool_call_id=call_id)


def chat(
    *messages: chat_pb2.ChatMessage, tools: Iterable[str] = (), choice: Any = None, **more: Any
) -> pb.GenerateRequest:
    """Asks for an answer to messages; `tools` are names, each with one parameter."""
    schema = '{"type": "object", "properties": {"b": {}, "a": {}}}'
    return pb.GenerateRequest(
        request_id="r",
        chat=chat_pb2.ChatPrompt(
            messages=messages or [user()],
            tools=[
                chat_pb2.Tool(name=name, description=f"Does {name}.", parameters_json=schema)
                for name in tools
            ],
            tool_choice=choice,
        ),
        **more,
    )


def sampling(**values: Any) -> generation_pb2.Sampling:
    """How to choose tokens."""
    return generation_pb2.Sampling(**values)


def body_of(provider: Provider, generate: pb.GenerateRequest, model: str = "m") -> dict[str, Any]:
    """The JSON that the provider gets."""
    body = json.loads(wire_of(provider).request(generate, model).body)
    assert isinstance(body, dict)
    return body


def read_all(reader: AnswerReader, events: Iterable[Any]) -> Piece:
    """Reads events, dictionaries as JSON, until the reader is satisfied; all pieces as one."""
    whole = Piece()
    for event in events:
        data = event if isinstance(event, str) else json.dumps(event)
        piece = reader.read("", data)
        if piece is not None:
            whole.text += piece.text
            whole.refusal += piece.refusal
            whole.calls += piece.calls
            whole.logprobs += piece.logprobs
        if reader.is_complete:
            break
    return whole
