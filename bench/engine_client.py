"""Talks to an engine and to the public gRPC API the way the gateway and a gRPC client do."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import grpc.aio
from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.engine.v1 import engine_service_pb2, engine_service_pb2_grpc
from caravan.inference.v1 import inference_service_pb2, inference_service_pb2_grpc

from bench.sse_client import Answer


def chat(prompt: str) -> chat_pb2.ChatPrompt:
    """One user message."""
    message = chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content=prompt)
    return chat_pb2.ChatPrompt(messages=[message])


def stop_after(tokens: int) -> generation_pb2.StopConditions:
    """Exactly so many tokens."""
    return generation_pb2.StopConditions(max_tokens=tokens, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class EngineState:
    """The engine's requests by id, and the sequences that run."""

    requests: dict[str, engine_service_pb2.InflightRequest]
    active_sequences: int


class EngineClient:
    """Calls one engine directly: what everything above it is compared with."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = engine_service_pb2_grpc.EngineServiceStub(channel)

    async def generate(self, request_id: str, prompt: str, tokens: int) -> Answer:
        """Generates and reads to the end."""
        request = engine_service_pb2.GenerateRequest(
            request_id=request_id, chat=chat(prompt), stop=stop_after(tokens)
        )
        answer = Answer(sent=time.perf_counter())
        async for event in self._stub.Generate(request):
            now = time.perf_counter()
            if event.HasField("delta") and event.delta.text:
                answer.times.append(now)
            elif event.HasField("finished"):
                answer.completion_tokens = event.finished.usage.completion_tokens
        return answer

    async def state(self) -> EngineState:
        """What the engine has at this moment: two questions, asked at once."""
        listed, status = await asyncio.gather(
            self._stub.ListInflight(engine_service_pb2.ListInflightRequest()),
            self._stub.GetStatus(engine_service_pb2.GetStatusRequest()),
        )
        requests = {request.request_id: request for request in listed.requests}
        return EngineState(requests, status.load.active_sequences)


class PublicClient:
    """The typed public API, through Envoy."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = inference_service_pb2_grpc.InferenceServiceStub(channel)

    async def chat(self, model: str, prompt: str, tokens: int) -> Answer:
        """Chats and reads to the end."""
        request = inference_service_pb2.ChatRequest(
            model=model, prompt=chat(prompt), stop=stop_after(tokens)
        )
        answer = Answer(sent=time.perf_counter())
        async for event in self._stub.Chat(request):
            now = time.perf_counter()
            if event.HasField("delta") and event.delta.text:
                answer.times.append(now)
            elif event.HasField("finished"):
                answer.completion_tokens = event.finished.usage.completion_tokens
        return answer
