"""The gate: in order, within the deadline, and every permit given back on every path. The clock is real, the limits are fast."""

from __future__ import annotations

import asyncio

import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.engine.v1.remote_options_pb2 import RateLimits

from services.engine.remote.failure import Failure, ProviderError
from services.engine.remote.rate_gate import RateGate, RatePermit, open_rate_gate
from services.runtime.clock import SystemClock
from services.runtime.rate_limiter import burst_of

FAST = 12_000  # One every 5 ms.
SLOW = 6


def gate(
    *, requests_per_minute: int = 0, tokens_per_minute: int = 0, concurrent_requests: int = 0
) -> RateGate:
    """The gate of an engine without a coordinator."""
    limits = RateLimits(
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrent_requests=concurrent_requests,
    )
    return open_rate_gate(limits, "key", "life", SystemClock(), None)


async def use_up(one: RateGate, per_minute: int) -> None:
    """Lets a burst through."""
    for _ in range(int(burst_of(per_minute))):
        (await one.enter(0, None, patience=False)).settle(None)


async def limited(one: RateGate, remaining_s: float | None, patience: bool) -> ProviderError:
    """The error of one that must not go."""
    with pytest.raises(ProviderError) as caught:
        await one.enter(0, remaining_s, patience)
    assert caught.value.failure is Failure.RATE_LIMITED
    assert caught.value.retry_after_s is not None
    return caught.value


async def test_who_may_not_wait_is_refused_with_the_time() -> None:
    """The error names the limit and when to come again (W27)."""
    one = gate(requests_per_minute=SLOW)
    await use_up(one, SLOW)
    error = await limited(one, None, patience=False)
    assert error.metadata == {"limit": "requests_per_minute"}
    assert error.retry_after_s == pytest.approx(10.0, abs=0.5)


async def test_who_cannot_go_within_its_time_is_refused_at_once() -> None:
    """Nobody waits in vain: also those in line are counted."""
    one = gate(requests_per_minute=SLOW)
    await use_up(one, SLOW)
    async with asyncio.timeout(1.0):
        assert (await limited(one, 5.0, patience=True)).retry_after_s == pytest.approx(10, abs=0.5)
        waiting = asyncio.create_task(one.enter(0, 11.0, patience=True))
        await asyncio.sleep(0)
        assert (await limited(one, 11.0, patience=True)).retry_after_s == pytest.approx(20, abs=0.5)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert one.status().concurrent_requests == 0


async def test_those_who_wait_go_in_their_order() -> None:
    """First come, first served, and all of them within the limit's pace."""
    one, order = gate(requests_per_minute=FAST), list[int]()
    await use_up(one, FAST)

    async def enter(number: int) -> None:
        permit = await one.enter(0, 10.0, patience=True)
        order.append(number)
        permit.settle(0)

    began = asyncio.get_running_loop().time()
    async with asyncio.timeout(10.0):
        await asyncio.gather(*(enter(number) for number in range(20)))
    assert order == list(range(20))
    assert asyncio.get_running_loop().time() - began >= 19 * 0.005


async def test_one_that_leaves_the_line_does_not_hold_up_the_others() -> None:
    """A cancelled request, the first or another, takes nothing with it (I5, I6)."""
    one = gate(concurrent_requests=1)
    held = await one.enter(0, None, patience=True)
    tasks = [asyncio.create_task(one.enter(0, None, patience=True)) for _ in range(3)]
    for _ in range(3):
        await asyncio.sleep(0)
    tasks[0].cancel()
    tasks[1].cancel()
    held.settle(None)
    async with asyncio.timeout(5.0):
        last = await tasks[2]
    assert one.status().concurrent_requests == 1
    last.settle(None)
    assert one.status().concurrent_requests == 0
    assert [task.cancelled() for task in tasks[:2]] == [True, True]


@pytest.mark.parametrize("patience", [True, False])
async def test_a_cancelled_task_leaves_no_permit_behind(patience: bool) -> None:
    """Whenever it is cancelled, also in the moment of its turn, the place is free again afterwards."""
    one = gate(concurrent_requests=1)
    for steps in range(8):
        held = await one.enter(0, None, patience=True)
        task = asyncio.create_task(one.enter(0, None, patience))
        for step in range(steps):
            await asyncio.sleep(0)
            if step == 3:
                held.settle(None)
        task.cancel()
        (ended,) = await asyncio.gather(task, return_exceptions=True)
        held.settle(None)
        if isinstance(ended, RatePermit):
            ended.settle(None)
        assert one.status().concurrent_requests == 0
        async with asyncio.timeout(5.0):
            (await one.enter(0, 2.0, patience=True)).settle(None)


async def test_the_time_of_one_in_line_can_run_out() -> None:
    """Nobody knows when a place becomes free; at the deadline the request is refused, not forgotten."""
    one = gate(concurrent_requests=1)
    held = await one.enter(0, None, patience=True)
    async with asyncio.timeout(5.0):
        errors = await asyncio.gather(*(limited(one, 0.05, patience=True) for _ in range(3)))
    assert {error.metadata["limit"] for error in errors} == {"concurrent_requests"}
    held.settle(None)


async def test_a_permit_ends_once() -> None:
    """Whatever else is said of it afterwards changes nothing."""
    one = gate(tokens_per_minute=60_000, concurrent_requests=2)
    first, second = [await one.enter(1000, None, patience=True) for _ in range(2)]
    first.settle(100)
    first.settle(100_000)
    first.throttled(60.0)
    first.withdraw()
    status = one.status()
    assert (status.concurrent_requests, status.tokens_used, status.requests_used) == (1, 1100, 2)
    second.settle(None)
    assert one.status().tokens_used == 1100
    async with asyncio.timeout(5.0):
        (await one.enter(100, None, patience=True)).withdraw()


async def test_a_429_stops_all_for_the_time_that_the_provider_names() -> None:
    """And the refusal says that it was the provider."""
    one = gate()
    (await one.enter(0, None, patience=True)).throttled(30.0)
    error = await limited(one, 1.0, patience=True)
    assert error.metadata == {"limit": "provider"}
    assert error.retry_after_s == pytest.approx(30.0, abs=0.5)
    assert one.status().retry_after.ToMilliseconds() == pytest.approx(30_000, abs=500)


async def test_the_news_of_others_change_the_share() -> None:
    """Through the gate as through the engine's report: counters go out, those of others come in."""
    one = open_rate_gate(
        RateLimits(requests_per_minute=600),
        "key",
        "mine",
        SystemClock(),
        StubThatIsNotCalled(),  # type: ignore[arg-type]
    )
    assert one.status().requests_per_minute == pytest.approx(60)
    (told,) = one.counters()
    assert (told.key, told.incarnation, told.requests) == ("key", "mine", 0)
    one.merge([])
    assert one.status().requests_per_minute == pytest.approx(600)
    one.merge([pb.LimitCounter(key="key", incarnation="other", epoch=told.epoch)])
    assert one.status().requests_per_minute == pytest.approx(300)
    (await one.enter(7, None, patience=True)).settle(5)
    told = one.counters()[-1]
    assert (told.requests, told.tokens, told.wanted_requests, told.wanted_tokens) == (1, 7, 1, 7)


async def test_where_nothing_is_limited_nothing_is_shared() -> None:
    """Nobody is asked and nothing is reported, whatever the mode."""
    one = open_rate_gate(
        RateLimits(strict=True),
        "key",
        "mine",
        SystemClock(),
        StubThatIsNotCalled(),  # type: ignore[arg-type]
    )
    permits = [await one.enter(10**9, None, patience=False) for _ in range(100)]
    assert one.counters() == []
    assert one.status().concurrent_requests == len(permits)


class StubThatIsNotCalled:
    """A coordinator's stub for the approximate mode, which makes no calls."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(name)
