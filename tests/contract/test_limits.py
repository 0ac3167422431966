"""Limits that engines share, over real gRPC on loopback: what is told on the session, and the permits of strict limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from caravan.engine.v1.remote_options_pb2 import RateLimits

from services.engine.remote.failure import Failure, ProviderError
from services.engine.remote.rate_gate import RateGate, open_rate_gate
from services.engine.remote.strict_meter import AWAY_RETRY_S, AWAY_S, SHARED, StrictMeter
from services.runtime.channel import open_channel
from services.runtime.clock import ManualClock, SystemClock
from services.runtime.rate_limiter import Denial
from tests.support.coordinator import Coordinator, EnginePeer, refused, running_coordinator, until
from tests.support.ports import free_port

TWO = RateLimits(concurrent_requests=2, strict=True)


def report(*counters: pb.LimitCounter) -> pb.JoinEngineRequest:
    """A report of an interval."""
    load = engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_IDLE)
    return pb.JoinEngineRequest(report=pb.EngineReport(load=load, limits=counters))


def counter(engine: EnginePeer, requests: int, epoch: int = 5) -> pb.LimitCounter:
    """What an engine has used of the limit "key"."""
    return pb.LimitCounter(
        key="key", incarnation=engine.incarnation, epoch=epoch, requests=requests
    )


async def told(engine: EnginePeer) -> list[pb.LimitCounter]:
    """The next message, which must be of limits."""
    response = await engine.receive()
    assert response.WhichOneof("message") == "limits"
    return list(response.limits.counters)


async def acquire(
    coordinator: Coordinator, engine: EnginePeer, limits: RateLimits = TWO, tokens: int = 0
) -> pb.AcquireLimitResponse:
    """Asks for a permit."""
    request = pb.AcquireLimitRequest(
        key="key", incarnation=engine.incarnation, limits=limits, tokens=tokens
    )
    return await coordinator.stub.AcquireLimit(request, timeout=10)


async def settle(coordinator: Coordinator, permit_id: str) -> bool:
    """Ends a permit."""
    request = pb.SettleLimitRequest(permit_id=permit_id)
    return (await coordinator.stub.SettleLimit(request, timeout=10)).settled


async def test_a_report_is_answered_with_what_the_others_have_used() -> None:
    """Also with nothing, which says that there are no others; and not more than once a second."""
    async with running_coordinator() as coordinator:
        first, second = [await coordinator.engine(f"engine-{i}") for i in range(2)]
        await first.send(report(counter(first, 7)))
        assert await told(first) == []
        coordinator.clock.advance(1)
        await second.send(report(counter(second, 3)))
        assert await told(second) == [counter(first, 7)]
        for requests in (8, 9, 10, 11):
            await first.send(report(counter(first, requests)))
        assert await told(first) == [counter(second, 3)]
        record = coordinator.state.engines.find("engine-0")
        assert record is not None
        shared = coordinator.state.rates.shared
        await until(lambda: [c.requests for c in shared.told(record.session + 1)] == [11])
        coordinator.clock.advance(1)
        # Had there been more answers, they would come before this one.
        await second.send(report(counter(second, 4)))
        assert await told(second) == [counter(first, 11)]
        await first.send(report(counter(first, 12)))
        assert await told(first) == [counter(second, 4)]
        assert coordinator.metric("caravan_limit_keys") == 1


async def test_a_report_without_limits_is_not_answered() -> None:
    """Engines that share nothing hear nothing."""
    async with running_coordinator() as coordinator:
        engine, gateway = await coordinator.engine(), await coordinator.gateway()
        await engine.send(report())
        await gateway.route("req-1")
        await coordinator.stub.Cancel(pb.CancelRequest(request_id="req-1"))
        assert await engine.cancelled_request() == "req-1"


@pytest.mark.parametrize(
    ("counters", "reason"),
    [
        ([pb.LimitCounter()], "MISSING_FIELD"),
        ([pb.LimitCounter(key="k" * 257)], "INVALID_VALUE"),
        ([pb.LimitCounter(key="k")] * 65, "INVALID_VALUE"),
    ],
)
async def test_counters_that_make_no_sense_end_the_session(
    counters: list[pb.LimitCounter], reason: str
) -> None:
    """They come from a defect, which should be seen."""
    async with running_coordinator() as coordinator:
        engine = await coordinator.engine()
        await engine.send(report(*counters))
        assert (await engine.end()).reason == reason


async def test_permits_are_granted_refused_and_given_back() -> None:
    """Two at a time, whichever engine has them; a refusal is an answer with a time."""
    async with running_coordinator() as coordinator:
        one, other = [await coordinator.engine(f"engine-{i}") for i in range(2)]
        first, second = await acquire(coordinator, one), await acquire(coordinator, other)
        assert first.permit_id
        assert second.permit_id
        third = await acquire(coordinator, one)
        assert not third.permit_id
        assert third.retry_after.ToMilliseconds() > 0
        assert await settle(coordinator, second.permit_id)
        assert not await settle(coordinator, second.permit_id)
        assert (await acquire(coordinator, one)).permit_id
        assert coordinator.metric("caravan_limit_permits") == 2
        assert coordinator.metric("caravan_limit_answers_total", result="granted") == 3
        assert coordinator.metric("caravan_limit_answers_total", result="refused") == 1


async def test_the_death_of_an_engine_ends_its_permits() -> None:
    """After the time in which it could have joined again (I6)."""
    async with running_coordinator() as coordinator:
        doomed, other = [await coordinator.engine(f"engine-{i}") for i in range(2)]
        permits = [await acquire(coordinator, doomed) for _ in range(2)]
        doomed.die()
        await until(lambda: len(coordinator.state.engines) == 1)
        assert not (await acquire(coordinator, other)).permit_id
        await coordinator.pass_time(8, other)
        assert (await acquire(coordinator, other)).permit_id
        assert not await settle(coordinator, permits[0].permit_id)


async def test_an_engine_that_comes_back_has_its_permits() -> None:
    """Its session broke, its calls did not."""
    async with running_coordinator() as coordinator:
        engine, other = [await coordinator.engine(f"engine-{i}") for i in range(2)]
        permits = [await acquire(coordinator, engine) for _ in range(2)]
        engine.die()
        await until(lambda: len(coordinator.state.engines) == 1)
        again = await coordinator.engine("engine-0", incarnation=engine.incarnation)
        await coordinator.pass_time(20, again, other)
        assert not (await acquire(coordinator, other)).permit_id
        assert await settle(coordinator, permits[0].permit_id)


async def test_bad_requests_are_refused() -> None:
    """Each with its reason."""
    async with running_coordinator() as coordinator:
        engine = await coordinator.engine()
        stub = coordinator.stub
        for request, reason in (
            (pb.AcquireLimitRequest(incarnation=engine.incarnation), "MISSING_FIELD"),
            (pb.AcquireLimitRequest(key="k" * 257, incarnation="life"), "INVALID_VALUE"),
            (pb.AcquireLimitRequest(key="key"), "MISSING_FIELD"),
            (pb.AcquireLimitRequest(key="key", incarnation="nobody"), "SESSION_UNKNOWN"),
        ):
            assert (await refused(stub.AcquireLimit(request))).reason == reason
        assert (await refused(stub.SettleLimit(pb.SettleLimitRequest()))).reason == "MISSING_FIELD"
        bad = pb.SettleLimitRequest(permit_id="p")
        bad.throttled.FromSeconds(-1)
        assert (await refused(stub.SettleLimit(bad))).reason == "INVALID_VALUE"


@asynccontextmanager
async def strict_gate(
    coordinator: Coordinator, engine: EnginePeer, limits: RateLimits
) -> AsyncIterator[RateGate]:
    """The gate of an engine that asks the coordinator."""
    async with open_channel(coordinator.address) as channel:
        stub = type(coordinator.stub)(channel)
        gate = open_rate_gate(limits, "key", engine.incarnation, SystemClock(), stub)
        yield gate
        await gate.close()


async def test_a_gate_asks_the_coordinator_and_settles() -> None:
    """Engines together have no more calls at a time than the limit, and who waits goes when another ends."""
    async with running_coordinator() as coordinator:
        engines = [await coordinator.engine(f"engine-{i}") for i in range(2)]
        async with (
            strict_gate(coordinator, engines[0], TWO) as one,
            strict_gate(coordinator, engines[1], TWO) as other,
        ):
            first = await one.enter(5, None, patience=True)
            second = await other.enter(5, None, patience=True)
            with pytest.raises(ProviderError) as caught:
                await other.enter(5, None, patience=False)
            assert caught.value.metadata == {"limit": SHARED}
            assert caught.value.retry_after_s
            async with asyncio.timeout(5):
                waiting = asyncio.create_task(other.enter(5, 4.0, patience=True))
                first.settle(3)
                third = await waiting
            assert len(coordinator.state.rates.strict) == 2
            second.withdraw()
            third.throttled(60.0)
            third.settle(None)
            await until(lambda: len(coordinator.state.rates.strict) == 0)
            with pytest.raises(ProviderError) as paused:
                await one.enter(5, 10.0, patience=True)
            assert paused.value.retry_after_s == pytest.approx(60.0, abs=1.0)


async def test_a_request_that_is_cancelled_while_the_coordinator_answers_gives_its_permit_back() -> (
    None
):
    """The grant crosses the cancellation; nobody else would end it."""
    async with running_coordinator() as coordinator:
        engine = await coordinator.engine()
        async with strict_gate(coordinator, engine, TWO) as gate:
            for steps in range(6):
                for patience in (True, False):
                    task = asyncio.create_task(gate.enter(5, None, patience))
                    for _ in range(steps):
                        await asyncio.sleep(0)
                    task.cancel()
                    (ended,) = await asyncio.gather(task, return_exceptions=True)
                    assert isinstance(ended, asyncio.CancelledError)
        await until(lambda: len(coordinator.state.rates.strict) == 0)
        assert coordinator.metric("caravan_limit_answers_total", result="granted") > 0


async def test_while_the_coordinator_is_away_nothing_goes() -> None:
    """The limit is never passed: who may wait does so for a while, others are refused at once, with a retry time."""
    async with running_coordinator() as coordinator:
        engine = EnginePeer(coordinator.stub, "engine-0")
        async with strict_gate(coordinator, engine, TWO) as gate:
            for time_s, patience in ((None, False), (0.1, True)):
                with pytest.raises(ProviderError) as caught:
                    await gate.enter(5, time_s, patience)
                assert caught.value.failure is Failure.RATE_LIMITED
                assert caught.value.retry_after_s == pytest.approx(AWAY_RETRY_S, abs=0.1)
                assert caught.value.metadata == {"limit": SHARED}
            # To an engine that has not joined it says nothing either.
            waiting = asyncio.create_task(gate.enter(5, None, patience=True))
            await engine.join()
            async with asyncio.timeout(5):
                permit = await waiting
            await coordinator.server.drain_and_stop()
            async with asyncio.timeout(5):
                with pytest.raises(ProviderError) as caught:
                    await gate.enter(5, 0.1, patience=True)
            assert caught.value.failure is Failure.RATE_LIMITED
            permit.settle(1)


async def test_a_coordinator_that_stays_away_is_not_waited_for() -> None:
    """After ten seconds without any answer; whoever asks a while later waits anew."""
    clock = ManualClock()
    async with open_channel(f"127.0.0.1:{free_port()}") as channel:
        stub = coordinator_service_pb2_grpc.CoordinatorServiceStub(channel)
        meter = StrictMeter(stub, "key", "life-1", TWO, clock)
        for later_s in (0.0, AWAY_S / 2, AWAY_S / 2 - 0.1):
            clock.now += later_s
            assert isinstance(await meter.ask(5), Denial)
        clock.now += 0.2
        with pytest.raises(ProviderError):
            await meter.ask(5)
        clock.now += AWAY_S
        assert isinstance(await meter.ask(5), Denial)
