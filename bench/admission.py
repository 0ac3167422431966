"""What admission adds to a request that does not have to wait: the time of Route and Release, and the whole path around them.

`python -m bench.admission [--trials 2000]`. Route and Release are timed as the gateway sees them: one pair at a time, over loopback
gRPC, to a real coordinator in a process and on a core of its own; the prompt has eight messages. The claim is made for Route, which
is what a request waits for: the gateway releases in the background, once the last event is on its way. The whole path, for
comparison: time to the first token of a scripted engine that is called directly, and of the same engine behind gateway and
coordinator, without Envoy, in turn.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc

from bench import contestants, routing
from bench.engine_client import EngineClient, PublicClient
from bench.measures import percentile, rotated
from bench.report import Report, Table, arguments, ceiling, finish, progress
from bench.sse_client import Answer
from services.runtime.channel import open_channel

ADDED_MS = 1.0
WARM_UP = 100
TOKENS = 4
MODEL = "fast"
DIRECT, BEHIND = "engine directly", "behind gateway and coordinator"


@dataclass(slots=True)
class Calls:
    """Milliseconds of each call."""

    route: list[float] = field(default_factory=list)
    release: list[float] = field(default_factory=list)


async def admission(address: str, trials: int) -> Calls:
    """Routes and releases, one request at a time."""
    found, crowd = Calls(), routing.Crowd(1)
    async with open_channel(address) as channel:
        stub: pb_grpc.CoordinatorServiceAsyncStub = pb_grpc.CoordinatorServiceStub(channel)
        async with routing.joined(stub):
            for trial in range(trials + WARM_UP):
                want = crowd.want()
                route = pb.RouteRequest(
                    request_id=want.request_id,
                    gateway_id=want.gateway_id,
                    model=want.model,
                    affinity=want.affinity,
                )
                started = time.perf_counter()
                lease = (await stub.Route(route)).lease
                granted = time.perf_counter()
                await stub.Release(
                    pb.ReleaseRequest(lease_id=lease.lease_id, outcome=pb.OUTCOME_FINISHED)
                )
                ended = time.perf_counter()
                if trial >= WARM_UP:
                    found.route.append(1000 * (granted - started))
                    found.release.append(1000 * (ended - granted))
    return found


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


def report(calls: Calls, path: dict[str, list[float]]) -> Report:
    """The tables and the claim."""
    result = Report("admission")
    result.notes.append(
        f"one request at a time, nobody waits; {len(calls.route)} pairs, {len(path[DIRECT])} first tokens each way"
    )
    both = [a + b for a, b in zip(calls.route, calls.release, strict=True)]
    timed = {"Route": calls.route, "Release": calls.release, "both": both}
    result.tables += [
        Table("calls of the gateway, ms", ("call", "p50", "p99"), _rows(timed)),
        Table("to the first token, ms", ("way", "p50", "p99"), _rows(path)),
    ]
    added = percentile(calls.route, 0.5)
    result.claims.append(
        ceiling("added by admission before the first token, p50", added, ADDED_MS, "ms")
    )
    return result


def _rows(timed: dict[str, list[float]]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (name, f"{percentile(values, 0.5):.2f}", f"{percentile(values, 0.99):.2f}")
        for name, values in timed.items()
    )


def main() -> int:
    """Parses the command line, runs, prints."""
    parser = arguments("admission", __doc__)
    parser.add_argument("--trials", type=int, default=2_000)
    args = parser.parse_args()
    progress("Route and Release")
    with routing.coordinator() as (address, _):
        calls = asyncio.run(admission(address, args.trials))
    progress("the whole path")
    with contestants.caravan([f"{MODEL}=scripted:?"]) as stack:
        path = asyncio.run(whole_path(stack, max(1, args.trials // 4)))
    return finish(report(calls, path), args.json)


if __name__ == "__main__":
    sys.exit(main())
