"""What admission adds to a request that does not have to wait: the time until it has its lease, and the whole path around it.

`python -m bench.admission [--trials 2000]`. Leases are asked for one at a time, over loopback gRPC, from a real coordinator in a process
and on a core of its own; the prompt has eight messages. The claim is made for what gateways do: they ask on their session, whose
stream is open, and release on it without waiting. The calls Route and Release, which do the same for others, are shown beside it. The
whole path, for comparison: time to the first token of a scripted engine that is called directly, and of the same engine behind
gateway and coordinator, without Envoy, in turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc

from bench import contestants, routing
from bench.engine_client import EngineClient, PublicClient
from bench.measures import percentile, rotated
from bench.report import Report, Table, arguments, ceiling, finish, progress
from bench.sse_client import Answer
from services.coordinator.waiting import Want
from services.gateway.held import HeldLeases
from services.gateway.membership import Membership
from services.gateway.releases import Releases
from services.gateway.session_stream import Session
from services.runtime.channel import open_channel
from services.runtime.clock import SystemClock, random_id
from services.runtime.errors import CaravanError
from services.runtime.server import cancel_all

ADDED_MS = 1.0
WARM_UP = 100
TOKENS = 4
MODEL = "fast"
DIRECT, BEHIND = "engine directly", "behind gateway and coordinator"


@dataclass(slots=True)
class Waits:
    """Milliseconds of each wait."""

    session: list[float] = field(default_factory=list)
    route: list[float] = field(default_factory=list)
    release: list[float] = field(default_factory=list)


async def admission(address: str, trials: int) -> Waits:
    """Asks and releases, one request at a time, by both ways in turn."""
    found, crowd = Waits(), routing.Crowd(1)
    async with open_channel(address) as channel:
        stub: pb_grpc.CoordinatorServiceAsyncStub = pb_grpc.CoordinatorServiceStub(channel)
        async with routing.joined(stub), _gateway(stub) as gateway:
            session = await gateway.session(within_s=10)
            for trial in range(trials + WARM_UP):
                waits = Waits() if trial < WARM_UP else found
                await _by_session(gateway, session, _route(crowd.want()), waits)
                await _by_calls(stub, _route(crowd.want()), waits)
    return found


@contextlib.asynccontextmanager
async def _gateway(stub: pb_grpc.CoordinatorServiceAsyncStub) -> AsyncIterator[Membership]:
    """The gateway's own side of a session."""
    releases = Releases(lambda _failed: None)
    membership = Membership(
        stub,
        SystemClock(),
        random_id,
        HeldLeases(),
        releases,
        timeout_s=10,
        on_change=_not_interested,
    )
    running = asyncio.create_task(membership.run())
    try:
        yield membership
    finally:
        await cancel_all([running])


async def _not_interested(_joined: bool) -> None:
    pass


def _route(want: Want) -> pb.RouteRequest:
    return pb.RouteRequest(
        request_id=want.request_id,
        gateway_id=want.gateway_id,
        model=want.model,
        affinity=want.affinity,
    )


async def _by_session(
    gateway: Membership, session: Session, route: pb.RouteRequest, waits: Waits
) -> None:
    started = time.perf_counter()
    answer = await session.ask(route)
    waits.session.append(1000 * (time.perf_counter() - started))
    if isinstance(answer, CaravanError):
        raise answer
    lease_id = answer.lease.lease_id
    gateway.release(pb.ReleaseRequest(lease_id=lease_id, outcome=pb.OUTCOME_FINISHED))


async def _by_calls(
    stub: pb_grpc.CoordinatorServiceAsyncStub, route: pb.RouteRequest, waits: Waits
) -> None:
    started = time.perf_counter()
    lease = (await stub.Route(route)).lease
    granted = time.perf_counter()
    await stub.Release(pb.ReleaseRequest(lease_id=lease.lease_id, outcome=pb.OUTCOME_FINISHED))
    waits.route.append(1000 * (granted - started))
    waits.release.append(1000 * (time.perf_counter() - granted))


async def whole_path(stack: contestants.Stack, trials: int) -> dict[str, list[float]]:
    """Milliseconds to the first token of both ways, one request at a time in rotating order."""
    async with (
        open_channel(stack.address("engine-0")) as engine_channel,
        open_channel(stack.address("gateway")) as gateway_channel,
    ):
        engine, public = EngineClient(engine_channel), PublicClient(gateway_channel)

        async def direct(prompt: str) -> Answer:
            return await engine.generate(f"bench-{time.perf_counter_ns()}", prompt, TOKENS)

        async def behind(prompt: str) -> Answer:
            return await public.chat(MODEL, prompt, TOKENS)

        ways: dict[str, Callable[[str], Awaitable[Answer]]] = {DIRECT: direct, BEHIND: behind}
        found: dict[str, list[float]] = {name: [] for name in ways}
        for trial in range(trials + WARM_UP):
            for name in rotated(list(ways), trial):
                answer = await ways[name](f"trial {trial}")
                if trial >= WARM_UP:
                    found[name].append(1000 * answer.first_s)
    return found


def report(waits: Waits, path: dict[str, list[float]]) -> Report:
    """The tables and the claim."""
    result = Report("admission")
    result.notes.append(
        f"one request at a time, nobody waits; {len(waits.route)} leases each way, {len(path[DIRECT])} first tokens each way"
    )
    timed = {
        "lease on the session": waits.session,
        "call of Route": waits.route,
        "call of Release": waits.release,
    }
    result.tables += [
        Table("admission, ms", ("wait", "p50", "p99"), _rows(timed)),
        Table("to the first token, ms", ("way", "p50", "p99"), _rows(path)),
    ]
    added = percentile(waits.session, 0.5)
    result.claims.append(
        ceiling("added by admission before the first token, p50", added, ADDED_MS, "ms")
    )
    return result


def _rows(timed: dict[str, list[float]]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (name, f"{percentile(values, 0.5):.2f}", f"{percentile(values, 0.99):.2f}")
        for name, values in timed.items()
    )


async def measure(trials: int) -> tuple[Waits, dict[str, list[float]]]:
    """Both, on one event loop: what gRPC still has to say of the first must not meet a loop that is closed."""
    progress("leases")
    with routing.coordinator() as (address, _):
        waits = await admission(address, trials)
    progress("the whole path")
    with contestants.caravan([f"{MODEL}=scripted:?"]) as stack:
        return waits, await whole_path(stack, max(1, trials // 4))


def main() -> int:
    """Parses the command line, runs, prints."""
    parser = arguments("admission", __doc__)
    parser.add_argument("--trials", type=int, default=2_000)
    args = parser.parse_args()
    return finish(report(*asyncio.run(measure(args.trials))), args.json)


if __name__ == "__main__":
    sys.exit(main())
