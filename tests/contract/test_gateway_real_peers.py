"""The gateway with the real coordinator and a real engine, as processes; the engine's backend is scripted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as coordinator_pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as coordinator_grpc
from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from caravan.engine.v1 import engine_service_pb2_grpc as engine_grpc
from caravan.inference.v1 import inference_service_pb2 as inference_pb
from caravan.inference.v1 import inference_service_pb2_grpc as inference_grpc
from caravan.openai.v1 import openai_service_pb2 as openai_pb
from caravan.openai.v1 import openai_service_pb2_grpc as openai_grpc
from google.api.httpbody_pb2 import HttpBody

from tests.support.gateway import chat
from tests.support.ports import free_port
from tests.support.waiting import wait_for

# Three processes start, and a busy machine takes its time.
pytestmark = pytest.mark.timeout(240)

MODEL = "demo=scripted:?step_ms=5&tokens=2000&context=2048"


@dataclass
class Peers:
    """Three processes and their clients."""

    openai: Any
    inference: Any
    coordinator: Any
    engine: Any
    processes: dict[str, subprocess.Popen[bytes]]
    start: Callable[..., subprocess.Popen[bytes]]

    def restart(self, name: str, number: signal.Signals) -> None:
        """Ends a process by a signal, and starts it again."""
        self.processes[name].send_signal(number)
        self.processes[name].wait(20)
        self.processes[name] = self.start(name)

    def ask(self, **fields: Any) -> Any:
        """A call of CreateChatCompletion."""
        request = openai_pb.CreateChatCompletionRequest(body=HttpBody(data=chat(**fields)))
        return self.openai.CreateChatCompletion(request, timeout=30)

    def ready_engines(self) -> int:
        """Engines that can be asked."""
        models = self.coordinator.ListModels(coordinator_pb.ListModelsRequest()).models
        return sum(model.ready_engines for model in models)

    def idle(self) -> bool:
        """Whether no lease is held and no sequence runs."""
        leases = self.coordinator.ListInflight(coordinator_pb.ListInflightRequest()).requests
        running = self.engine.ListInflight(engine_pb.ListInflightRequest()).requests
        return not leases and not running


@pytest.fixture(scope="module")
def peers() -> Iterator[Peers]:
    """Started once; the tests that end the engine start it again."""
    names = ("coordinator", "engine", "gateway")
    addresses = {name: f"127.0.0.1:{free_port()}" for name in names}
    environment = {
        **os.environ,
        "CARAVAN_DRAIN_GRACE_S": "0",
        "CARAVAN_ENGINE_MODEL": MODEL,
        "CARAVAN_ENGINE_PROGRESS_S": "0.2",
        "CARAVAN_GATEWAY_STALL_S": "1",
    }
    for name, address in addresses.items():
        environment[f"CARAVAN_{name.upper()}_ADDRESS"] = address
        environment[f"CARAVAN_{name.upper()}_METRICS_ADDRESS"] = f"127.0.0.1:{free_port()}"
    for name in ("ENGINE", "GATEWAY"):
        environment[f"CARAVAN_{name}_COORDINATOR"] = addresses["coordinator"]
    with ExitStack() as stack:

        def start(name: str, **settings: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", f"services.{name}"]
            changed = {**environment, **settings}
            process = stack.enter_context(subprocess.Popen(command, env=changed))
            stack.callback(process.terminate)
            return process

        processes = {name: start(name) for name in names}
        channels = {
            name: stack.enter_context(grpc.insecure_channel(address))
            for name, address in addresses.items()
        }
        for channel in channels.values():
            grpc.channel_ready_future(channel).result(timeout=120)
        found = Peers(
            openai_grpc.OpenAIServiceStub(channels["gateway"]),
            inference_grpc.InferenceServiceStub(channels["gateway"]),
            coordinator_grpc.CoordinatorServiceStub(channels["coordinator"]),
            engine_grpc.EngineServiceStub(channels["engine"]),
            processes,
            start,
        )
        wait_for(found.ready_engines, "the engine joined", 120)
        yield found


def test_an_answer_passes_all_hops(peers: Peers) -> None:
    """Stream and plain answers of one seed have the same text and usage."""
    fields: dict[str, Any] = {"max_tokens": 7, "seed": 5}
    body = b"".join(part.body.data for part in peers.ask(stream=True, **fields))
    events = [json.loads(line[6:]) for line in body.decode().split("\n\n")[:-2]]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    (plain,) = [json.loads(part.body.data) for part in peers.ask(**fields)]
    assert text == plain["choices"][0]["message"]["content"]
    assert plain["usage"]["completion_tokens"] == 7
    wait_for(peers.idle, "nothing is left")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_sequence(peers: Peers, stream: bool) -> None:
    """The engine stops computing for a client that is gone, and the lease is free (I5)."""
    call = peers.ask(stream=stream)
    reader = threading.Thread(target=lambda: _drop(call))
    reader.start()
    wait_for(lambda: not peers.idle(), "the request runs")
    call.cancel()
    reader.join()
    wait_for(peers.idle, "nothing is left")


def _drop(call: Any) -> None:
    try:
        for _ in call:
            pass
    except grpc.RpcError:
        return


def test_cancel_request_goes_all_the_way(peers: Peers) -> None:
    """CancelRequest ends the request at the engine; its own stream finishes and says why."""
    prompt = chat_pb2.ChatPrompt(
        messages=[chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content="hi")]
    )
    call = peers.inference.Chat(inference_pb.ChatRequest(model="demo", prompt=prompt))
    request_id = next(call).started.request_id
    peers.inference.CancelRequest(inference_pb.CancelRequestRequest(request_id=request_id))
    last = list(call)[-1]
    assert last.finished.reason == generation_pb2.FINISH_REASON_CANCELLED
    wait_for(peers.idle, "nothing is left")


def test_a_prompt_beyond_the_context(peers: Peers) -> None:
    """The engine's refusal reaches the client with both numbers, and nothing is left."""
    messages = [{"role": "user", "content": "word " * 5000}]
    with pytest.raises(grpc.RpcError) as caught:
        list(peers.ask(messages=messages))
    error: Any = caught.value
    shown = json.loads(dict(error.trailing_metadata())["x-openai-error"])["error"]
    assert (shown["param"], shown["code"]) == ("messages", "context_length_exceeded")
    assert "2048" in shown["message"]
    wait_for(peers.idle, "nothing is left")


def _text(parts: list[Any]) -> tuple[str, dict[str, int]]:
    body = b"".join(part.body.data for part in parts).decode()
    *events, done, _ = body.split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(event[6:]) for event in events]
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]]
    return "".join(texts), chunks[-1]["usage"]


LONG: dict[str, Any] = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "seed": 11,
    "max_tokens": 300,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def expected(peers: Peers) -> tuple[str, dict[str, int]]:
    """The answer to LONG of an engine that lives."""
    return _text(list(peers.ask(**LONG)))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_engine_that_ends_in_the_middle(
    peers: Peers, expected: tuple[str, dict[str, int]], number: signal.Signals
) -> None:
    """The only engine is killed or shut down and comes back: the client gets the text of an engine that lived, once."""
    call = peers.ask(**LONG)
    parts = [next(call)]
    peers.restart("engine", number)
    parts.extend(call)
    text, usage = _text(parts)
    assert text == expected[0]
    assert usage["completion_tokens"] == expected[1]["completion_tokens"] == 300
    wait_for(peers.idle, "nothing is left")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_coordinator_that_ends_in_the_middle(
    peers: Peers, expected: tuple[str, dict[str, int]], number: signal.Signals
) -> None:
    """A stream goes on, the next coordinator learns of its lease, and a request that comes meanwhile waits for it."""
    call = peers.ask(**LONG)
    parts = [next(call)]
    peers.restart("coordinator", number)
    (second,) = [json.loads(part.body.data) for part in peers.ask(max_tokens=3)]
    assert second["usage"]["completion_tokens"] == 3
    parts.extend(call)
    assert _text(parts)[0] == expected[0]
    wait_for(peers.idle, "nothing is left")


def test_a_coordinator_that_came_later_knows_what_runs(peers: Peers) -> None:
    """It has learned the lease of a stream that began before it did, and can end it."""
    call = peers.ask(**LONG | {"max_tokens": 1900})
    parts = [next(call)]
    peers.restart("coordinator", signal.SIGKILL)
    listed = peers.coordinator.ListInflight

    def running() -> Any:
        return listed(coordinator_pb.ListInflightRequest(), wait_for_ready=True).requests

    (request,) = wait_for(running, "the coordinator has learned it")
    assert request.phase == coordinator_pb.INFLIGHT_PHASE_RUNNING
    peers.inference.CancelRequest(inference_pb.CancelRequestRequest(request_id=request.request_id))
    with pytest.raises(grpc.RpcError) as caught:
        parts.extend(call)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.CANCELLED
    wait_for(peers.idle, "nothing is left")


def test_an_engine_that_is_drained_and_put_back(
    peers: Peers, expected: tuple[str, dict[str, int]]
) -> None:
    """What runs on it waits in front of the queue, and goes on where it was, on the same life of the engine."""
    call = peers.ask(**LONG)
    parts = [next(call)]
    drain = coordinator_pb.DrainEngineRequest(engine_id="engine-0")
    drain.grace.FromMilliseconds(0)
    peers.coordinator.DrainEngine(drain)
    listed = peers.coordinator.ListInflight

    def waiting() -> bool:
        requests = listed(coordinator_pb.ListInflightRequest()).requests
        return [request.phase for request in requests] == [coordinator_pb.INFLIGHT_PHASE_QUEUED]

    wait_for(waiting, "the request waits")
    peers.coordinator.UndrainEngine(coordinator_pb.UndrainEngineRequest(engine_id="engine-0"))
    parts.extend(call)
    assert _text(parts)[0] == expected[0]
    wait_for(peers.idle, "nothing is left")


def test_an_engine_that_stands_still(peers: Peers, expected: tuple[str, dict[str, int]]) -> None:
    """Its connections stay open and nothing comes: after a second of silence another engine goes on with the same text."""
    spare = peers.start(
        "engine",
        CARAVAN_ENGINE_ID="engine-1",
        CARAVAN_ENGINE_ADDRESS=f"127.0.0.1:{free_port()}",
        CARAVAN_ENGINE_METRICS_ADDRESS=f"127.0.0.1:{free_port()}",
    )
    engines = {"engine-0": peers.processes["engine"], "engine-1": spare}
    wait_for(lambda: peers.ready_engines() == 2, "both engines joined", 60)
    call = peers.ask(**LONG)
    parts = [next(call)]
    leases = peers.coordinator.ListInflight(coordinator_pb.ListInflightRequest()).requests
    stopped = engines[leases[0].engine_id]
    stopped.send_signal(signal.SIGSTOP)
    try:
        parts.extend(call)
        assert _text(parts)[0] == expected[0]
    finally:
        stopped.send_signal(signal.SIGCONT)
        spare.kill()
    wait_for(lambda: peers.ready_engines() == 1, "one engine is left")
    wait_for(peers.idle, "nothing is left")
