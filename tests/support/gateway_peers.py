"""The peers of a gateway, scripted by a test: engines and a coordinator on loopback ports."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from caravan.coordinator.v1 import coordinator_service_pb2 as coordinator_pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as coordinator_grpc
from caravan.core.v1 import generation_pb2, scheduling_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from caravan.engine.v1 import engine_service_pb2_grpc as engine_grpc

from services.runtime.errors import CaravanError
from services.runtime.server import ServiceServer, cancel_all

Event = engine_pb.GenerateResponse
KEY = bytes(range(32))
_LIVES = itertools.count(1)
Step = Event | CaravanError | Callable[[], Awaitable[None]]


def started(prompt_tokens: int = 3, cached_tokens: int = 1) -> Event:
    """The first event."""
    return Event(
        started=engine_pb.Started(prompt_tokens=prompt_tokens, cached_tokens=cached_tokens)
    )


def delta(text: str, **fields: Any) -> Event:
    """Some tokens; as many ids as the text has words."""
    ids = fields.pop("token_ids", range(len(text.split()) or 1))
    return Event(delta=engine_pb.Delta(text=text, token_ids=ids, **fields))


def finished(
    reason: generation_pb2.FinishReason.ValueType = generation_pb2.FINISH_REASON_STOP,
    **fields: Any,
) -> Event:
    """The last event."""
    usage = generation_pb2.Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
    return Event(finished=engine_pb.Finished(reason=reason, usage=usage, **fields))


ANSWER: tuple[Step, ...] = (started(), delta("Hello"), delta(" you"), finished())


async def hang() -> None:
    """A step that never ends by itself."""
    await asyncio.Event().wait()


class FakeEngine(engine_grpc.EngineServiceServicer):
    """Plays a script for every request: events are sent, errors raised, and anything else is awaited."""

    def __init__(self, script: Sequence[Step] = ANSWER, address: str = "127.0.0.1:0") -> None:
        self.script = script
        self.requests: list[engine_pb.GenerateRequest] = []
        self.prefills: list[engine_pb.PrefillOnlyRequest] = []
        self.prefill_steps: list[Step] = []
        self.conversations: set[tuple[str, str]] = set()
        """Salt and session of what it keeps."""
        self.metadata: list[dict[str, str]] = []
        self.cancelled: list[str] = []
        self.running = 0
        self.incarnation = f"life-{next(_LIVES)}"
        self.server = ServiceServer(address, [], 0.0)
        engine_grpc.add_EngineServiceServicer_to_server(self, self.server.services)
        self.address = ""

    async def start(self) -> None:
        """Listens on a free port."""
        self.address = f"127.0.0.1:{await self.server.start()}"

    async def kill(self) -> None:
        """Closes its connections at once, whatever runs."""
        await self.server.grpc.stop(0)

    async def Generate(
        self, request: engine_pb.GenerateRequest, context: Any
    ) -> AsyncIterator[Event]:
        """Plays the script."""
        self.requests.append(request)
        self.metadata.append({k: v for k, v in context.invocation_metadata() if isinstance(v, str)})
        self.running += 1
        try:
            for step in self.script:
                if isinstance(step, Event):
                    yield step
                elif isinstance(step, CaravanError):
                    raise step
                else:
                    await step()
        except asyncio.CancelledError:
            self.cancelled.append(request.request_id)
            raise
        finally:
            self.running -= 1

    async def PrefillOnly(self, request: Any, context: Any) -> Any:
        """Raises or awaits the steps that the test set, then answers."""
        self.prefills.append(request)
        self.running += 1
        try:
            for step in self.prefill_steps:
                if isinstance(step, CaravanError):
                    raise step
                assert callable(step)
                await step()
        except asyncio.CancelledError:
            self.cancelled.append(request.request_id)
            raise
        finally:
            self.running -= 1
        return engine_pb.PrefillOnlyResponse(
            prompt_tokens=9,
            cached_tokens=4,
            cache_hit=generation_pb2.CACHE_HIT_PARTIAL,
            finish_key=KEY,
        )

    async def EndSession(self, request: Any, context: Any) -> Any:
        """Forgets the conversation."""
        found = (request.salt, request.session_id) in self.conversations
        self.conversations.discard((request.salt, request.session_id))
        return engine_pb.EndSessionResponse(found=found)

    async def FetchBlocks(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Blocks travel between engines."""
        raise AssertionError("not called by gateways")
        yield

    async def Cancel(self, request: Any, context: Any) -> Any:
        """A gateway cancels by ending its call, never by this."""
        raise AssertionError("not called by gateways")

    async def GetStatus(self, request: Any, context: Any) -> Any:
        """Nor does it ask for the status."""
        raise AssertionError("not called by gateways")

    async def ListInflight(self, request: Any, context: Any) -> Any:
        """Nor for the list."""
        raise AssertionError("not called by gateways")


@dataclass
class FakeCoordinator(coordinator_grpc.CoordinatorServiceServicer):
    """Grants leases on its engines in turn. `refusals` are used up first: an error is raised, a callable awaited.

    With a `chain` of deployments, the first of which clients ask for, its engines serve one of them each, in this order.
    """

    engines: list[FakeEngine] = field(default_factory=list)
    refusals: list[Step] = field(default_factory=list)
    grants: dict[str, str] = field(default_factory=dict)
    releases: list[tuple[str, coordinator_pb.Outcome.ValueType]] = field(default_factory=list)
    routes: list[coordinator_pb.RouteRequest] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)
    models: list[coordinator_pb.Model] = field(default_factory=list)
    hold_release: Callable[[], Awaitable[None]] | None = None
    known: set[str] = field(default_factory=set)
    beats: int = 0
    silent: bool = False
    deaf: bool = False
    interval_ms: int = 2_000
    address: str = "127.0.0.1:0"
    idempotent: bool = True
    default_priority: scheduling_pb2.Priority.ValueType = scheduling_pb2.PRIORITY_NORMAL
    serving_model: str = ""
    chain: tuple[str, ...] = ()
    engine_came: asyncio.Event = field(default_factory=asyncio.Event)
    finish_keys: list[bytes] = field(default_factory=list)
    joins: list[coordinator_pb.JoinGatewayRequest] = field(default_factory=list)
    messages: list[coordinator_pb.JoinGatewayRequest] = field(default_factory=list)
    """What came on sessions after the first message."""

    def __post_init__(self) -> None:
        self._numbers = itertools.count(1)
        self.server = ServiceServer(self.address, [], 0.0)
        coordinator_grpc.add_CoordinatorServiceServicer_to_server(self, self.server.services)

    @property
    def held(self) -> set[str]:
        """Leases that were granted and not released."""
        return set(self.grants) - {lease_id for lease_id, _ in self.releases}

    @property
    def outcomes(self) -> list[str]:
        """Outcomes of the releases, by name."""
        return [
            coordinator_pb.Outcome.Name(outcome).removeprefix("OUTCOME_")
            for _, outcome in self.releases
        ]

    async def JoinGateway(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        """Welcomes, answers every beat unless it is silent, and serves routes and releases as the calls for them do."""
        first = await anext(requests)
        self.joins.append(first)
        self.joined.append(first.gateway_id)
        if self.deaf:
            await hang()
        self.known.add(first.gateway_id)
        response = coordinator_pb.JoinGatewayResponse()
        response.heartbeat_interval.FromMilliseconds(self.interval_ms)
        out: asyncio.Queue[Any] = asyncio.Queue()
        tasks: set[asyncio.Task[None]] = set()

        async def route(request: coordinator_pb.RouteRequest) -> None:
            told = await self._answer(request, first.gateway_id, context)
            out.put_nowait(coordinator_pb.JoinGatewayResponse(routes=[told]))

        async def read() -> None:
            async for message in requests:
                self.messages.append(message)
                for release in message.releases:
                    await self.Release(release, context)
                tasks.update([asyncio.create_task(route(request)) for request in message.routes])
                if not message.releases and not message.routes:
                    self.beats += 1
                    if not self.silent:
                        out.put_nowait(response)
            out.put_nowait(None)

        tasks.add(asyncio.create_task(read()))
        try:
            yield response
            while (answer := await out.get()) is not None:
                yield answer
        finally:
            self.known.discard(first.gateway_id)
            await cancel_all(tasks)

    async def _answer(
        self, request: coordinator_pb.RouteRequest, gateway_id: str, context: Any
    ) -> coordinator_pb.RouteAnswer:
        told = coordinator_pb.RouteAnswer(request_id=request.request_id)
        request.gateway_id = gateway_id
        try:
            told.granted.CopyFrom(await self.Route(request, context))
        except CaravanError as error:
            told.refused.CopyFrom(error.to_status())
        return told

    async def Route(self, request: Any, context: Any) -> Any:
        """Grants a lease."""
        self.routes.append(request)
        if self.refusals:
            step = self.refusals.pop(0)
            if isinstance(step, CaravanError):
                raise step
            assert callable(step)
            await step()
        if request.gateway_id not in self.known:
            raise CaravanError("SESSION_UNKNOWN", "?", session_id=request.gateway_id)
        if request.request_id in {self.grants[lease_id] for lease_id in self.held}:
            raise CaravanError("DUPLICATE_REQUEST", "?", request_id=request.request_id)
        number = next(self._numbers)
        serving = self._serving(request)
        engine = await self._choose(number, serving, request)
        lease_id = f"lease-{number}"
        self.grants[lease_id] = request.request_id
        return coordinator_pb.RouteResponse(
            lease=coordinator_pb.Lease(
                lease_id=lease_id,
                engine_id=f"engine-{number}",
                address=engine.address,
                incarnation=engine.incarnation,
            ),
            model=serving,
            idempotent=self.idempotent,
            priority=request.priority or self.default_priority,
        )

    def _serving(self, request: coordinator_pb.RouteRequest) -> str:
        """The deployment that takes the request: the first of the chain that has not failed it."""
        if not self.chain:
            return self.serving_model or request.model
        failed = {told.name for told in request.failed}
        after = self.chain[self.chain.index(request.model) :]
        for name in after if request.may_fall_back else after[:1]:
            if name not in failed:
                return name
        raise CaravanError("NO_ENGINE", "None takes it.", retry_after_s=9.0, model=request.model)

    async def _choose(
        self, number: int, serving: str, request: coordinator_pb.RouteRequest
    ) -> FakeEngine:
        """The engines in turn, but for those that the request avoids; it waits while there is no other."""
        while True:
            engines = self.engines
            if self.chain:
                engines = [engines[self.chain.index(serving)]]
            allowed = [e for e in engines if e.incarnation not in request.avoid_incarnations]
            if allowed:
                return allowed[(number - 1) % len(allowed)]
            await self.engine_came.wait()

    def engine_joined(self, engine: FakeEngine) -> None:
        """One more engine, or a new life of one."""
        self.engines.append(engine)
        self.engine_came.set()

    async def Release(self, request: Any, context: Any) -> Any:
        """Notes the release."""
        if self.hold_release is not None:
            await self.hold_release()
        self.releases.append((request.lease_id, request.outcome))
        self.finish_keys.append(request.finish_key)
        return coordinator_pb.ReleaseResponse(released=True)

    async def Cancel(self, request: Any, context: Any) -> Any:
        """Notes the cancel."""
        if request.request_id not in self.grants.values():
            raise CaravanError(
                "REQUEST_NOT_FOUND", "No such request.", request_id=request.request_id
            )
        self.cancels.append(request.request_id)
        return coordinator_pb.CancelResponse()

    async def ListModels(self, request: Any, context: Any) -> Any:
        """Lists the models that the test set."""
        return coordinator_pb.ListModelsResponse(models=self.models)

    async def JoinEngine(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Engines are given by the test."""
        raise AssertionError("not called by gateways")
        yield

    async def ListInflight(self, request: Any, context: Any) -> Any:
        """Asked by operators only."""
        raise AssertionError("not called by gateways")

    async def ListEngines(self, request: Any, context: Any) -> Any:
        """All its engines serve `demo`."""
        return coordinator_pb.ListEnginesResponse(
            engines=[
                coordinator_pb.Engine(
                    engine_id=f"engine-{number}",
                    address=engine.address,
                    model=engine_pb.ModelInfo(name="demo"),
                )
                for number, engine in enumerate(self.engines, 1)
            ]
        )

    async def CancelTenant(self, request: Any, context: Any) -> Any:
        """Asked by operators only."""
        raise AssertionError("not called by gateways")

    async def DescribeQueue(self, request: Any, context: Any) -> Any:
        """Asked by operators only."""
        raise AssertionError("not called by gateways")

    async def DrainEngine(self, request: Any, context: Any) -> Any:
        """Asked by operators only."""
        raise AssertionError("not called by gateways")

    async def UndrainEngine(self, request: Any, context: Any) -> Any:
        """Asked by operators only."""
        raise AssertionError("not called by gateways")

    async def AcquireLimit(self, request: Any, context: Any) -> Any:
        """Asked by engines only."""
        raise AssertionError("not called by gateways")

    async def SettleLimit(self, request: Any, context: Any) -> Any:
        """Asked by engines only."""
        raise AssertionError("not called by gateways")

    async def GetCosts(self, request: Any, context: Any) -> Any:
        """Asked by operators only."""
        raise AssertionError("not called by gateways")
