"""What becomes of requests when the provider fails: retries, the breaker, credentials, timeouts, and defects of ours."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from caravan.engine.v1 import remote_service_pb2 as remote_pb

from services.dev.provider.faults import Fault, Kind
from services.dev.provider.script import Script
from services.engine.remote.breaker import State
from services.runtime.errors import CaravanError
from tests.support.remote import KEY, Rig, running_remote

PROVIDERS = ("openai", "anthropic", "gemini")
OPENS_AT_ONCE: dict[str, Any] = {
    "breaker": {"failureThreshold": 1, "openDuration": "0.05s"},
    "retry": {"maxRetries": 0},
}


def state_of_breaker(rig: Rig) -> State:
    """How it stands now."""
    return rig.engine.endpoint.breaker.state(rig.engine.endpoint.clock.monotonic())


async def half_open(rig: Rig) -> None:
    """A failure opens the breaker of an engine with OPENS_AT_ONCE, and its time passes."""
    rig.provider.faults.add(Fault(Kind.STATUS, status=503))
    await rig.refusal()
    await rig.until(lambda: state_of_breaker(rig) is State.HALF_OPEN)


async def test_an_unpaid_bill_is_told_at_once() -> None:
    """It has the status of a rate limit, and no patience helps: one call, and no time to come back at."""
    async with running_remote(Script(tokens=3)) as rig:
        rig.provider.faults.add(Fault(Kind.STATUS, status=429, reason="quota", times=None))
        error = await rig.refusal()
        assert (error.reason, error.metadata["limit"]) == ("RATE_LIMITED", "insufficient_quota")
        assert error.retry_after_s is None
        assert len(rig.provider.requests) == 1


def attempts(rig: Rig, outcome: str) -> float:
    """Calls of the provider that ended so."""
    return rig.sample("caravan_remote_attempts_total", outcome=outcome)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    "fault",
    [
        Fault(Kind.STATUS, status=503, times=2),
        Fault(Kind.STATUS, status=429, times=2),
        Fault(Kind.CUT, times=2),
        Fault(Kind.EMPTY, times=2),
        Fault(Kind.CONTENT_TYPE, times=2),
    ],
    ids=lambda fault: f"{fault.kind.value}-{fault.status}",
)
async def test_failures_before_the_first_byte_are_tried_again(provider: str, fault: Fault) -> None:
    """The client sees one answer, and nothing of the two calls before it."""
    async with running_remote(Script(text="all is well"), provider=provider) as rig:
        rig.provider.faults.add(fault)
        answer = await rig.run()
        assert answer.text == "all is well"
        assert answer.reason == "STOP"
        assert len(rig.provider.requests) == 3
        assert rig.sample("caravan_remote_retries_total") == 2
        await rig.idle()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    "fault",
    [
        Fault(Kind.CUT, after=3),
        Fault(Kind.GARBAGE, after=3),
        Fault(Kind.OVERSIZED, after=3, size=1_200_000),
        Fault(Kind.ERROR_EVENT, after=3, status=503),
        Fault(Kind.UNTERMINATED, after=3),
    ],
    ids=lambda fault: fault.kind.value,
)
async def test_failures_after_the_first_byte_end_the_answer(provider: str, fault: Fault) -> None:
    """What has begun is never begun again: the text could come twice (W20). The end is one error."""
    async with running_remote(Script(tokens=10), provider=provider) as rig:
        rig.provider.faults.add(fault)
        error = await rig.refusal()
        assert error.reason in {"PROVIDER_UNREACHABLE", "PROVIDER_FAILED"}
        assert error.metadata["provider"] == provider
        assert error.retry_after_s is not None
        assert len(rig.provider.requests) == 1
        await rig.idle()
        assert rig.engine.endpoint.breaker.status(0).failures == 1
        assert (await rig.run()).pieces == 10


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(Kind.STATUS, status=400), "PROVIDER_REJECTED"),
        (Fault(Kind.STATUS, status=400, reason="context_length"), "CONTEXT_LENGTH_EXCEEDED"),
        (Fault(Kind.STATUS, status=400, reason="content_filter"), "CONTENT_FILTERED"),
        (Fault(Kind.STATUS, status=403), "PROVIDER_FORBIDDEN"),
        (Fault(Kind.STATUS, status=404), "PROVIDER_NOT_FOUND"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_does_not_pass_is_not_tried_again(fault: Fault, reason: str) -> None:
    """One call, one error of the table; the breaker does not mind."""
    async with running_remote() as rig:
        rig.provider.faults.add(fault)
        error = await rig.refusal()
        assert error.reason == reason
        is_unknown = reason == "PROVIDER_NOT_FOUND"
        assert error.metadata.get("model") == ("gpt-4o-mini" if is_unknown else None)
        assert len(rig.provider.requests) == 1
        await rig.idle()
        assert rig.engine.endpoint.breaker.status(0).failures == 0
        assert rig.sample("caravan_remote_requests_total", outcome=reason.lower()) == 1


async def test_a_retry_time_is_kept_or_told() -> None:
    """Retry-After within the longest backoff is waited for; beyond it the caller gets it at once, with the error."""
    retry = {"initialBackoff": "0.01s", "maxBackoff": "2s", "budget": 1}
    async with running_remote(retry=retry) as rig:
        rig.provider.faults.add(Fault(Kind.STATUS, status=429, retry_after="1"))
        await rig.run()
        first, second = rig.provider.requests
        assert second.started - first.started >= 0.99
        rig.provider.faults.add(Fault(Kind.STATUS, status=429, retry_after="30"))
        error = await rig.refusal()
        assert error.reason == "RATE_LIMITED"
        assert error.retry_after_s == 30
        assert len(rig.provider.requests) == 3


async def test_retries_have_a_budget() -> None:
    """All requests together try again as often as the budget allows, so that a storm of failures is not multiplied."""
    retry = {"initialBackoff": "0.001s", "maxBackoff": "0.001s", "budget": 0}
    async with running_remote(retry=retry, breaker={"failureThreshold": 0}, workers=20) as rig:
        rig.provider.faults.add(Fault(Kind.STATUS, status=500, times=None))
        await asyncio.gather(*(rig.refusal() for _ in range(20)))
        assert len(rig.provider.requests) == 20 + 10


async def test_requests_earn_retries() -> None:
    """Beyond the ten at the start there is one for each first call: here, because each may earn a whole one."""
    retry = {"initialBackoff": "0.001s", "maxBackoff": "0.001s", "budget": 1, "maxRetries": 1}
    async with running_remote(retry=retry, breaker={"failureThreshold": 0}, workers=20) as rig:
        rig.provider.faults.add(Fault(Kind.STATUS, status=500, times=None))
        await asyncio.gather(*(rig.refusal() for _ in range(20)))
        assert len(rig.provider.requests) == 20 + 20


async def test_who_meets_an_open_breaker_waits_for_no_limit() -> None:
    """The refusal comes at once, so that a fallback can serve, also where the limit is used up."""
    async with running_remote(Script(tokens=1), limits={"requestsPerMinute": 1}) as rig:
        await rig.run()
        rig.engine.endpoint.breaker.force_open(rig.engine.endpoint.clock.monotonic(), None)
        async with asyncio.timeout(5):
            assert (await rig.refusal()).reason == "CIRCUIT_OPEN"
        await rig.idle()


async def test_a_probe_that_is_answered_closes_the_breaker_before_its_end() -> None:
    """A long answer must not keep all others away while it runs: its first byte shows that the provider is back."""
    async with running_remote(Script(tokens=2), **OPENS_AT_ONCE) as rig:
        await half_open(rig)
        pause = rig.provider.faults.add(Fault(Kind.PAUSE, after=1, seconds=60, times=None))
        probe = rig.stub.Generate(rig.request())
        await rig.until(lambda: any(row.pieces for row in rig.engine.inflight.oldest_first()))
        assert state_of_breaker(rig) is State.CLOSED
        rig.provider.faults.remove(pause)
        assert (await rig.run()).pieces == 2
        probe.cancel()
        await rig.idle()


async def test_the_breaker_opens_tries_singly_and_closes() -> None:
    """At the threshold no more calls are made; then one at a time tries; one answer closes it again."""
    options: dict[str, Any] = {
        "breaker": {"failureThreshold": 3, "openDuration": "0.3s"},
        "retry": {"maxRetries": 0},
    }
    async with running_remote(Script(tokens=5, delay_s=0.1), workers=16, **options) as rig:
        rig.provider.faults.add(Fault(Kind.STATUS, status=503, times=None))
        for _ in range(3):
            assert (await rig.refusal()).reason == "PROVIDER_FAILED"
        error = await rig.refusal()
        assert error.reason == "CIRCUIT_OPEN"
        assert error.retry_after_s is not None
        assert 0 < error.retry_after_s <= 0.3
        assert len(rig.provider.requests) == 3
        breaker, clock = rig.engine.endpoint.breaker, rig.engine.endpoint.clock
        await rig.until(lambda: breaker.state(clock.monotonic()) is State.HALF_OPEN)
        rig.provider.faults.clear()
        refused = await asyncio.gather(*(rig.run() for _ in range(8)), return_exceptions=True)
        assert len(rig.provider.requests) == 4
        reasons = [error.reason for error in refused if isinstance(error, CaravanError)]
        assert reasons == ["CIRCUIT_OPEN"] * 7
        assert breaker.state(clock.monotonic()) is State.CLOSED
        await asyncio.gather(*(rig.run() for _ in range(8)))
        assert rig.sample("caravan_remote_breaker_transitions_total", state="open") == 1
        assert rig.sample("caravan_remote_breaker_transitions_total", state="closed") == 1
        await rig.idle()


async def test_a_probe_that_is_cancelled_gives_its_place_back() -> None:
    """A client that leaves while its request tries the provider does not keep others from trying (W23)."""
    async with running_remote(Script(tokens=5), **OPENS_AT_ONCE) as rig:
        await half_open(rig)
        hang = rig.provider.faults.add(Fault(Kind.HANG, times=None))
        call = rig.stub.Generate(rig.request())
        await rig.provider.wait_for_requests(2)
        call.cancel()
        await rig.idle()
        assert state_of_breaker(rig) is State.HALF_OPEN  # Nothing was found out.
        rig.provider.faults.remove(hang)
        assert (await rig.run()).pieces == 5


async def test_a_hundred_refused_credentials_are_one_reading(tmp_path: Path) -> None:
    """A key that was replaced in its file: all hundred requests are refused, one of them reads the file, and all succeed."""
    path = tmp_path / "key"
    path.write_text(KEY)
    async with running_remote(
        Script(tokens=3, delay_s=0.05), credential={"file": str(path)}, workers=100
    ) as rig:
        await rig.run()
        path.write_text("sk-test-second-0123456789")
        rig.provider.accepted_keys = {"sk-test-second-0123456789"}
        before = rig.engine.endpoint.credentials.snapshot.generation
        answers = await asyncio.gather(*(rig.run() for _ in range(100)))
        assert all(answer.reason == "STOP" for answer in answers)
        assert rig.engine.endpoint.credentials.snapshot.generation == before + 1
        assert rig.sample("caravan_remote_retries_total") == 0
        await rig.idle()


async def test_a_credential_that_stays_refused_is_tried_twice() -> None:
    """After one rebuild the error goes to the caller, who is not told anything of the key; the operator must act."""
    async with running_remote() as rig:
        rig.provider.accepted_keys = {"another"}
        error = await rig.refusal()
        assert error.reason == "PROVIDER_UNAUTHORIZED"
        assert len(rig.provider.requests) == 2
        await rig.idle()


async def test_without_a_credential_nothing_is_served_until_there_is_one() -> None:
    """A variable that is not set is the engine's failure, which a rotation heals."""
    async with running_remote(environ={}) as rig:
        load = rig.engine.load()
        assert "env PROVIDER_KEY" in load.failure
        assert (await rig.refusal()).reason == "PROVIDER_UNAUTHORIZED"
        assert not rig.provider.requests
        await rig.remote.RotateCredential(remote_pb.RotateCredentialRequest(secret=KEY))
        assert (await rig.run()).reason == "STOP"
        assert not rig.engine.load().failure


async def test_a_file_that_appears_heals_an_engine_without_a_credential(tmp_path: Path) -> None:
    """It is looked for while nobody asks: a secret may be mounted after the engine has started."""
    path = tmp_path / "key"
    async with running_remote(credential={"file": str(path)}) as rig:
        assert (await rig.refusal()).reason == "PROVIDER_UNAUTHORIZED"
        path.write_text(KEY)
        await rig.until(lambda: not rig.engine.load().failure)
        assert (await rig.run()).reason == "STOP"


@pytest.mark.parametrize(
    ("fault", "timeouts", "phase", "calls"),
    [
        (Fault(Kind.HANG), {"firstByte": "0.2s"}, "first_byte", 1),
        (Fault(Kind.DELAY_BODY, seconds=30), {"firstByte": "0.2s"}, "first_byte", 1),
        (Fault(Kind.HANG, after=2), {"betweenBytes": "0.2s"}, "between_bytes", 1),
        (Fault(Kind.PAUSE, after=1, seconds=0.1), {"total": "0.35s"}, "total", 1),
    ],
    ids=["first_byte", "first_byte_of_body", "between_bytes", "total"],
)
async def test_each_phase_has_its_time(
    fault: Fault, timeouts: dict[str, str], phase: str, calls: int
) -> None:
    """A provider that hangs is left at the limit of what was waited for, and sees the connection close (W28)."""
    options: dict[str, Any] = {"timeouts": timeouts, "retry": {"maxRetries": 0}}
    async with running_remote(Script(tokens=100), **options) as rig:
        rig.provider.faults.add(fault)
        error = await rig.refusal()
        assert error.reason == "PROVIDER_TIMEOUT"
        assert error.metadata["waited_for"] == phase
        assert 150 <= int(error.metadata["elapsed_ms"]) < 5000
        # The limit is told as it was configured.
        assert error.message.endswith(" in time." if phase == "total" else " within 0.2 s.")
        async with asyncio.timeout(5):
            await rig.provider.requests[0].closed_by_client.wait()
        assert len(rig.provider.requests) == calls
        await rig.idle()
        assert rig.engine.endpoint.breaker.status(0).failures == 1


async def test_what_failed_stands_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Also where a retry helps, so that a client sees nothing of it; once for the three calls that failed."""
    async with running_remote() as rig:
        rig.provider.faults.add(Fault(Kind.STATUS, status=503, times=3))
        assert (await rig.run()).reason == "STOP"
        rig.provider.faults.add(Fault(Kind.STATUS, status=400))
        await rig.refusal()
    told = [line for line in caplog.messages if line.startswith("a call failed")]
    assert told == ["a call failed: provider_failed: OpenAI says: scripted failure"]


async def test_a_provider_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody listens: an error that can be tried again, after the retries. Where, is for the operator alone."""
    async with running_remote(baseUrl="http://127.0.0.1:9/v1") as rig:
        error = await rig.refusal()
        assert error.reason == "PROVIDER_UNREACHABLE"
        assert error.message == "OpenAI cannot be reached."
        assert rig.sample("caravan_remote_retries_total") == 3
        await rig.idle()
    assert "cannot be reached. ([Errno 111]" in caplog.text


async def test_the_time_of_all_attempts_bounds_retries() -> None:
    """A wait that would pass the total time is not begun."""
    options: dict[str, Any] = {
        "timeouts": {"total": "0.3s"},
        "retry": {"initialBackoff": "10s", "maxBackoff": "20s"},
    }
    async with running_remote(**options) as rig:
        rig.provider.faults.add(Fault(Kind.STATUS, status=503))
        assert (await rig.refusal()).reason == "PROVIDER_FAILED"
        assert len(rig.provider.requests) == 1


async def test_a_worker_that_crashes_is_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A defect of ours ends its request once, with INTERNAL; all that it held is free again (W16)."""
    async with running_remote(workers=1) as rig:
        wire = rig.engine.endpoint.wire

        def broken() -> Any:
            raise RuntimeError("a defect")

        with monkeypatch.context() as patch:
            patch.setattr(type(wire), "reader", lambda _: broken())
            assert (await rig.refusal()).reason == "INTERNAL"
        assert "worker-0 crashed" in caplog.text
        await rig.idle()
        assert rig.engine.dispatcher.pool.replaced == 1
        assert rig.sample("caravan_remote_workers_replaced_total") == 1
        assert (await rig.run()).reason == "STOP"
