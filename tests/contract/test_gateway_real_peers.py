"""The gateway with the real coordinator and a real engine, as processes; the engine's backend is scripted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
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
    engine_process: subprocess.Popen[bytes]

    def ask(self, **fields: Any) -> Any:
        """A call of CreateChatCompletion."""
        request = openai_pb.CreateChatCompletionRequest(body=HttpBody(data=chat(**fields)))
        return self.openai.CreateChatCompletion(request, timeout=30)

    def ready(self) -> bool:
        """Whether the model can be asked for."""
        models = self.coordinator.ListModels(coordinator_pb.ListModelsRequest()).models
        return any(model.ready_engines for model in models)

    def idle(self) -> bool:
        """Whether no lease is held and no sequence runs."""
        leases = self.coordinator.ListInflight(coordinator_pb.ListInflightRequest()).requests
        running = self.engine.ListInflight(engine_pb.ListInflightRequest()).requests
        return not leases and not running


@pytest.fixture(scope="module")
def peers() -> Iterator[Peers]:
    """Started once; the test that kills the engine is the last."""
    names = ("coordinator", "engine", "gateway")
    addresses = {name: f"127.0.0.1:{free_port()}" for name in names}
    environment = {**os.environ, "CARAVAN_DRAIN_GRACE_S": "0", "CARAVAN_ENGINE_MODEL": MODEL}
    for name, address in addresses.items():
        environment[f"CARAVAN_{name.upper()}_ADDRESS"] = address
        environment[f"CARAVAN_{name.upper()}_METRICS_ADDRESS"] = f"127.0.0.1:{free_port()}"
    for name in ("ENGINE", "GATEWAY"):
        environment[f"CARAVAN_{name}_COORDINATOR"] = addresses["coordinator"]
    with ExitStack() as stack:
        processes = {}
        for name in names:
            command = [sys.executable, "-m", f"services.{name}"]
            process = stack.enter_context(subprocess.Popen(command, env=environment))
            stack.callback(process.terminate)
            processes[name] = process
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
            processes["engine"],
        )
        wait_for(found.ready, "the engine joined", 120)
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


def test_an_engine_that_is_killed_in_the_middle(peers: Peers) -> None:
    """One terminal event for the client, and no lease left at the coordinator (I1, I6)."""
    call = peers.ask(stream=True)
    parts = [next(call)]
    peers.engine_process.send_signal(signal.SIGKILL)
    with pytest.raises(grpc.RpcError) as caught:
        # What came before the error stays in the list.
        parts.extend(call)
    body = b"".join(part.body.data for part in parts)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert json.loads(body.strip().split(b"\n\n")[-1][6:])["error"]["code"] == "engine_lost"
    leases = peers.coordinator.ListInflight
    wait_for(lambda: not leases(coordinator_pb.ListInflightRequest()).requests, "the lease is free")
