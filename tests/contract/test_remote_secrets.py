"""A credential appears nowhere: not in logs, spans, metrics, errors, status, or the text of any object (S1.25, S3.16)."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from caravan.engine.v1 import remote_service_pb2 as remote_pb
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import generate_latest

from services.dev.provider.faults import Fault, Kind
from services.dev.provider.script import Script
from services.engine.remote.redaction import REDACTED, redact_logs
from services.runtime.telemetry import OtelTracing
from tests.support.remote import Rig, running_remote

CANARY = "sk-canary/+=Zq7%3F-0123456789"
ROTATED = "sk-rotated/+=Wm4%3F-9876543210"


def forms(secret: str) -> Iterator[str]:
    """The secret, and what may become of it on its way."""
    yield from (secret, quote(secret, safe=""), json.dumps(secret)[1:-1])
    for text in (secret, f"Bearer {secret}"):
        # The beginning decides all characters but the last.
        yield base64.b64encode(text.encode()).decode().rstrip("=")[:-1]


def assert_clean(what: str, text: str) -> None:
    """Neither secret stands in the text, in any form."""
    for secret in (CANARY, ROTATED):
        for form in forms(secret):
            assert form not in text, what


@asynccontextmanager
async def gossip() -> AsyncIterator[str]:
    """The base URL of a provider that refuses every request and quotes its headers, plainly and otherwise."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = [line.partition(": ") for line in head.split("\r\n")]
        told = {name.lower(): value for name, _, value in lines}
        key = told["authorization"].removeprefix("Bearer ")
        quoted = [key, quote(key, safe=""), base64.b64encode(key.encode()).decode(), head]
        message = " | ".join(quoted)
        error = {"message": message, "type": key, "code": key, "param": f"x-{key}"}
        body = json.dumps({"error": error}).encode()
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n")
        writer.write(f"x-request-id: of-{key}\r\n".encode())
        writer.write(b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


async def provoke(rig: Rig) -> list[str]:
    """Lets happen what can happen; returns the texts of all errors."""
    rig.provider.accepted_keys = {CANARY}
    faults = [
        Fault(Kind.STATUS, status=401, times=2),
        Fault(Kind.STATUS, status=403),
        Fault(Kind.STATUS, status=400),
        Fault(Kind.ERROR_EVENT, after=0, status=500, times=4),
        Fault(Kind.CUT, after=1),
        Fault(Kind.GARBAGE, after=1),
    ]
    said = []
    await rig.run()
    for fault in faults:
        rig.provider.faults.add(fault)
        error = await rig.refusal()
        said.append(f"{error!r} {error.message} {error.metadata}")
        rig.provider.faults.clear()
    await rig.remote.RotateCredential(remote_pb.RotateCredentialRequest(secret=ROTATED))
    said.append(str(await rig.refusal()))
    rig.provider.accepted_keys = {ROTATED}
    await rig.run()
    return said


def texts_of(rig: Rig) -> Iterator[tuple[str, str]]:
    """The texts of objects that somebody might print."""
    process, endpoint = rig.process, rig.engine.endpoint
    for thing in (
        *(process, process.settings, process.redactor, rig.engine, endpoint),
        *(endpoint.credentials, endpoint.credentials.snapshot, endpoint.wire, endpoint.client),
        *(process.options, process.options.source),
    ):
        yield type(thing).__name__, repr(thing)
        yield type(thing).__name__, str(thing)


@pytest.mark.parametrize(
    "credential", [{"env": "PROVIDER_KEY"}, {"inline": CANARY}], ids=["env", "inline"]
)
async def test_a_canary_is_found_nowhere(
    credential: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Requests, failures, rotation: with all logs on, the secret is in none of them, nor anywhere else."""
    spans = InMemorySpanExporter()
    tracing = OtelTracing("engine", SimpleSpanProcessor(spans))
    root = logging.getLogger()
    handler = logging.StreamHandler(sys.stderr)
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        async with running_remote(
            Script(tokens=3),
            environ={"PROVIDER_KEY": CANARY},
            tracing=tracing,
            credential=credential,
        ) as rig:
            redact_logs(rig.process.redactor, root)
            said = await provoke(rig)
            status = await rig.remote.GetRemoteStatus(remote_pb.GetRemoteStatusRequest())
            assert status.credential.generation >= 2
            metrics = generate_latest(rig.process.metrics.registry).decode()
            texts = list(texts_of(rig))
        tracing.shutdown()
        for name, text in texts:
            assert_clean(name, text)
        assert_clean("errors", "\n".join(said))
        assert_clean("status", str(status))
        assert_clean("metrics", metrics)
        finished = spans.get_finished_spans()
        assert any(span.name == "attempt" for span in finished)
        for span in finished:
            assert_clean("spans", span.to_json())
        logged = capfd.readouterr().err
        assert "httpcore" in logged or "credential" in logged
        assert_clean("logs", logged)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


async def test_a_provider_that_quotes_the_key_is_not_quoted() -> None:
    """What a provider says goes to the caller, and into traces, without the credential, in whatever form it stands there."""
    spans = InMemorySpanExporter()
    tracing = OtelTracing("engine", SimpleSpanProcessor(spans))
    environ = {"PROVIDER_KEY": CANARY}
    async with (
        gossip() as base_url,
        running_remote(environ=environ, tracing=tracing, baseUrl=base_url) as rig,
    ):
        error = await rig.refusal()
        assert error.reason == "PROVIDER_REJECTED"
        assert_clean("error", f"{error.message} {error.metadata}")
    tracing.shutdown()
    attempt = next(span for span in spans.get_finished_spans() if span.name == "attempt")
    assert dict(attempt.attributes or {})["caravan.provider_request_id"] == f"of-{REDACTED}"
    assert_clean("span", attempt.to_json())


@pytest.mark.parametrize(
    "options",
    [
        '{"credential": {"inline": "' + CANARY + '"}, "nonsense": 1}',
        '{"credential": {"inline": "' + CANARY + '"}, "workers": 100000}',
        '{"credential": {"inline": "' + CANARY,
        '{"credential": "' + CANARY + '"}',
        '{"credential": {"env": "' + CANARY + '"}}',
        '{"baseUrl": "https://user:' + CANARY + '@example.com/v1"}',
    ],
    ids=["unknown", "range", "no_json", "wrong_type", "as_name", "in_url"],
)
def test_wrong_options_are_not_repeated(options: str) -> None:
    """The process ends with code 2 and says what is wrong, not what was told."""
    environ = {**os.environ, "CARAVAN_REMOTE_OPTIONS": options}
    ended = subprocess.run(
        [sys.executable, "-m", "services.engine.remote"],
        env=environ,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 2
    assert "CARAVAN_REMOTE_OPTIONS" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert_clean("stderr", ended.stderr + ended.stdout)
