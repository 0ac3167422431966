"""Answers one request in a provider's wire, as the script and the fault that hits it say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Final, Protocol

from services.dev.provider.answers import Answer, compose
from services.dev.provider.asked import Asked, AskedError, object_of
from services.dev.provider.connection import Headers
from services.dev.provider.dialect import Dialect, compact
from services.dev.provider.faults import Fault, Kind
from services.dev.provider.received import Received
from services.dev.provider.script import Script
from services.dev.provider.steps import Ending, Step, ending, steps

_JSON: Final = "application/json"
_EVENTS: Final = "text/event-stream; charset=utf-8"
_HTML: Final = b"<html><body><h1>Sign in to use this network</h1></body></html>"
_WAITS_LATER: Final = frozenset({Kind.DELAY_BODY, Kind.PAUSE})


class Sink(Protocol):
    """Where an answer goes."""

    async def start(self, status: int, headers: Headers) -> None:
        """Sends the head."""
        ...

    async def write(self, data: bytes) -> None:
        """Sends a part of the body, and waits while the client is slow."""
        ...

    async def end(self) -> None:
        """Ends the body."""
        ...

    def close(self) -> None:
        """Closes the connection, whatever is missing of the answer."""
        ...


async def send_json(sink: Sink, status: int, value: object, extra: Headers = ()) -> None:
    """Sends a whole answer of JSON."""
    await _send(sink, status, _JSON, compact(value), extra)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How a request is answered. Without `accepted_keys` every key will do, and none."""

    script: Script
    accepted_keys: Collection[str] = ()
    fault: Fault | None = None


async def answer(received: Received, sink: Sink, dialect: Dialect, behaviour: Behaviour) -> None:
    """Answers a request for an answer."""
    script, fault = behaviour.script, behaviour.fault
    if fault is not None:
        received.fault = fault.kind.value
        if await _is_over(sink, dialect, fault):
            return
    try:
        if behaviour.accepted_keys and received.key not in behaviour.accepted_keys:
            # With the key in it: there are providers that repeat it, and whoever passes errors on has to take it out.
            raise AskedError(401, f"Incorrect API key provided: {received.key}.")
        asked = _asked(received, dialect)
        composed = _held_back(compose(asked, script), fault)
    except AskedError as error:
        status, body = dialect.refusal(error.status, error.message, error.reason)
        await send_json(sink, status, body)
        return
    if asked.stream:
        frames = dialect.frames(asked, composed, received.number)
        await _stream(received, sink, steps(frames, script, fault, _error_event(dialect, fault)))
        await _finish(sink, ending(fault))
        return
    await asyncio.sleep(script.delay_s + script.pace_s * composed.completion_tokens)
    if ending(fault) is Ending.END:
        await send_json(sink, 200, dialect.plain(asked, composed, received.number))
    else:
        await _finish(sink, ending(fault))


async def _is_over(sink: Sink, dialect: Dialect, fault: Fault) -> bool:
    """Does what a fault does before the answer; tells whether that was all."""
    if fault.kind not in _WAITS_LATER:
        await asyncio.sleep(fault.seconds)
    if fault.kind is Kind.STATUS:
        extra = [("retry-after", fault.retry_after)] if fault.retry_after else []
        status, body = dialect.refusal(fault.status, _message(fault), fault.reason)
        await send_json(sink, status, body, extra)
    elif fault.kind is Kind.CONTENT_TYPE:
        await _send(sink, 200, "text/html", _HTML)
    elif fault.kind is Kind.EMPTY:
        await _send(sink, 200, _EVENTS, b"")
    elif ending(fault) is not Ending.END and fault.after is None:
        await _finish(sink, ending(fault))
    else:
        return False
    return True


async def _stream(received: Received, sink: Sink, planned: Iterable[Step]) -> None:
    await sink.start(200, [("content-type", _EVENTS)])
    loop = asyncio.get_running_loop()
    # Counted from the start, so that a busy machine does not slow the pace.
    due = loop.time()
    for step in planned:
        if step.wait_s:
            due += step.wait_s
            await asyncio.sleep(max(0.0, due - loop.time()))
        await sink.write(step.data)
        received.pieces += step.pieces


async def _finish(sink: Sink, how: Ending) -> None:
    if how is Ending.END:
        await sink.end()
    elif how is Ending.CUT:
        sink.close()
    else:
        # The task is cancelled when the client leaves, and when the server ends.
        await asyncio.Event().wait()


async def _send(
    sink: Sink, status: int, content_type: str, body: bytes, extra: Headers = ()
) -> None:
    await sink.start(
        status, [("content-type", content_type), ("content-length", str(len(body))), *extra]
    )
    await sink.write(body)
    await sink.end()


def _held_back(composed: Answer, fault: Fault | None) -> Answer:
    if fault is None or fault.kind is not Kind.FILTERED:
        return composed
    return replace(composed, pieces=composed.pieces[: fault.after or 0], finish="content_filter")


def _error_event(dialect: Dialect, fault: Fault | None) -> bytes:
    if fault is None or fault.kind is not Kind.ERROR_EVENT:
        return b""
    _, body = dialect.refusal(fault.status, _message(fault), fault.reason)
    return dialect.error_event(body)


def _message(fault: Fault) -> str:
    if fault.reason == "context_length":
        return "prompt is too long: 210000 tokens > 200000 maximum"
    return f"scripted {fault.reason or 'failure'}"


def _asked(received: Received, dialect: Dialect) -> Asked:
    try:
        decoded = json.loads(received.body)
    except ValueError:
        raise AskedError(400, "the body is not JSON") from None
    try:
        return dialect.asked(received, object_of(decoded, "the body"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # What is read is checked where it is worth a message of its own; the rest is told like this.
        raise AskedError(400, f"the body is not as the API wants it: {error!r}") from error
