"""Deployments that get no answer of their provider, as clients of the gateway see them: a fallback, or one error (S1.31, I1)."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from caravan.coordinator.v1 import deployment_pb2, deployment_service_pb2
from caravan.core.v1 import chat_pb2
from caravan.inference.v1 import inference_service_pb2 as pb

from services.runtime.errors import CaravanError, from_rpc_error
from tests.support.coordinator import EnginePeer, running_coordinator, until
from tests.support.gateway import Rig, error_of, openai_error, running
from tests.support.gateway_peers import FakeEngine, Step, hang, started
from tests.support.remote_answers import GOOD, failure

PROMPT = chat_pb2.ChatPrompt(messages=[chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content="hi")])
CHAIN = ("demo", "spare", "last")
UNSURE = ["PROVIDER_FAILED", "PROVIDER_UNREACHABLE", "PROVIDER_TIMEOUT"]
SURE = [
    "RATE_LIMITED",
    "CIRCUIT_OPEN",
    "PROVIDER_UNAUTHORIZED",
    "PROVIDER_FORBIDDEN",
    "PROVIDER_NOT_FOUND",
]


@asynccontextmanager
async def chained(*scripts: Sequence[Step], **settings: Any) -> AsyncIterator[Rig]:
    """A gateway, and a chain of deployments that play a script each."""
    engines = [FakeEngine(script) for script in scripts]
    async with running(engines=engines, **settings) as rig:
        rig.coordinator.chain = CHAIN[: len(scripts)]
        yield rig


async def _content(rig: Rig, **fields: Any) -> str:
    answer = json.loads(await rig.chat_bytes(**fields))
    return str(answer["choices"][0]["message"]["content"])


def _calls(rig: Rig) -> list[int]:
    return [len(engine.requests) for engine in rig.coordinator.engines]


async def _refused(call: Any) -> CaravanError:
    return from_rpc_error(await error_of(call), service="gateway")


@pytest.mark.parametrize("reason", SURE + UNSURE)
async def test_a_fallback_answers(reason: str) -> None:
    """The client notices nothing but the header; the coordinator is told which deployment failed and why."""
    async with chained([failure(reason)], GOOD) as rig:
        call = rig.chat()
        answer = json.loads((await call.read()).body.data)
        assert answer["choices"][0]["message"]["content"] == "Hello"
        assert dict(await call.initial_metadata())["x-caravan-deployment"] == "spare"
        await rig.idle()
        first, second = rig.coordinator.routes
        assert (first.may_fall_back, list(first.failed)) == (True, [])
        assert (second.model, second.may_fall_back, second.resumed) == ("demo", True, False)
        (told,) = second.failed
        expected = {"RATE_LIMITED", "CIRCUIT_OPEN"} & {reason} or {"UNAVAILABLE"}
        why = deployment_pb2.FallbackReason.Name(told.reason).removeprefix("FALLBACK_REASON_")
        assert (told.name, {why}) == ("demo", expected)
        assert rig.sample("caravan_fallbacks_total", reason=why.lower()) == 1
        assert rig.coordinator.outcomes[-1] == "FINISHED"
        assert rig.count("finished") == 1


@pytest.mark.parametrize("reason", SURE)
async def test_what_must_not_run_twice_may_be_refused_twice(reason: str) -> None:
    """A provider that has said no has not begun, so that another one may."""
    async with chained([failure(reason)], GOOD) as rig:
        rig.coordinator.idempotent = False
        assert await _content(rig) == "Hello"


@pytest.mark.parametrize("reason", UNSURE)
async def test_what_must_not_run_twice_does_not(reason: str) -> None:
    """A provider that said nothing may have begun."""
    async with chained([failure(reason)], GOOD) as rig:
        rig.coordinator.idempotent = False
        assert (await _refused(rig.chat())).reason == reason
        await rig.idle()
        assert _calls(rig) == [1, 0]
        assert len(rig.coordinator.routes) == 1


@pytest.mark.parametrize(
    "reason", ["CONTENT_FILTERED", "CONTEXT_LENGTH_EXCEEDED", "PROVIDER_REJECTED"]
)
async def test_what_the_request_is_to_blame_for_is_told(reason: str) -> None:
    """Nobody else is asked."""
    async with chained([failure(reason)], GOOD) as rig:
        assert (await _refused(rig.chat())).reason == reason
        assert _calls(rig) == [1, 0]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_first_error_where_none_takes_it(stream: bool) -> None:
    """With its words, its retry time and the name of its deployment, whatever the others said."""
    first, second = failure("RATE_LIMITED", "Slow down."), failure("CIRCUIT_OPEN", "Too bad.")
    async with chained([first], [second]) as rig:
        error = await error_of(rig.chat(stream=stream))
        assert openai_error(error)["message"] == "Slow down."
        assert openai_error(error)["code"] == "rate_limit_exceeded"
        trailing = dict(error.trailing_metadata() or ())
        assert trailing["retry-after"] == "3"
        assert trailing["x-caravan-deployment"] == "demo"
        await rig.idle()
        assert [len(route.failed) for route in rig.coordinator.routes] == [0, 1, 2]
        assert rig.count("refused") == 1
        typed = await _refused(rig.inference.Chat(pb.ChatRequest(model="demo", prompt=PROMPT)))
        assert (typed.reason, typed.retry_after_s) == ("RATE_LIMITED", 3.0)
        assert typed.metadata == {"provider": "openai"}


@pytest.mark.parametrize(
    "reason",
    ["UNSUPPORTED_FIELD", "CONTEXT_LENGTH_EXCEEDED", "DECODE_FAILED", "CAPACITY_EXHAUSTED"],
)
async def test_the_first_error_where_the_fallback_cannot(reason: str) -> None:
    """A local model that cannot see, say: the client knows nothing of it, and can come back to the other."""
    async with chained([failure("RATE_LIMITED")], [failure(reason)], migrations_max=1) as rig:
        assert (await _refused(rig.chat())).reason == "RATE_LIMITED"
        await rig.idle()
        assert not rig.coordinator.held


async def test_an_error_after_the_first_piece_is_the_end() -> None:
    """What the client has of the answer is of that provider."""
    async with chained([*GOOD[:2], failure("PROVIDER_UNREACHABLE")], GOOD) as rig:
        assert (await _refused(rig.chat(stream=True))).reason == "PROVIDER_UNREACHABLE"
        await rig.idle()
        assert _calls(rig) == [1, 0]


async def test_a_start_alone_binds_nobody() -> None:
    """The client sees one start, and at the end what the deployment that answered has used."""
    begun: list[Step] = [started(prompt_tokens=7, cached_tokens=5), failure("PROVIDER_FAILED")]
    async with chained(begun, GOOD) as rig:
        call = rig.inference.Chat(pb.ChatRequest(model="demo", prompt=PROMPT))
        events = [event async for event in call]
        assert [e.WhichOneof("event") for e in events] == ["started", "delta", "finished"]
        assert events[-1].finished.usage.cached_tokens == 1
        assert events[-1].finished.usage.prompt_tokens == 3


async def test_the_start_is_that_of_who_answers() -> None:
    """A provider that was asked and has said nothing yet is not named to anybody."""
    called = started(prompt_tokens=0)
    async with chained([called, failure("PROVIDER_FAILED")], GOOD) as rig:
        call = rig.inference.Chat(pb.ChatRequest(model="demo", prompt=PROMPT))
        events = [event async for event in call]
        assert [e.WhichOneof("event") for e in events] == ["started", "delta", "finished"]
        assert events[0].started.engine_id == "engine-2"
        assert dict(await call.initial_metadata())["x-caravan-deployment"] == "spare"


async def test_the_fallback_is_lost() -> None:
    """An engine of it that dies before it has said anything is replaced, by the rules of its own deployment."""
    engines = [FakeEngine([failure("RATE_LIMITED")]), FakeEngine([hang])]
    async with running(engines=engines) as rig:
        rig.coordinator.chain = CHAIN[:2]
        asking = asyncio.create_task(_content(rig))
        await until(lambda: bool(engines[1].requests))
        again = FakeEngine(GOOD)
        await again.start()
        rig.coordinator.engines[1] = again
        await engines[1].kill()
        assert await asking == "Hello"
        await rig.idle()
        last = rig.coordinator.routes[-1]
        assert (last.model, last.resumed, len(last.failed)) == ("demo", True, 1)
        assert rig.migrations("ENGINE_LOST", "moved") == 1
        await again.kill()


async def test_a_client_that_leaves_while_the_fallback_is_asked_for() -> None:
    """Nothing is left, and the fallback is not asked."""
    asked = asyncio.Event()

    async def first() -> None:
        return

    async def second() -> None:
        asked.set()
        await until(lambda: not len(rig.gateway.sessions))

    async with chained([failure("RATE_LIMITED")], GOOD) as rig:
        rig.coordinator.refusals = [first, second]
        call = rig.chat(stream=True)
        await asyncio.wait_for(asked.wait(), 10)
        call.cancel()
        await rig.idle()
        assert _calls(rig) == [1, 0]
        assert rig.coordinator.outcomes == ["REFUSED", "CANCELLED"]
        assert rig.count("cancelled") == 1


async def test_a_cancel_comes_first() -> None:
    """A request that is ended while it waits for the fallback was not refused."""

    async def first() -> None:
        return

    cancelled = CaravanError("CANCELLED", "The request was cancelled.")
    async with chained([failure("RATE_LIMITED")], GOOD) as rig:
        rig.coordinator.refusals = [first, cancelled]
        assert (await _refused(rig.chat())).reason == "CANCELLED"
        await rig.idle()
        assert rig.count("cancelled") == 1


@pytest.mark.parametrize("number", range(3))
async def test_every_request_ends_once(number: int) -> None:
    """Whatever the deployments of a chain say, in any order, each request has one end (I1). The number is the seed."""
    rng = random.Random(number)
    reasons = [*SURE, *UNSURE, "DRAINING", "CAPACITY_EXHAUSTED", "PROVIDER_REJECTED"]
    wild = _Wild(rng, reasons)
    engines = [_WildEngine(wild) for _ in CHAIN]
    async with running(engines=engines, migrations_max=2) as rig:
        rig.coordinator.chain = CHAIN

        async def one() -> str:
            body = b""
            try:
                async for part in rig.chat(stream=True):
                    body += part.body.data
            except Exception as error:
                told = from_rpc_error(error, service="gateway")  # type: ignore[arg-type]
                assert told.reason in reasons, told
                assert b"[DONE]" not in body
                return "error"
            assert body.count(b"[DONE]") == body.count(b'"finish_reason":"stop"') == 1
            assert body.count(b'"content":"Hello"') == 1
            return "answer"

        ends = await asyncio.gather(*(one() for _ in range(60)))
        assert set(ends) == {"answer", "error"}, "the seed is of no use"
        await rig.idle()
        assert sum(rig.count(outcome) for outcome in ("finished", "refused", "failed")) == 60
        released = [lease_id for lease_id, _ in rig.coordinator.releases]
        assert len(released) == len(set(released))
        # One lease for each deployment, and for each move.
        assert len(released) <= 60 * (len(CHAIN) + 2)


@asynccontextmanager
async def _deployed(
    reasons: Sequence[deployment_pb2.FallbackReason.ValueType], *scripts: Sequence[Step]
) -> AsyncIterator[Rig]:
    """A real coordinator, whose clock stands still: what waits there waits for ever.

    The engines of `demo` play all scripts but the last, `spare` plays that; it is the fallback of `demo` for these reasons.
    """
    engines = [FakeEngine(script) for script in scripts]
    async with AsyncExitStack() as stack:
        coordinator = await stack.enter_async_context(running_coordinator())
        for name, fallback in (
            ("spare", []),
            ("demo", [deployment_pb2.Fallback(deployment="spare", reasons=reasons)]),
        ):
            deployment = deployment_pb2.Deployment(
                name=name, model=f"/{name}.gguf", replicas=0, fallback=fallback
            )
            apply = deployment_service_pb2.ApplyDeploymentsRequest(deployments=[deployment])
            await coordinator.deployments.ApplyDeployments(apply, timeout=10)
        peers = running(engines=engines, coordinator=coordinator.address)
        rig = await stack.enter_async_context(peers)
        for number, engine in enumerate(engines):
            if engine.script:
                model = "spare" if number == len(engines) - 1 else "demo"
                peer = EnginePeer(coordinator.stub, f"engine-{number}", model, engine.address)
                await peer.join()
                stack.push_async_callback(peer.leave)
        yield rig
        await until(lambda: len(coordinator.state.leases) == 0)


RATE = deployment_pb2.FALLBACK_REASON_RATE_LIMITED


async def test_the_coordinator_finds_the_fallback() -> None:
    """The one that is for the reason."""
    async with _deployed([RATE], [failure("RATE_LIMITED")], GOOD) as rig:
        assert await _content(rig) == "Hello"


async def test_a_fallback_for_another_reason_is_none() -> None:
    """The client hears at once what the provider said, and does not wait for it to change its mind."""
    async with _deployed([RATE], [failure("CIRCUIT_OPEN")], GOOD) as rig:
        assert (await _refused(rig.chat())).reason == "CIRCUIT_OPEN"


async def test_nobody_waits_for_a_fallback_without_engines() -> None:
    """Nor does a request that has moved before, and would wait for an engine of its own deployment."""
    moves = [CaravanError("DRAINING", "Going.", retry_after_s=1.0)]
    async with _deployed([RATE], moves, [failure("RATE_LIMITED")], []) as rig:
        # Both engines of the deployment are asked, in either order; the second time neither is.
        for _ in range(4):
            assert (await _refused(rig.chat())).reason == "RATE_LIMITED"


class _Wild:
    """Draws what becomes of each call."""

    def __init__(self, rng: random.Random, reasons: list[str]) -> None:
        self._rng, self._reasons = rng, reasons

    def script(self) -> list[Step]:
        script: list[Step] = list(GOOD)
        if self._rng.random() < 0.8:
            cut = self._rng.choice([0, 0, 1, 2])
            script[cut:] = [failure(self._rng.choice(self._reasons))]
        return script


class _WildEngine(FakeEngine):
    """Plays another script each time."""

    def __init__(self, wild: _Wild) -> None:
        super().__init__()
        self._wild = wild

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.script = self._wild.script()
        async for event in super().Generate(request, context):
            yield event
