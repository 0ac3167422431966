"""How long the coordinator takes to choose an engine, and how many requests per second it can route.

`python -m bench.routing [--decisions 20000] [--pairs 6000]`. Decisions: the state alone, in this process, with 1,000 engines
and 10,000 requests in flight; each round ends a random lease and routes a new request, of a prompt of eight messages that
continues an earlier one in half of the cases. Pairs: the service in a process of its own on one core, a client on the other
that keeps 32 pairs of Route and Release under way. What counts is the processor time of the service per pair: beside other
busy processes the service gets less than a core, and fewer pairs are seen per second.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from bench import children
from bench.measures import percentile
from bench.report import Report, Table, arguments, ceiling, finish, floor
from services.coordinator.limits import Limits
from services.coordinator.policies import AFFINITY, NAMES, policy_factory
from services.coordinator.state import CoordinatorState
from services.coordinator.waiting import Want
from services.runtime.channel import open_channel

ENGINES = 1_000
IN_FLIGHT = 10_000
SEQUENCES = 16
MESSAGES = 8
UNDER_WAY = 32
WARM_UP = 500
P50_US, P99_US = 200.0, 1000.0
PAIRS_PER_S = 1200.0
_IDLE = engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_IDLE)
_MODEL = engine_pb.ModelInfo(name="demo", max_sequences=SEQUENCES)


class Crowd:
    """Requests of conversations, half of which go on."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._chains: list[tuple[bytes, ...]] = []
        self._asked = 0

    def want(self) -> Want:
        """The next request."""
        self._asked += 1
        if self._chains and self._random.random() < 0.5:
            old = self._random.choice(self._chains)
            chain = (*old[2:], self._random.randbytes(32), self._random.randbytes(32))
        else:
            chain = tuple(self._random.randbytes(32) for _ in range(MESSAGES))
        if len(self._chains) < IN_FLIGHT:
            self._chains.append(chain)
        number = self._asked
        return Want(f"req-{number}", "gateway", "demo", f"lease-{number}", 0.0, affinity=chain)


def decisions(policy: str, rounds: int, seed: int) -> tuple[list[float], list[float]]:
    """Seconds of each route and of each release."""
    random, crowd = Random(seed), Crowd(seed)
    limits = Limits(engines_max=ENGINES, leases_max=2 * IN_FLIGHT)
    state = CoordinatorState(limits, policy_factory(policy, random.random, 1.25))
    state.join_gateway("gateway", 0.0)
    for number in range(ENGINES):
        state.join_engine(f"engine-{number}", "127.0.0.1:1", _MODEL, _IDLE, now=0.0, wall=0.0)
    held = []
    for _ in range(IN_FLIGHT):
        want = crowd.want()
        state.route(want)
        held.append(want.lease_id)
    routes: list[float] = []
    releases: list[float] = []
    for round_number in range(rounds + WARM_UP):
        place = random.randrange(len(held))
        want = crowd.want()
        started = time.perf_counter()
        state.release(held[place], 0.0)
        between = time.perf_counter()
        grant = state.route(want)
        ended = time.perf_counter()
        if grant is None:
            raise RuntimeError("there is room, and a request waits")
        held[place] = want.lease_id
        if round_number >= WARM_UP:
            releases.append(between - started)
            routes.append(ended - between)
    return routes, releases


@contextlib.contextmanager
def coordinator() -> Iterator[tuple[str, int]]:
    """The service on one core, this process on the others; its address and pid."""
    port, metrics_port = children.free_port(), children.free_port()
    environment = {
        "CARAVAN_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "CARAVAN_COORDINATOR_METRICS_ADDRESS": f"127.0.0.1:{metrics_port}",
    }
    cores = sorted(os.sched_getaffinity(0))
    argv = [sys.executable, "-m", "services.coordinator"]
    with children.running("routing-coordinator", argv, environment) as process:
        os.sched_setaffinity(process.pid, cores[:1])
        os.sched_setaffinity(0, cores[1:] or cores)
        try:
            url = f"http://127.0.0.1:{metrics_port}/metrics"
            children.wait_until_answers("routing-coordinator", process, url)
            yield f"127.0.0.1:{port}", process.pid
        finally:
            os.sched_setaffinity(0, cores)


@dataclass(slots=True)
class Pairs:
    """Seconds of each pair of Route and Release, of all together, and of the service's processor."""

    each: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    processor_s: float = 0.0


def processor_s(pid: int) -> float:
    """Seconds that a process has computed."""
    # The name of the program, in parentheses, may hold spaces.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def pairs(address: str, pid: int, count: int) -> Pairs:
    """Routes and releases, with an engine and a gateway that stay joined."""
    async with open_channel(address) as channel:
        stub: pb_grpc.CoordinatorServiceAsyncStub = pb_grpc.CoordinatorServiceStub(channel)
        async with joined(stub):
            return await _drive(stub, pid, count)


@contextlib.asynccontextmanager
async def joined(stub: pb_grpc.CoordinatorServiceAsyncStub) -> AsyncIterator[None]:
    """An engine with room for all that is under way, and a gateway called `gateway`, joined until the block ends."""
    engine = stub.JoinEngine()
    registration = pb.EngineRegistration(
        engine_id="engine-0",
        incarnation="engine-0-1",
        address="127.0.0.1:1",
        model=engine_pb.ModelInfo(name="demo", max_sequences=2 * UNDER_WAY),
        load=_IDLE,
    )
    gateway = stub.JoinGateway()
    await gateway.write(pb.JoinGatewayRequest(gateway_id="gateway"))
    await engine.write(pb.JoinEngineRequest(register=registration))
    await gateway.read()
    await engine.read()
    beating = asyncio.create_task(_beat(engine, gateway))
    try:
        yield
    finally:
        beating.cancel()
        await asyncio.wait([beating])


async def _beat(
    engine: grpc.aio.StreamStreamCall[pb.JoinEngineRequest, pb.JoinEngineResponse],
    gateway: grpc.aio.StreamStreamCall[pb.JoinGatewayRequest, pb.JoinGatewayResponse],
) -> None:
    while True:
        await asyncio.sleep(0.5)
        await engine.write(pb.JoinEngineRequest(report=pb.EngineReport(load=_IDLE)))
        await gateway.write(pb.JoinGatewayRequest())
        await gateway.read()


async def _drive(stub: pb_grpc.CoordinatorServiceAsyncStub, pid: int, count: int) -> Pairs:
    crowd, found = Crowd(1), Pairs()
    todo = iter(range(count + WARM_UP))

    async def one() -> None:
        for number in todo:
            if number == WARM_UP:
                found.wall_s, found.processor_s = -time.perf_counter(), -processor_s(pid)
            want = crowd.want()
            asked = time.perf_counter()
            request = pb.RouteRequest(
                request_id=want.request_id,
                gateway_id=want.gateway_id,
                model=want.model,
                affinity=want.affinity,
            )
            lease = (await stub.Route(request)).lease
            await stub.Release(
                pb.ReleaseRequest(lease_id=lease.lease_id, outcome=pb.OUTCOME_FINISHED)
            )
            if number >= WARM_UP:
                found.each.append(time.perf_counter() - asked)

    await asyncio.gather(*(one() for _ in range(UNDER_WAY)))
    found.wall_s += time.perf_counter()
    found.processor_s += processor_s(pid)
    return found


def _row(name: str, values: list[float]) -> tuple[str, ...]:
    shown: Callable[[float], str] = lambda share: f"{1e6 * percentile(values, share):.0f}"  # noqa: E731
    return name, shown(0.5), shown(0.99), shown(1.0)


def run(rounds: int, count: int) -> Report:
    """Measures both."""
    result = Report("routing")
    result.notes.append(
        f"decisions: {ENGINES} engines of {SEQUENCES} sequences, {IN_FLIGHT} requests in flight, in process; "
        f"pairs: over gRPC, the service on one core, {UNDER_WAY} under way"
    )
    rows: list[tuple[str, ...]] = []
    for policy in NAMES:
        routes, releases = decisions(policy, rounds, seed=7)
        rows += [_row(f"{policy}, route", routes), _row(f"{policy}, release", releases)]
        if policy == AFFINITY:
            chosen = routes
    result.tables.append(Table("one decision, us", ("policy", "p50", "p99", "max"), tuple(rows)))
    with coordinator() as (address, pid):
        found = asyncio.run(pairs(address, pid, count))
    # What the service does with a whole core; how much of one it got is up to the rest of the machine.
    speed = count / found.processor_s
    cells = (f"{speed:.0f}", f"{count / found.wall_s:.0f}", *_row("", found.each)[1:])
    columns = ("pairs/s of its processor", "pairs/s seen", "p50 us", "p99 us", "max us")
    result.tables.append(Table("Route and Release over gRPC", columns, (cells,)))
    result.claims += [
        ceiling("one decision with affinity, p50", 1e6 * percentile(chosen, 0.5), P50_US, "us"),
        ceiling("one decision with affinity, p99", 1e6 * percentile(chosen, 0.99), P99_US, "us"),
        floor("pairs over gRPC per second of one core", speed, PAIRS_PER_S, "pairs/s"),
    ]
    return result


def main() -> int:
    """Parses the command line, runs, prints."""
    parser = arguments("routing", __doc__)
    parser.add_argument("--decisions", type=int, default=20_000, help="of each policy")
    parser.add_argument("--pairs", type=int, default=6_000)
    args = parser.parse_args()
    return finish(run(args.decisions, args.pairs), args.json)


if __name__ == "__main__":
    sys.exit(main())
