"""Requests that wait at an engine in front of a provider: their order, their limits, and how they leave."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from caravan.core.v1 import scheduling_pb2
from caravan.engine.v1 import engine_service_pb2 as pb

from services.dev.provider.faults import Fault, Kind
from services.dev.provider.script import Script
from services.engine.remote.estimate import prompt_tokens
from services.runtime.errors import CaravanError
from services.runtime.telemetry import NoTracing
from tests.support.remote import Answer, Rig, running_remote

SLOW = Script(tokens=1000, pace_s=0.01)


async def occupied(rig: Rig) -> Any:
    """A call that keeps the one worker busy until it is cancelled."""
    call = rig.stub.Generate(rig.request("the first"))
    await rig.provider.wait_for_requests(1)
    return call


async def test_the_order_of_those_who_wait() -> None:
    """Higher priorities first, and within one those who came first (S3.3)."""
    async with running_remote(SLOW, workers=1) as rig:
        first = await occupied(rig)
        waiting: list[asyncio.Task[Answer]] = []
        for name in ("NORMAL", "BACKGROUND", "CRITICAL", "HIGH", "NORMAL"):
            priority = scheduling_pb2.Priority.Value(f"PRIORITY_{name}")
            request = rig.request(f"{name} {len(waiting)}", priority=priority)
            waiting.append(asyncio.create_task(rig.run(request)))
            await rig.until(lambda: rig.engine.dispatcher.waiting == len(waiting))
        assert rig.engine.load().queued_requests == 5
        rig.provider.script = Script(tokens=1)
        first.cancel()
        await asyncio.gather(*waiting)
        asked = [request.json()["messages"][0]["content"] for request in rig.provider.requests]
        assert asked == [
            *("the first", "CRITICAL 2", "HIGH 3", "NORMAL 0", "NORMAL 4", "BACKGROUND 1")
        ]
        await rig.idle()
        assert rig.sample("caravan_queue_seconds_count") == 6
        assert rig.sample("caravan_queue_seconds_sum") > 0


async def test_a_queue_has_an_end() -> None:
    """One request too many is refused, with figures and a retry time."""
    async with running_remote(SLOW, workers=1, queueCapacity=1) as rig:
        first = await occupied(rig)
        second = asyncio.create_task(rig.run())
        await rig.until(lambda: rig.engine.dispatcher.waiting == 1)
        error = await rig.refusal()
        assert error.reason == "CAPACITY_EXHAUSTED"
        assert error.retry_after_s is not None
        assert rig.sample("caravan_remote_requests_total", outcome="capacity_exhausted") == 1
        rig.provider.script = Script(tokens=1)
        first.cancel()
        await second
        await rig.idle()


@pytest.mark.parametrize(
    ("policy", "reason"),
    [("QUEUE_POLICY_REJECT", "CAPACITY_EXHAUSTED"), ("QUEUE_POLICY_FALLBACK", "RATE_LIMITED")],
)
async def test_requests_that_do_not_wait(policy: str, reason: str) -> None:
    """Where all workers are busy, or a limit is reached, the request is refused at once; each policy by its own reason."""
    limits = {"requestsPerMinute": 1}
    async with running_remote(SLOW, workers=1, onCapacityExhausted=policy, limits=limits) as rig:
        first = await occupied(rig)
        assert (await rig.refusal()).reason == reason
        first.cancel()
        await rig.idle()
        rig.provider.script = Script(tokens=1)
        error = await rig.refusal()
        assert error.reason == "RATE_LIMITED"
        assert error.metadata["limit"] == "requests_per_minute"
        assert len(rig.provider.requests) == 1


async def test_a_provider_that_asks_for_patience_gets_none_of_those_who_do_not_wait() -> None:
    """With QUEUE_POLICY_FALLBACK a 429 goes to the caller at once, so that a fallback takes the request."""
    async with running_remote(onCapacityExhausted="QUEUE_POLICY_FALLBACK") as rig:
        rig.provider.faults.add(Fault(Kind.STATUS, status=429))
        assert (await rig.refusal()).reason == "RATE_LIMITED"
        assert len(rig.provider.requests) == 1


async def test_those_who_leave_the_queue_are_never_asked_for() -> None:
    """Cancel, a client that leaves and a deadline each take a waiting request out of the queue (W17)."""
    async with running_remote(SLOW, workers=1) as rig:
        first = await occupied(rig)
        cancelled = rig.request("cancelled")
        ending = asyncio.create_task(rig.run(cancelled))
        left = rig.stub.Generate(rig.request("left"))
        late = asyncio.create_task(rig.run(rig.request("late"), timeout_s=0.3))
        await rig.until(lambda: rig.engine.dispatcher.waiting == 3)
        assert (await rig.stub.Cancel(pb.CancelRequest(request_id=cancelled.request_id))).found
        assert (await ending).reason == "CANCELLED"
        left.cancel()
        with pytest.raises(CaravanError) as raised:
            await late
        assert raised.value.reason == "DEADLINE_EXCEEDED"
        await rig.until(lambda: rig.engine.dispatcher.waiting == 0)
        first.cancel()
        await rig.idle()
        assert len(rig.provider.requests) == 1


async def test_a_request_whose_deadline_has_passed_is_never_sent() -> None:
    """Not even over a connection that is open, where nothing is waited for before it is (W17); so it costs nothing."""
    async with running_remote(Script(tokens=1), limits={"tokensPerMinute": 100_000}) as rig:
        await rig.run()
        await rig.idle()
        gate = rig.engine.endpoint.gate
        used = gate.status().tokens_used
        generate = rig.request()
        late = rig.engine.register(generate.request_id)
        rig.engine.submit(late, generate, 0.0, NoTracing().start("generate", None))
        await rig.until(lambda: late.outbox.ended)
        rig.engine.release(late, "ants", "deadline_exceeded")
        await rig.idle()
        update = await late.outbox.take()
        assert update.error is not None
        assert update.error.reason == "DEADLINE_EXCEEDED"
        assert len(rig.provider.requests) == 1
        assert gate.status().tokens_used == used
        assert not late.cost_nanousd


async def test_who_waits_to_try_again_holds_no_worker() -> None:
    """Between two attempts the worker serves others; the request comes back ahead of those who came after it (W22)."""
    retry = {"initialBackoff": "0.4s", "maxBackoff": "1s", "jitter": "JITTER_NONE", "budget": 1}
    async with running_remote(Script(tokens=1), workers=1, retry=retry) as rig:
        rig.provider.faults.add(Fault(Kind.STATUS, status=503))
        first = asyncio.create_task(rig.run(rig.request("first")))
        await rig.until(lambda: rig.sample("caravan_remote_retries_total") == 1)
        assert rig.engine.dispatcher.pool.busy == 0
        async with asyncio.timeout(0.3):
            await rig.run(rig.request("second"))
        await first
        asked = [request.json()["messages"][0]["content"] for request in rig.provider.requests]
        assert asked == ["first", "second", "first"]
        await rig.idle()


async def test_a_request_that_waits_to_try_again_can_be_cancelled() -> None:
    """Nothing is asked for any more, and nothing is held."""
    retry = {"initialBackoff": "30s", "budget": 1}
    async with running_remote(retry=retry) as rig:
        rig.provider.faults.add(Fault(Kind.STATUS, status=503))
        request = rig.request()
        ending = asyncio.create_task(rig.run(request))
        await rig.until(lambda: rig.sample("caravan_remote_retries_total") == 1)
        await rig.stub.Cancel(pb.CancelRequest(request_id=request.request_id))
        assert (await ending).reason == "CANCELLED"
        await rig.idle()
        assert len(rig.provider.requests) == 1


async def test_a_limit_is_waited_for() -> None:
    """With patience, requests beyond concurrent_requests go when others have ended; all of them are answered."""
    limits = {"concurrentRequests": 2}
    async with running_remote(Script(tokens=2, delay_s=0.05), workers=8, limits=limits) as rig:
        answers = await asyncio.gather(*(rig.run() for _ in range(8)))
        assert all(answer.reason == "STOP" for answer in answers)
        spans = [(request.started, request.ended or 0.0) for request in rig.provider.requests]
        starts = [start for start, _ in spans]
        # The provider ends a request a moment after its client has it.
        assert all(sum(a <= t < b - 0.01 for a, b in spans) <= 2 for t in starts)
        await rig.idle()


async def test_a_limit_counts_what_was_used() -> None:
    """What was reserved for the longest answer is given back; the limit holds what the provider counted."""
    async with running_remote(Script(tokens=5), limits={"tokensPerMinute": 100_000}) as rig:
        usage = (await rig.run()).usage
        await rig.idle()
        used = rig.engine.endpoint.gate.status().tokens_used
        assert used == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize(("status", "prompts"), [(400, 0), (429, 0), (500, 1)])
async def test_a_limit_counts_prompts_of_calls_that_may_have_begun(
    status: int, prompts: int
) -> None:
    """A refused request has cost the provider nothing, a failed one perhaps its prompt; the answer that never came is given back."""
    limits = {"tokensPerMinute": 100_000}
    async with running_remote(limits=limits, retry={"maxRetries": 0}) as rig:
        rig.provider.faults.add(Fault(Kind.STATUS, status=status))
        request = rig.request()
        await rig.refusal(request)
        await rig.idle()
        assert rig.engine.endpoint.gate.status().tokens_used == prompts * prompt_tokens(request)


async def test_a_breaker_that_opens_meanwhile_gives_the_limit_back() -> None:
    """Who waited for the limit while the provider failed is refused by the breaker, and holds no place of the limit."""
    async with running_remote(
        limits={"concurrentRequests": 1},
        breaker={"failureThreshold": 1, "openDuration": "60s"},
        retry={"maxRetries": 0},
    ) as rig:
        rig.provider.faults.add(Fault(Kind.STATUS, status=503, seconds=0.2, times=None))
        first = asyncio.create_task(rig.refusal())
        await rig.provider.wait_for_requests(1)
        second = asyncio.create_task(rig.refusal())
        assert (await first).reason == "PROVIDER_FAILED"
        assert (await second).reason == "CIRCUIT_OPEN"
        await rig.idle()


async def test_an_answer_of_any_length_holds_no_more_than_a_minute_of_the_limit() -> None:
    """Who asks for billions of tokens must not keep all others away for days."""
    async with running_remote(limits={"tokensPerMinute": 100_000}) as rig:
        rig.provider.faults.add(Fault(Kind.HANG))
        longest = rig.request()
        longest.stop.max_tokens = (1 << 31) - 1
        call = rig.stub.Generate(longest)
        await rig.provider.wait_for_requests(1)
        with pytest.raises(CaravanError) as raised:
            await rig.run(timeout_s=20)
        assert raised.value.metadata["limit"] == "tokens_per_minute"
        assert 20 < (raised.value.retry_after_s or 0) < 70
        call.cancel()
        await rig.idle()


async def test_a_limit_that_cannot_be_kept_in_time_is_told_at_once() -> None:
    """A request whose deadline is sooner than its turn gets the retry time instead of waiting in vain."""
    async with running_remote(Script(tokens=1), limits={"requestsPerMinute": 1}) as rig:
        await rig.run()
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(CaravanError) as raised:
            await rig.run(timeout_s=20)
        assert loop.time() - began < 5
        assert raised.value.reason == "RATE_LIMITED"
        assert raised.value.metadata["limit"] == "requests_per_minute"
        assert (raised.value.retry_after_s or 0) > 20
        await rig.idle()


async def test_a_drain_lets_answers_finish_and_ends_the_others() -> None:
    """What runs may finish within the grace; then what is left ends with DRAINING, also what waits; new ones are refused."""
    async with running_remote(Script(tokens=20, pace_s=0.01), workers=2) as rig:
        short = asyncio.create_task(rig.run())
        await rig.until(lambda: any(row.pieces for row in rig.engine.inflight.oldest_first()))
        rig.provider.script = SLOW
        long = asyncio.create_task(rig.refusal())
        await rig.provider.wait_for_requests(2)
        waiting = asyncio.create_task(rig.refusal())
        await rig.until(lambda: rig.engine.dispatcher.waiting == 1)
        rig.provider.faults.add(Fault(Kind.HANG, times=None))
        rig.engine.drain(1.0)
        assert (await rig.refusal()).reason == "DRAINING"
        assert rig.engine.load().phase == pb.ENGINE_PHASE_DRAINING
        assert (await short).reason == "STOP"
        assert (await long).reason == "DRAINING"
        assert (await waiting).reason == "DRAINING"
        async with asyncio.timeout(5):
            await rig.provider.requests[1].closed_by_client.wait()
        await rig.idle()
        assert rig.sample("caravan_engine_requests_moved_total") == 2
        rig.provider.faults.clear()
        rig.provider.script = Script(tokens=1)
        rig.engine.undrain()
        assert (await rig.run()).reason == "STOP"
