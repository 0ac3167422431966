"""A gateway whose requests wait in a real coordinator, in front of an engine that a test scripts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.core.v1 import chat_pb2, scheduling_pb2
from caravan.inference.v1 import inference_service_pb2 as inference_pb
from caravan.inference.v1 import inference_service_pb2_grpc as inference_grpc
from caravan.openai.v1 import openai_service_pb2 as openai_pb
from caravan.openai.v1 import openai_service_pb2_grpc as openai_grpc
from google.api.httpbody_pb2 import HttpBody
from prometheus_client import CollectorRegistry

from services.coordinator.effects import Effects, Ending, EndSession
from services.coordinator.limits import Limits
from services.coordinator.tasks import Priority
from services.coordinator.waiting import Want
from services.gateway.__main__ import Gateway
from services.gateway.settings import GatewaySettings
from services.runtime.channel import open_channel
from services.runtime.clock import CountingIds, SystemClock
from services.runtime.errors import CaravanError, from_rpc_error
from services.runtime.telemetry import NoTracing
from tests.support.coordinator import Coordinator, EnginePeer, running_coordinator, until
from tests.support.gateway import chat, error_of
from tests.support.gateway_peers import FakeEngine, delta, finished, started


@dataclass
class Line:
    """A gateway, the coordinator in which its requests wait, and the one sequence that they wait for."""

    coordinator: Coordinator
    gateway: Gateway
    engine: FakeEngine
    openai: openai_grpc.OpenAIServiceAsyncStub
    inference: inference_grpc.InferenceServiceAsyncStub
    go_on: asyncio.Event

    def ask(self, timeout: float | None = 20, **fields: Any) -> Any:
        """A chat."""
        body = HttpBody(data=chat(**fields))
        request = openai_pb.CreateChatCompletionRequest(body=body)
        return self.openai.CreateChatCompletion(request, timeout=timeout)

    async def running(self) -> Any:
        """A chat that holds the sequence until `go_on` is set."""
        call = self.ask(stream=True)
        await until(lambda: self.engine.running == 1)
        return call

    async def queued(self, number: int = 1) -> list[Want]:
        """Returns what waits, once so many do."""
        waiting = self.coordinator.state.waiting
        await until(lambda: len(waiting) == number)
        return list(waiting)


@asynccontextmanager
async def line(limits: Limits | None = None, **settings: Any) -> AsyncIterator[Line]:
    """One engine of one sequence, whose answers wait for `go_on`."""
    async with AsyncExitStack() as stack:
        go_on = asyncio.Event()

        async def wait() -> None:
            await go_on.wait()

        engine = FakeEngine((started(), delta("Hello"), wait, finished()))
        await engine.start()
        stack.push_async_callback(engine.kill)
        coordinator = await stack.enter_async_context(running_coordinator(limits))
        peer = EnginePeer(coordinator.stub, "engine-0", address=engine.address)
        peer.model.max_sequences = 1
        await peer.join()
        gateway = Gateway(
            GatewaySettings(
                address="127.0.0.1:0",
                coordinator=f"127.0.0.1:{coordinator.server.port}",
                drain_grace_s=0.0,
                **settings,
            ),
            CollectorRegistry(),
            SystemClock(),
            CountingIds(),
            NoTracing(),
        )
        port = await gateway.start()
        stack.push_async_callback(gateway.stop)
        await until(lambda: len(coordinator.state.gateways) == 1)
        channel = open_channel(f"127.0.0.1:{port}")
        stack.push_async_callback(channel.close)
        yield Line(
            coordinator,
            gateway,
            engine,
            openai_grpc.OpenAIServiceStub(channel),
            inference_grpc.InferenceServiceStub(channel),
            go_on,
        )
        go_on.set()
        await until(lambda: len(gateway.sessions) + len(gateway.background) == 0)
        # The last releases may be on their way.
        await until(lambda: len(coordinator.state.leases) + len(coordinator.state.waiting) == 0)


async def text(call: Any) -> str:
    """The whole answer."""
    return b"".join([part.body.data async for part in call]).decode()


def known(error: grpc.aio.AioRpcError) -> CaravanError:
    """The error of the table."""
    return from_rpc_error(error, service="gateway")


async def test_a_request_beyond_the_capacity_waits_for_its_turn() -> None:
    """It waits longer than one call to the coordinator may take, and is answered when the first one ends."""
    async with line(coordinator_timeout_s=0.05) as rig:
        first = await rig.running()
        second = asyncio.create_task(text(rig.ask()))
        await rig.queued()
        # Several times the time for one call pass by.
        await asyncio.wait({second}, timeout=0.3)
        assert not second.done()
        rig.go_on.set()
        assert "Hello" in await second
        assert "[DONE]" in await text(first)


async def test_comments_keep_a_stream_alive_that_waits() -> None:
    """A client that streams sees that its request is not lost, long before the first token."""
    async with line(keepalive_s=0.05) as rig:
        first = await rig.running()
        second = aiter(rig.ask(stream=True))
        beginning = await anext(second)
        assert beginning.body.data == b": keepalive\n\n"
        assert len(await rig.queued()) == 1
        rig.go_on.set()
        answer = await text(second)
        assert answer.rstrip().endswith("[DONE]")
        first.cancel()


async def test_a_client_that_leaves_the_queue() -> None:
    """Its request leaves the queue of the coordinator at once, and nothing of it is left (I5, I6)."""
    async with line() as rig:
        first = await rig.running()
        leaving = rig.ask()
        await rig.queued()
        leaving.cancel()
        await rig.queued(0)
        await until(lambda: len(rig.gateway.sessions) == 1)
        rig.go_on.set()
        assert "Hello" in await text(first)
        assert len(rig.engine.requests) == 1


async def test_a_deadline_that_passes_in_the_queue() -> None:
    """The client is told so, and its request leaves the queue."""
    async with line() as rig:
        await rig.running()
        error = await error_of(rig.ask(timeout=0.3))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await rig.queued(0)


async def test_who_may_not_wait_is_refused_with_a_retry_time() -> None:
    """`max_wait` of 0, and a full queue, are 429 with Retry-After."""
    async with line(Limits(queued_max=1)) as rig:
        await rig.running()
        at_once = await error_of(rig.ask(caravan={"max_wait": 0}))
        waiting = rig.ask()
        await rig.queued()
        too_many = await error_of(rig.ask())
        for error in (at_once, too_many):
            assert known(error).reason == "CAPACITY_EXHAUSTED"
            assert dict(error.trailing_metadata() or ())["retry-after"] == "1"
        assert known(too_many).metadata["queued"] == "1"
        waiting.cancel()


async def test_a_wait_that_is_over_is_504() -> None:
    """A queued request gets the coordinator's typed reason."""
    async with line() as rig:
        await rig.running()
        call = rig.ask(caravan={"max_wait": 0.1})
        await rig.queued()
        rig.coordinator.clock.advance(0.1)
        error = known(await error_of(call))
        assert (error.reason, error.row.http_status) == ("QUEUE_TIMEOUT", 504)


async def test_what_the_coordinator_is_told() -> None:
    """Priority, conversation and hashes of the prompt, from both APIs; the second turn begins with the first."""
    async with line() as rig:
        await rig.running()
        body = {"priority": "high", "session_id": "talk"}
        calls = [rig.ask(caravan=body)]
        (first,) = await rig.queued()
        turns = [("user", "hi"), ("assistant", "Hello"), ("user", "more")]
        messages = [{"role": role, "content": content} for role, content in turns]
        calls.append(rig.ask(messages=messages))
        _, second = await rig.queued(2)
        message = chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content="hi")
        typed = inference_pb.ChatRequest(
            model="demo",
            prompt=chat_pb2.ChatPrompt(messages=[message]),
            scheduling=scheduling_pb2.Scheduling(priority=scheduling_pb2.PRIORITY_BACKGROUND),
        )
        calls.append(rig.inference.Chat(typed))
        _, _, third = await rig.queued(3)
        assert (first.priority, first.session_id, first.tenant) == (Priority.HIGH, "talk", "")
        assert (second.priority, third.priority) == (Priority.NORMAL, Priority.BACKGROUND)
        assert len(second.affinity) == 3
        assert first.affinity == third.affinity == second.affinity[:1]
        for call in calls:
            call.cancel()


async def test_requests_are_listed_and_cancelled_over_rest() -> None:
    """The list shows who runs and who waits; a request that waits ends as cancelled (499)."""
    async with line() as rig:
        await rig.running()
        waiting = rig.ask(caravan={"priority": "background"})
        (want,) = await rig.queued()
        rig.coordinator.clock.advance(2)
        answer = await rig.openai.ListRequests(openai_pb.ListRequestsRequest())
        listed = json.loads(answer.body.data)
        assert [request["status"] for request in listed["data"]] == ["running", "queued"]
        assert listed["data"][1] == {
            "id": want.request_id,
            "object": "request",
            "model": "demo",
            "status": "queued",
            "priority": "background",
            "engine_id": None,
            "phase": None,
            "prompt_tokens": None,
            "completion_tokens": 0,
            "age_s": 2.0,
            "queued_s": 2.0,
        }
        request = openai_pb.CancelRequestRequest(request_id=want.request_id)
        done = json.loads((await rig.openai.CancelRequest(request)).body.data)
        assert (done["id"], done["status"]) == (want.request_id, "cancelling")
        assert known(await error_of(waiting)).reason == "CANCELLED"
        again = await error_of(rig.openai.CancelRequest(request))
        assert known(again).reason == "REQUEST_NOT_FOUND"


@pytest.mark.parametrize("field", [{"priority": "now"}, {"max_wait": -1}, {"max_wait": 3601}])
async def test_bad_wishes_are_refused_by_name(field: dict[str, Any]) -> None:
    """The path of the field is named, before anything is asked of the coordinator."""
    async with line() as rig:
        (name,) = field
        error = known(await error_of(rig.ask(caravan=field)))
        assert (error.reason, error.param) == ("INVALID_VALUE", f"caravan.{name}")
        typed = inference_pb.ChatRequest(
            model="demo",
            prompt=chat_pb2.ChatPrompt(
                messages=[chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content="hi")]
            ),
        )
        if name == "priority":
            typed.scheduling.MergeFromString(b"\x08\x4d")
        else:
            typed.scheduling.max_wait.FromSeconds(field[name])
        error = known(await error_of(rig.inference.Chat(typed)))
        assert (error.reason, error.param) == ("INVALID_VALUE", f"scheduling.{name}")


@pytest.mark.parametrize("ends", ["before", "after"])
async def test_a_release_around_the_end_of_the_session(ends: str) -> None:
    """The request ends just before or after its session does: no lease is left, and none waits for its gateway to come back."""
    async with line() as rig:
        state, servicer = rig.coordinator.state, rig.coordinator.servicer
        call = await rig.running()
        (gateway,) = state.gateways
        ending = EndSession(gateway.session, gateway.gateway_id, Ending.SILENT)
        rig.go_on.set()
        if ends == "after":
            # The release is on its way when the coordinator ends the session.
            await until(lambda: len(rig.gateway._membership._releases) == 1)
        servicer.perform(Effects(endings=(ending,)))
        assert "[DONE]" in await text(call)
        await until(
            lambda: [g.gateway_id for g in state.gateways] not in ([], [gateway.gateway_id])
        )
        # The clock of the coordinator stands still: it forgets nothing by itself.
        await until(lambda: len(state.leases) + len(state._relearning.orphaned) == 0)
        assert "Hello" in await text(rig.ask())


async def test_a_release_that_is_refused_is_not_told_for_ever() -> None:
    """The session that ends by it is followed by one, not by many."""
    async with line() as rig:
        rig.gateway._membership.release(pb.ReleaseRequest(lease_id="x", finish_key=b"short"))
        (first,) = rig.coordinator.state.gateways
        gateways = rig.coordinator.state.gateways
        await until(lambda: [g.session for g in gateways] not in ([], [first.session]))
        (second,) = gateways
        rig.go_on.set()
        assert "Hello" in await text(rig.ask())
        await rig.gateway._membership.settle(10)
        assert [g.session for g in gateways] == [second.session]


async def test_a_request_that_waits_outlives_its_session() -> None:
    """It asks again in the next one, in which its turn comes."""
    async with line() as rig:
        state, servicer = rig.coordinator.state, rig.coordinator.servicer
        first = await rig.running()
        second = asyncio.create_task(text(rig.ask()))
        (want,) = await rig.queued()
        (gateway,) = state.gateways
        ending = EndSession(gateway.session, gateway.gateway_id, Ending.SILENT)
        servicer.perform(Effects(endings=(ending,)))
        await until(lambda: [w.gateway_id for w in state.waiting] not in ([], [want.gateway_id]))
        assert len(state.leases) == 1, "the lease that runs was told to it"
        rig.go_on.set()
        assert "Hello" in await second
        assert "[DONE]" in await text(first)


async def test_a_coordinator_that_dies_ends_the_wait() -> None:
    """Who waits for a turn that no coordinator gives any more is told so when patience is at its end."""
    async with line(coordinator_patience_s=0.3) as rig:
        await rig.running()
        waiting = rig.ask()
        await rig.queued()
        await rig.coordinator.server.grpc.stop(0)
        error = known(await error_of(waiting))
        assert (error.reason, error.metadata["service"]) == ("SERVICE_UNAVAILABLE", "coordinator")
