"""A whole Caravan for end-to-end tests: `caravan up` with real processes, on ports of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
from caravan.cache.v1 import cache_service_pb2 as cache_pb
from caravan.cache.v1 import cache_service_pb2_grpc as cache_grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as coordinator_pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as coordinator_grpc
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from caravan.engine.v1 import engine_service_pb2_grpc as engine_grpc

from tests.support.ports import free_port
from tests.support.waiting import wait_for

READY = "Caravan is ready."
CHAT = "/v1/chat/completions"
DEMO = Path(__file__).resolve().parents[2] / "models" / "caravan-demo.gguf"


def command(*arguments: str) -> list[str]:
    """The `caravan` command, as this Python runs it."""
    return [sys.executable, "-m", "services.cli", *arguments]


@dataclass
class Stack:
    """A running `caravan up`."""

    port: int
    state_dir: Path
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Base URL, without /v1."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def ready(self) -> bool:
        """Whether it said so."""
        return READY in self.lines

    def processes(self) -> dict[str, dict[str, Any]]:
        """endpoints.json by name; empty while there is none."""
        path = self.state_dir / "endpoints.json"
        try:
            listed = json.loads(path.read_text())["processes"]
        except FileNotFoundError:
            return {}
        return {process["name"]: process for process in listed}

    def pids(self) -> dict[str, int]:
        """Ids of the running processes by name."""
        return {name: process["pid"] for name, process in self.processes().items()}

    def metrics(self, name: str) -> str:
        """What a process tells Prometheus."""
        response = httpx.get(self.processes()[name]["metrics"], timeout=10)
        assert response.status_code == 200
        return response.text

    @contextlib.contextmanager
    def channel(self, name: str) -> Iterator[grpc.Channel]:
        """A channel to a process, past Envoy."""
        with grpc.insecure_channel(self.processes()[name]["address"]) as channel:
            yield channel

    def leases(self) -> list[str]:
        """Ids of the requests that the coordinator knows."""
        with self.channel("coordinator") as channel:
            stub = coordinator_grpc.CoordinatorServiceStub(channel)
            answer = stub.ListInflight(coordinator_pb.ListInflightRequest(), timeout=5)
            return [request.request_id for request in answer.requests]

    def engine_names(self) -> list[str]:
        """Names of the running engines."""
        return sorted(name for name in self.processes() if name.startswith("engine-"))

    def engine_status(self, name: str) -> engine_pb.GetStatusResponse:
        """What an engine says of itself."""
        with self.channel(name) as channel:
            stub = engine_grpc.EngineServiceStub(channel)
            return stub.GetStatus(engine_pb.GetStatusRequest(), timeout=5)

    def inflight(self, name: str) -> list[engine_pb.InflightRequest]:
        """The requests that an engine holds."""
        with self.channel(name) as channel:
            stub = engine_grpc.EngineServiceStub(channel)
            return list(stub.ListInflight(engine_pb.ListInflightRequest(), timeout=5).requests)

    def held(self) -> dict[str, int]:
        """Everything that requests hold and that is not zero: leases, requests and sequences of engines."""
        counts = {"leases": len(self.leases())}
        for name in self.engine_names():
            load = self.engine_status(name).load
            counts[f"{name} in flight"] = len(self.inflight(name))
            counts[f"{name} sequences"] = load.active_sequences
            counts[f"{name} queued"] = load.queued_requests
        return {what: count for what, count in counts.items() if count}

    def wait_until_free(self, timeout_s: float = 5.0) -> None:
        """Returns once no request holds anything."""
        wait_for(lambda: not self.held(), "nothing is held", timeout_s)

    def saved_keys(self) -> set[str]:
        """Keys of the KV blocks that can be read from disk."""
        with self.channel("cache") as channel:
            rows = cache_grpc.CacheServiceStub(channel).Dump(cache_pb.DumpRequest(), timeout=5)
            return {
                row.block.key.hex()
                for row in rows
                for copy in row.copies
                if (copy.tier, copy.state) == (cache_pb.TIER_DISK, cache_pb.COPY_STATE_AVAILABLE)
            }

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)


def read_lines(stack: Stack) -> None:
    """Collects what `caravan up` prints, until it ends."""
    assert stack.process.stdout is not None
    for line in stack.process.stdout:
        stack.lines.append(line.rstrip("\n"))


@contextlib.contextmanager
def running(
    state_dir: Path,
    models: Mapping[str, str],
    *options: str,
    environment: Mapping[str, str] | None = None,
    wait_s: float = 100.0,
) -> Iterator[Stack]:
    """`caravan up` until it is ready; ends it, and whatever is left of it, at the end."""
    port = free_port()
    arguments = ["up", "--port", str(port), "--state-dir", str(state_dir), *options]
    for name, source in models.items():
        arguments += ["--model", f"{name}={source}"]
    process = subprocess.Popen(
        command(*arguments),
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A test that is interrupted by Ctrl-C must still end the stack in order.
        start_new_session=True,
    )
    stack = Stack(port, state_dir, process)
    reader = threading.Thread(target=read_lines, args=(stack,), daemon=True)
    reader.start()
    try:
        wait_for(lambda: stack.ready or process.poll() is not None, "caravan up is ready", wait_s)
        assert stack.ready, "\n".join(stack.lines)
        yield stack
    finally:
        _end(stack)
        reader.join(10)
        assert process.stdout is not None
        process.stdout.close()


def _end(stack: Stack) -> None:
    if stack.process.poll() is None:
        stack.interrupt()
        try:
            stack.process.wait(40)
        except subprocess.TimeoutExpired:
            stack.process.kill()  # its lifeline ends the rest
            stack.process.wait()


def alive(pids: Sequence[int]) -> list[int]:
    """Which of the processes still run."""
    return [pid for pid in pids if psutil.pid_exists(pid)]


def chat_body(model: str, text: str = "Hello", **more: Any) -> dict[str, Any]:
    """A chat request."""
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


def endless(model: str, **more: Any) -> dict[str, Any]:
    """A chat request whose answer takes long on a slow model."""
    return chat_body(model, max_tokens=2000, ignore_eos=True, **more)
