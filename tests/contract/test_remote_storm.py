"""Everything at once, by seed: faults, clients that leave, cancels, deadlines, breakers and keys that are set by hand.

Whatever happens, each request has one end, and at the end nothing is held: no worker, no permit, no place in the queue, no call of
the provider (I1, I6).
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from caravan.engine.v1 import engine_service_pb2 as pb
from caravan.engine.v1 import remote_service_pb2 as remote_pb

from services.dev.provider.faults import Fault, Kind
from services.dev.provider.script import Script
from services.engine.remote.breaker import State
from services.engine.remote.request import Request
from services.runtime.errors import from_rpc_error
from services.runtime.generate_events import each
from tests.support.remote import KEY, Answer, Rig, running_remote

OPTIONS: dict[str, Any] = {
    "workers": 6,
    "queueCapacity": 20,
    "retry": {"maxRetries": 2, "initialBackoff": "0.005s", "maxBackoff": "0.02s", "budget": 1},
    "breaker": {"failureThreshold": 4, "openDuration": "0.05s"},
    "timeouts": {"firstByte": "0.2s", "betweenBytes": "0.2s"},
    "limits": {"concurrentRequests": 5},
}
EXPECTED = {
    *("PROVIDER_FAILED", "PROVIDER_UNREACHABLE", "PROVIDER_TIMEOUT", "PROVIDER_REJECTED"),
    *("RATE_LIMITED", "CIRCUIT_OPEN", "CAPACITY_EXHAUSTED", "DEADLINE_EXCEEDED"),
    *("PROVIDER_UNAUTHORIZED", "CONTENT_FILTERED"),
}


@dataclass
class Storm:
    """One seed's chances."""

    rig: Rig
    rng: random.Random
    reasons: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)

    def fault(self) -> Fault:
        """Some misbehaviour."""
        return self.rng.choice(
            [
                Fault(Kind.STATUS, status=self.rng.choice([400, 401, 429, 500, 503])),
                Fault(Kind.STATUS, status=429, retry_after="0"),
                Fault(Kind.CUT, after=self.rng.choice([None, 0, 2])),
                Fault(Kind.HANG, after=self.rng.choice([None, 2])),
                Fault(Kind.GARBAGE, after=1),
                Fault(Kind.UNTERMINATED, after=2),
                Fault(Kind.DELAY_BODY, seconds=0.05),
                Fault(Kind.ERROR_EVENT, after=0, status=503),
            ]
        )

    async def request(self) -> None:
        """One request, to whatever end."""
        rig, rng = self.rig, self.rng
        request = rig.request(f"seed {rng.random()}")
        self.running.append(request.request_id)
        timeout_s = rng.choice([None, None, 0.05, 1.0])
        call = rig.stub.Generate(request, timeout=timeout_s)
        leaves_after = rng.choice([None, None, None, 0, 3])
        answer = Answer()
        try:
            events = 0
            async for event in each(call):
                answer.add(event)
                events += 1
                if events == leaves_after:
                    call.cancel()
                    self.reasons.append("left")
                    return
            self.reasons.append(answer.reason)
            if answer.reason == "STOP":
                assert answer.pieces == 6
        except asyncio.CancelledError:
            self.reasons.append("left")
        except grpc.aio.AioRpcError as error:
            self.reasons.append(from_rpc_error(error, service="engine").reason)
        finally:
            self.running.remove(request.request_id)

    async def meddle(self) -> None:
        """Something that a person, or the provider, does."""
        rig, rng = self.rig, self.rng
        match rng.randrange(5):
            case 0 | 1:
                rig.provider.faults.add(self.fault())
            case 2 if self.running:
                await rig.stub.Cancel(pb.CancelRequest(request_id=rng.choice(self.running)))
            case 3:
                modes = remote_pb.SetBreakerRequest
                asked = modes(mode=rng.choice([modes.MODE_AUTOMATIC, modes.MODE_OPEN]))
                if asked.mode == modes.MODE_OPEN:
                    asked.duration.FromMilliseconds(20)
                await rig.remote.SetBreaker(asked)
            case 4:
                await rig.remote.RotateCredential(remote_pb.RotateCredentialRequest(secret=KEY))


def count_admitted(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the requests that the engine admits from now on."""
    admitted: list[str] = []
    register = rig.engine.inflight.register

    def counted(request_id: str, now: float) -> Request:
        row = register(request_id, now)
        admitted.append(request_id)
        return row

    monkeypatch.setattr(rig.engine.inflight, "register", counted)
    return admitted


@pytest.mark.parametrize("seed", range(6))
async def test_a_storm_leaves_nothing_behind(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred requests, at most thirty at a time."""
    script = Script(tokens=6, pace_s=0.003)
    async with running_remote(script, **OPTIONS) as rig:
        storm = Storm(rig, random.Random(seed))
        admitted = count_admitted(rig, monkeypatch)
        gate = asyncio.Semaphore(30)

        async def one() -> None:
            async with gate:
                await storm.request()

        tasks = [asyncio.create_task(one()) for _ in range(100)]
        while not all(task.done() for task in tasks):
            await storm.meddle()
            await asyncio.sleep(storm.rng.random() * 0.02)
        await asyncio.gather(*tasks)
        assert len(storm.reasons) == 100
        assert set(storm.reasons) <= EXPECTED | {"left", "STOP", "CANCELLED"}, storm.reasons
        assert "STOP" in storm.reasons
        await rig.idle()
        await rig.until(lambda: all(r.done.is_set() for r in rig.provider.requests))
        rig.provider.faults.clear()
        breaker, clock = rig.engine.endpoint.breaker, rig.engine.endpoint.clock
        await rig.until(lambda: breaker.state(clock.monotonic()) is not State.OPEN)
        assert (await rig.run()).reason == "STOP"
        await rig.idle()
        (spent,) = rig.engine.endpoint.accounts.spend.report()
        assert spent.requests == len(admitted) > 20
