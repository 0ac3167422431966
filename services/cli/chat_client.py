"""The OpenAI REST API as `caravan chat` needs it: the models, and one streamed answer."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final

import httpx

_TIMEOUT: Final = httpx.Timeout(10.0, read=600.0)
Message = Mapping[str, str]


class ChatError(Exception):
    """The server refused or could not be reached; the message is for the user."""


class ChatClient:
    """One connection to a server. Close it, or use it as a context manager."""

    def __init__(self, url: str, transport: httpx.BaseTransport | None = None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(timeout=_TIMEOUT, transport=transport)

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """Names of the models. Raises ChatError."""
        try:
            response = self._http.get(f"{self._url}/v1/models")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ChatError(self._unreachable(error)) from error
        if response.status_code != 200:
            raise ChatError(error_text(response.status_code, response.content))
        try:
            return [str(model["id"]) for model in response.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ChatError(f"{self._url} does not speak the OpenAI API") from error

    def answer(
        self, model: str, messages: Sequence[Message], temperature: float | None = None
    ) -> Generator[str, None, None]:
        """Pieces of the answer as they come; closing the iterator cancels the request. Raises ChatError."""
        body = {"model": model, "messages": list(messages), "stream": True}
        if temperature is not None:
            body["temperature"] = temperature
        try:
            with self._http.stream(
                "POST", f"{self._url}/v1/chat/completions", json=body
            ) as response:
                if response.status_code != 200:
                    raise ChatError(error_text(response.status_code, response.read()))
                yield from pieces(response.iter_lines())
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ChatError(self._unreachable(error)) from error

    def _unreachable(self, error: Exception) -> str:
        if isinstance(error, httpx.ConnectError):
            return f"nothing answers at {self._url}; is `caravan up` running?"
        return f"the connection to {self._url} broke: {error or type(error).__name__}"


def pieces(lines: Iterator[str]) -> Iterator[str]:
    """Text of a stream of server-sent events, up to `[DONE]`. Raises ChatError for an error event or a cut stream."""
    for line in lines:
        if not line.startswith("data:"):
            continue  # comments keep the connection alive; blank lines end an event
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = _event(data)
        if "error" in event:
            raise ChatError(_message(event) or "the answer broke off")
        for choice in event.get("choices", ()):
            delta = choice.get("delta", {})
            # A model that refuses says so in a field of its own.
            text = delta.get("content") or delta.get("refusal")
            if text:
                yield text
    raise ChatError("the answer broke off")


def error_text(status: int, body: bytes) -> str:
    """What an error reply says, for people."""
    try:
        message = _message(json.loads(body))
    except ValueError:
        message = None
    return message or f"the server answered {status}"


def _event(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError as error:
        raise ChatError("the server sent an event that is no JSON") from error
    if not isinstance(event, dict):
        raise ChatError("the server sent an event that is no JSON object")
    return event


def _message(document: object) -> str | None:
    error = document.get("error") if isinstance(document, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) else None
