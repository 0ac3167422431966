"""Talks to an engine and to the public gRPC API the way the gateway and a gRPC client do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.engine.v1 import engine_service_pb2, engine_service_pb2_grpc
from caravan.inference.v1 import inference_service_pb2, inference_service_pb2_grpc

from bench.sse_client import Answer
from services.runtime.generate_events import each


def chat(prompt: str) -> chat_pb2.ChatPrompt:
    """One user message."""
    message = chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content=prompt)
    return chat_pb2.ChatPrompt(messages=[message])


def stop_after(tokens: int) -> generation_pb2.StopConditions:
    """Exactly so many tokens."""
    return generation_pb2.StopConditions(max_tokens=tokens, ignore_eos=True)


GREEDY = generation_pb2.Sampling(temperature=0)


@dataclass(slots=True)
class TokenAnswer(Answer):
    """An answer with its tokens, and with what was reused of the prompt."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    cache_hit: int = 0

    @property
    def kind(self) -> str:
        """Where the reused part came from: cold, partial, exact or resident."""
        name = generation_pb2.CacheHit.Name(self.cache_hit)  # type: ignore[arg-type]
        return name.removeprefix("CACHE_HIT_").lower()


async def _read(events: AsyncIterable[Any]) -> TokenAnswer:
    """Reads a stream, sent just now, to its end. The two contracts name the fields that are read here alike."""
    answer = TokenAnswer(sent=time.perf_counter())
    async for event in events:
        kind = event.WhichOneof("event")
        if kind == "delta":
            if event.delta.text or event.delta.token_ids:
                answer.times.append(time.perf_counter())
            answer.token_ids += event.delta.token_ids
            answer.text += event.delta.text
        elif kind == "finished":
            answer.completion_tokens = event.finished.usage.completion_tokens
            answer.prompt_tokens = event.finished.usage.prompt_tokens
            answer.cached_tokens = event.finished.usage.cached_tokens
            answer.cache_hit = event.finished.cache_hit
    return answer


@dataclass(frozen=True, slots=True)
class EngineState:
    """The engine's requests by id, and the sequences that run."""

    requests: dict[str, engine_service_pb2.InflightRequest]
    active_sequences: int


class EngineClient:
    """Calls one engine directly: what everything above it is compared with."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = engine_service_pb2_grpc.EngineServiceStub(channel)

    async def generate(self, request_id: str, prompt: str, tokens: int) -> TokenAnswer:
        """Answers a message with exactly `tokens` tokens."""
        request = engine_service_pb2.GenerateRequest(
            request_id=request_id, chat=chat(prompt), stop=stop_after(tokens)
        )
        return await _read(each(self._stub.Generate(request)))

    async def complete(self, request_id: str, prompt: Sequence[int], tokens: int) -> TokenAnswer:
        """Continues tokens, greedily, with exactly `tokens` more."""
        request = engine_service_pb2.GenerateRequest(
            request_id=request_id,
            tokens=engine_service_pb2.TokenPrompt(ids=prompt),
            sampling=GREEDY,
            stop=stop_after(tokens),
        )
        return await _read(each(self._stub.Generate(request)))

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

    async def chat(self, model: str, prompt: str, tokens: int) -> TokenAnswer:
        """Answers a message with exactly `tokens` tokens."""
        request = inference_service_pb2.ChatRequest(
            model=model, prompt=chat(prompt), stop=stop_after(tokens)
        )
        return await _read(self._stub.Chat(request))

    async def converse(
        self, model: str, messages: Sequence[chat_pb2.ChatMessage], tokens: int
    ) -> TokenAnswer:
        """Answers a conversation, greedily, with exactly `tokens` tokens."""
        request = inference_service_pb2.ChatRequest(
            model=model,
            prompt=chat_pb2.ChatPrompt(messages=messages),
            sampling=GREEDY,
            stop=stop_after(tokens),
        )
        return await _read(self._stub.Chat(request))

    async def complete(self, model: str, prompt: Sequence[int], tokens: int) -> TokenAnswer:
        """Continues tokens, greedily, with exactly `tokens` more."""
        request = inference_service_pb2.CompleteRequest(
            model=model,
            tokens=inference_service_pb2.TokenList(ids=prompt),
            sampling=GREEDY,
            stop=stop_after(tokens),
        )
        return await _read(self._stub.Complete(request))
