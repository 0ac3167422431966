"""Asks the OpenAI API the way an application does: httpx with kept connections, the same for everyone who is compared."""

from __future__ import annotations

import json
import time
from types import TracebackType
from typing import Self

import httpx

from bench.sse_client import Answer, HttpError, read_event

TIMEOUT_S = 60.0


class HttpClient:
    """A client of one server. `base_url` is the root of its API, such as http://127.0.0.1:8080/v1."""

    def __init__(self, base_url: str, model: str, key: str = "none") -> None:
        self._model = model
        self._client = httpx.AsyncClient(
            base_url=base_url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=TIMEOUT_S,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    def _body(self, prompt: str, tokens: int, *, stream: bool) -> dict[str, object]:
        body: dict[str, object] = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
        }
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body

    async def stream(self, prompt: str, tokens: int) -> Answer:
        """A streamed answer. Raises HttpError, and RuntimeError on an error event."""
        body = self._body(prompt, tokens, stream=True)
        answer = Answer(sent=time.perf_counter())
        async with self._client.stream("POST", "/chat/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread())[:500]
                raise HttpError(f"{response.status_code}: {text!r}")
            async for line in response.aiter_lines():
                if line.startswith("data:") and "[DONE]" not in line:
                    read_event(answer, json.loads(line[5:]), time.perf_counter())
        return answer

    async def plain(self, prompt: str, tokens: int) -> Answer:
        """An answer in one piece; its only time is when it was there. Raises HttpError."""
        body = self._body(prompt, tokens, stream=False)
        answer = Answer(sent=time.perf_counter())
        response = await self._client.post("/chat/completions", json=body)
        if response.status_code != 200:
            raise HttpError(f"{response.status_code}: {response.content[:500]!r}")
        decoded = response.json()
        answer.times.append(time.perf_counter())
        answer.finish = decoded["choices"][0]["finish_reason"]
        answer.completion_tokens = decoded["usage"]["completion_tokens"]
        return answer
