"""The scripted provider for tests: requests in each wire, and a provider for tests that have no event loop."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from services.dev.provider.script import Script
from services.dev.provider.server import ScriptedProvider

KEY = "sk-scripted-0123456789"
WIRES = ("openai", "anthropic", "gemini")


@dataclass(frozen=True)
class Post:
    """A request in some wire."""

    path: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]


def post(
    wire: str, text: str = "hello there", *, stream: bool = True, key: str = KEY, **more: Any
) -> Post:
    """Asks a model for an answer to one message; `more` goes into the body."""
    if wire == "openai":
        body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": text}]}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return Post("/chat/completions", {"authorization": f"Bearer {key}"}, body | more)
    if wire == "anthropic":
        headers = {"x-api-key": key, "anthropic-version": "2023-06-01"}
        body = {"model": "m", "max_tokens": 100, "stream": stream}
        body |= {"messages": [{"role": "user", "content": text}]}
        return Post("/messages", headers, body | more)
    method = "streamGenerateContent?alt=sse" if stream else "generateContent"
    body = {"contents": [{"role": "user", "parts": [{"text": text}]}]}
    return Post(f"/models/m:{method}", {"x-goog-api-key": key}, body | more)


async def send(provider: ScriptedProvider, asked: Post, timeout_s: float = 10.0) -> httpx.Response:
    """Sends a request on a connection of its own and reads its answer to the end."""
    async with httpx.AsyncClient(base_url=provider.base_url, timeout=timeout_s) as client:
        return await client.post(asked.path, headers=asked.headers, json=asked.body)


def data_of(answer: httpx.Response) -> list[Any]:
    """The decoded data of each event, but for OpenAI's [DONE]."""
    lines = [line for line in answer.text.split("\n") if line.startswith("data: ")]
    return [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]


@contextmanager
def provider_in_thread(script: Script | None = None, port: int = 0) -> Iterator[ScriptedProvider]:
    """A provider on an event loop of its own. `script` and `faults` may be changed from the test's thread; its events not be waited for."""
    started = threading.Event()
    loop = asyncio.new_event_loop()
    provider = ScriptedProvider(script, port=port)
    stop = asyncio.Event()

    async def serve() -> None:
        async with provider:
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    try:
        assert started.wait(10), "the provider does not start"
        yield provider
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
