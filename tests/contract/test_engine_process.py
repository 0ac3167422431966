"""`python -m services.engine` as its operator sees it, and its session with a coordinator."""

from __future__ import annotations

import asyncio
import re
import signal
import urllib.request
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import grpc
import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as coordinator_pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as coordinator_grpc
from caravan.core.v1 import generation_pb2 as generation
from caravan.engine.v1 import engine_service_pb2 as pb
from caravan.engine.v1 import engine_service_pb2_grpc as pb_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.engine.membership import BACKOFF_MOST_S, Membership, backoff_s
from services.runtime.channel import open_channel
from services.runtime.errors import from_rpc_error
from services.runtime.generate_events import each
from services.runtime.server import ServiceServer, cancel_all
from tests.support.engine import running_engine
from tests.support.ports import free_port
from tests.support.processes import log_line, process

PORT = re.compile(rb"listening on port (\d+)")
SERVING = re.compile(rb"serving demo")


def engine(**settings: str) -> AbstractAsyncContextManager[asyncio.subprocess.Process]:
    """An engine with a scripted model."""
    model = "demo=scripted:?step_ms=2&tokens=100000&context=8000"
    return process("engine", **{"CARAVAN_ENGINE_MODEL": model, **settings})


def request(request_id: str, max_tokens: int) -> pb.GenerateRequest:
    message = pb.GenerateRequest(request_id=request_id, text="hi")
    message.stop.max_tokens = max_tokens
    return message


async def read_all(call: AsyncIterable[pb.GenerateResponse]) -> list[pb.GenerateResponse]:
    """All events of a request."""
    return [event async for event in each(call)]


async def test_a_process_serves_drains_and_ends_with_zero() -> None:
    """Health, metrics, SIGTERM: a request that runs is ended within the grace, the exit code is 0."""
    metrics = free_port()
    async with engine(CARAVAN_ENGINE_METRICS_ADDRESS=f"127.0.0.1:{metrics}") as running:
        port = int((await log_line(running, PORT))[1])
        await log_line(running, SERVING)
        async with open_channel(f"127.0.0.1:{port}") as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            check = health_pb2.HealthCheckRequest(service="caravan.engine.v1.EngineService")
            assert (await health.Check(check)).status == health_pb2.HealthCheckResponse.SERVING
            call = pb_grpc.EngineServiceStub(channel).Generate(request("a", 300))
            events = []
            async for event in each(call):
                events.append(event)
                if event.HasField("started"):
                    running.send_signal(signal.SIGTERM)
            assert events[-1].finished.reason == generation.FINISH_REASON_LENGTH
        async with asyncio.timeout(20):
            assert await running.wait() == 0


async def test_every_series_is_there() -> None:
    """/metrics shows queue, steps, sequences and tokens."""
    metrics = free_port()
    async with engine(CARAVAN_ENGINE_METRICS_ADDRESS=f"127.0.0.1:{metrics}") as running:
        port = int((await log_line(running, PORT))[1])
        await log_line(running, SERVING)
        async with open_channel(f"127.0.0.1:{port}") as channel:
            async for _event in each(pb_grpc.EngineServiceStub(channel).Generate(request("a", 5))):
                pass
        url = f"http://127.0.0.1:{metrics}/metrics"
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
        assert "caravan_generated_tokens_total 5.0" in text
        assert "caravan_prompt_tokens_total 2.0" in text
        assert "caravan_queue_seconds_count 1.0" in text
        assert "caravan_decode_step_seconds_count 5.0" in text
        assert "caravan_engine_active_sequences 0.0" in text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"CARAVAN_ENGINE_THREADS": "many"}, "CARAVAN_ENGINE_THREADS"),
        ({"CARAVAN_ENGINE_ADDRESS": "0.0.0.0:7010"}, "CARAVAN_ENGINE_ADDRESS"),
        ({"CARAVAN_ENGINE_MODEL": "demo"}, "NAME=PATH"),
        ({"CARAVAN_ENGINE_MODEL": "demo=scripted:?speed=1"}, "speed"),
        ({"CARAVAN_ENGINE_MAX_SEQUENCES": "255", "CARAVAN_ENGINE_BATCH_TOKENS": "256"}, "BATCH"),
        ({"CARAVAN_ENGINE_KV_ROOTS": "disk:/dev/null/kv:1GiB"}, "CARAVAN_ENGINE_KV_ROOTS"),
        ({"CARAVAN_ENGINE_KV_ROOTS": "tape:/kv:1GiB"}, "CARAVAN_ENGINE_KV_ROOTS"),
    ],
)
async def test_wrong_settings_end_the_process_with_two(settings: dict[str, str], said: str) -> None:
    """One clear line that names the setting, and exit code 2."""
    async with engine(**settings) as running:
        async with asyncio.timeout(30):
            _, stderr = await running.communicate()
        assert running.returncode == 2
        assert said in stderr.decode()
        assert "Traceback" not in stderr.decode()


async def test_a_taken_port_ends_the_process_with_two() -> None:
    """Another listener on the port is a mistake that is told."""
    server = ServiceServer("127.0.0.1:0", [], 0)
    port = await server.start()
    try:
        async with engine(CARAVAN_ENGINE_ADDRESS=f"127.0.0.1:{port}") as running:
            async with asyncio.timeout(30):
                _, stderr = await running.communicate()
            assert running.returncode == 2
            assert str(port) in stderr.decode()
    finally:
        await server.drain_and_stop()


class Coordinator(coordinator_grpc.CoordinatorServiceServicer):
    """Takes one engine at a time and keeps what it says."""

    def __init__(self, interval_ms: int) -> None:
        self._interval_ms = interval_ms
        self.registered: asyncio.Queue[coordinator_pb.EngineRegistration] = asyncio.Queue()
        self.reports: asyncio.Queue[coordinator_pb.EngineReport] = asyncio.Queue()
        self.commands: asyncio.Queue[coordinator_pb.JoinEngineResponse | None] = asyncio.Queue()

    async def JoinEngine(
        self, request_iterator: AsyncIterator[coordinator_pb.JoinEngineRequest], context: object
    ) -> AsyncIterator[coordinator_pb.JoinEngineResponse]:
        first = await anext(request_iterator)
        self.registered.put_nowait(first.register)
        welcome = coordinator_pb.EngineWelcome()
        welcome.report_interval.FromMilliseconds(self._interval_ms)
        yield coordinator_pb.JoinEngineResponse(welcome=welcome)
        reading = asyncio.ensure_future(self._read(request_iterator))
        try:
            while (command := await self.commands.get()) is not None:
                yield command
        finally:
            reading.cancel()

    async def _read(self, requests: AsyncIterator[coordinator_pb.JoinEngineRequest]) -> None:
        async for message in requests:
            self.reports.put_nowait(message.report)

    async def told_requests(self) -> list[pb.InflightRequest]:
        """The requests of the next report that has some."""
        async with asyncio.timeout(20):
            while not (found := await self.reports.get()).requests:
                pass
        return list(found.requests)

    async def report(self, phase: int) -> coordinator_pb.EngineReport:
        """The next report with this phase."""
        async with asyncio.timeout(20):
            while True:
                found = await self.reports.get()
                if found.load.phase == phase:
                    return found


@asynccontextmanager
async def coordinator(
    address: str = "127.0.0.1:0", interval_ms: int = 100
) -> AsyncIterator[tuple[Coordinator, int]]:
    server = ServiceServer(address, [], 0)
    servicer = Coordinator(interval_ms)  # type: ignore[abstract]
    coordinator_grpc.add_CoordinatorServiceServicer_to_server(servicer, server.services)
    port = await server.start()
    try:
        yield servicer, port
    finally:
        await server.drain_and_stop()


async def test_an_engine_joins_reports_obeys_and_joins_again() -> None:
    """Registration, reports at the told interval and at changes, CancelCommand, and a new session after a restart."""
    async with (
        coordinator() as (first, port),
        engine(CARAVAN_ENGINE_COORDINATOR=f"127.0.0.1:{port}") as running,
    ):
        own = int((await log_line(running, PORT))[1])
        async with asyncio.timeout(20):
            registration = await first.registered.get()
        assert registration.engine_id == "engine-0"
        assert registration.address == f"127.0.0.1:{own}"
        assert registration.incarnation
        assert registration.revision == ""
        idle = await first.report(pb.ENGINE_PHASE_IDLE)
        assert idle.model.max_sequences == 32
        async with open_channel(f"127.0.0.1:{own}") as channel:
            call = pb_grpc.EngineServiceStub(channel).Generate(request("a", 7000))
            busy = await first.report(pb.ENGINE_PHASE_GENERATING)
            assert busy.load.active_sequences == 1
            told = (await first.told_requests())[0]
            assert (told.request_id, told.phase) == ("a", pb.REQUEST_PHASE_GENERATING)
            assert told.prompt_tokens == 2
            later = (await first.told_requests())[0]
            assert told.completion_tokens < later.completion_tokens
            cancel = coordinator_pb.CancelCommand(request_id="a")
            first.commands.put_nowait(coordinator_pb.JoinEngineResponse(cancel=cancel))
            events = [event async for event in each(call)]
            assert events[-1].finished.reason == generation.FINISH_REASON_CANCELLED
        first.commands.put_nowait(None)
        async with asyncio.timeout(20):
            again = await first.registered.get()
        assert again.model.vocabulary_tokens == 512
        assert again.incarnation == registration.incarnation
        async with open_channel(f"127.0.0.1:{own}") as channel:
            last = pb_grpc.EngineServiceStub(channel).Generate(request("b", 7000))
            await first.report(pb.ENGINE_PHASE_GENERATING)
            running.send_signal(signal.SIGTERM)
            await first.report(pb.ENGINE_PHASE_DRAINING)
            last.cancel()


async def test_what_is_told_between_the_reports_of_the_interval() -> None:
    """That the engine takes no more requests, and that it does again; not its requests, nor that it works."""
    async with (
        coordinator(interval_ms=60_000) as (one, port),
        running_engine("demo=scripted:?step_ms=2&tokens=500") as client,
        open_channel(f"127.0.0.1:{port}") as channel,
    ):
        membership = Membership(
            coordinator_grpc.CoordinatorServiceStub(channel),
            client.engine,
            coordinator_pb.EngineRegistration(engine_id="engine-0"),
            lambda: 0.5,
        )
        client.engine.on_change = membership.changed
        joined = asyncio.create_task(membership.run())
        async with asyncio.timeout(20):
            await one.registered.get()
        asking = asyncio.create_task(client.ask("hi"))
        await client.until(lambda load: load.active_sequences == 1)
        assert one.reports.empty()
        client.engine.drain(60.0)
        draining = await one.report(pb.ENGINE_PHASE_DRAINING)
        assert draining.load.active_sequences == 1
        assert not draining.requests
        client.engine.undrain()
        await one.report(pb.ENGINE_PHASE_GENERATING)
        await asking
        await cancel_all([joined])


async def test_an_engine_is_drained_and_undrained_by_its_coordinator() -> None:
    """DrainCommand, UndrainCommand, and DrainCommand with stop, after which the process ends with 0 when it is empty."""
    async with (
        coordinator() as (one, port),
        engine(
            CARAVAN_ENGINE_COORDINATOR=f"127.0.0.1:{port}", CARAVAN_ENGINE_REVISION="r2"
        ) as running,
    ):
        own = int((await log_line(running, PORT))[1])
        async with asyncio.timeout(20):
            assert (await one.registered.get()).revision == "r2"
        await one.report(pb.ENGINE_PHASE_IDLE)
        drain = coordinator_pb.DrainCommand()
        drain.grace.FromSeconds(60)
        one.commands.put_nowait(coordinator_pb.JoinEngineResponse(drain=drain))
        await one.report(pb.ENGINE_PHASE_DRAINING)
        undrain = coordinator_pb.UndrainCommand()
        one.commands.put_nowait(coordinator_pb.JoinEngineResponse(undrain=undrain))
        await one.report(pb.ENGINE_PHASE_IDLE)
        async with open_channel(f"127.0.0.1:{own}") as channel:
            call = pb_grpc.EngineServiceStub(channel).Generate(request("a", 7000))
            await one.report(pb.ENGINE_PHASE_GENERATING)
            drain.grace.FromMilliseconds(100)
            drain.stop = True
            one.commands.put_nowait(coordinator_pb.JoinEngineResponse(drain=drain))
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await read_all(call)
            assert from_rpc_error(raised.value, service="engine").reason == "DRAINING"
        async with asyncio.timeout(20):
            assert await running.wait() == 0


async def test_two_lives_of_an_engine_can_be_told_apart() -> None:
    """The incarnation is new after each start; the id is the same."""
    async with coordinator() as (one, port):
        lives = []
        for _ in range(2):
            async with engine(CARAVAN_ENGINE_COORDINATOR=f"127.0.0.1:{port}"):
                async with asyncio.timeout(20):
                    lives.append(await one.registered.get())
                one.commands.put_nowait(None)
        assert lives[0].engine_id == lives[1].engine_id
        assert lives[0].incarnation != lives[1].incarnation


async def test_an_engine_serves_without_its_coordinator() -> None:
    """A coordinator that is not there costs nobody a request."""
    nobody = free_port()
    async with engine(CARAVAN_ENGINE_COORDINATOR=f"127.0.0.1:{nobody}") as running:
        port = int((await log_line(running, PORT))[1])
        await log_line(running, SERVING)
        # It tries again and again.
        await log_line(running, re.compile(rb"joining again"))
        async with open_channel(f"127.0.0.1:{port}") as channel:
            call = pb_grpc.EngineServiceStub(channel).Generate(request("a", 3))
            events = [event async for event in each(call)]
            assert events[-1].finished.usage.completion_tokens == 3
        async with coordinator(f"127.0.0.1:{nobody}") as (late, _port):
            async with asyncio.timeout(20):
                assert (await late.registered.get()).engine_id == "engine-0"


def test_pauses_between_attempts_double_within_bounds() -> None:
    """From a tenth of a second to five seconds, at least half of that whatever the jitter."""
    assert [backoff_s(n, 0.0) for n in range(3)] == [0.05, 0.1, 0.2]
    assert backoff_s(1000, 0.999) <= BACKOFF_MOST_S
    assert backoff_s(1000, 0.0) == BACKOFF_MOST_S / 2
