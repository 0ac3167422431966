"""What a remote engine adds to the provider behind it: time to the first token, and how much one core of it carries.

`python -m bench.remote [--trials 200]`. The provider is the scripted one, which answers at once, so all that is seen is the path.
First token: one request at a time, in turn to the provider directly (httpx, a kept connection), to the remote engine (gRPC, as the
gateway asks it), and through the whole stack (the same httpx client, Envoy, gateway, engine). Capacity: 64 streams at once, paced by the
provider, through the engine, which has one core for itself while client and provider share the others.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from caravan.engine.v1 import engine_service_pb2, engine_service_pb2_grpc

from bench import contestants
from bench.engine_client import EngineClient, chat
from bench.http_client import HttpClient
from bench.measures import median, percentile, rotated
from bench.processor_time import core_of_its_own, tree_cpu_s
from bench.provider_process import MODEL, WORKERS, Provider, provider, stack_before
from bench.report import Report, Table, arguments, ceiling, finish, floor, progress
from bench.sse_client import Answer
from services.runtime.channel import open_channel
from services.runtime.generate_events import in_order

DIRECT, ENGINE, REST = "provider directly", "remote engine, gRPC", "whole stack, REST"
ADDED_MS = 3.0
CARRIED = 3000.0
FIRST_TOKENS = 4
WARM_UP = 20
PACES_MS = (20, 14, 0)
"""Between two chunks of a stream; 0: as fast as they go. 64 streams of 14 ms are 4,571 chunks a second."""
JUDGED_MS = 14
Ask = Callable[[str, int], Awaitable[Answer]]


async def first_tokens(ways: Mapping[str, Ask], trials: int) -> dict[str, list[float]]:
    """Milliseconds to the first token of each way, one request at a time in rotating order."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for trial in range(trials + WARM_UP):
        for name in rotated(list(ways), trial):
            answer = await ways[name](f"trial {trial}", FIRST_TOKENS)
            if trial >= WARM_UP:
                found[name].append(1000 * answer.first_s)
    return found


@dataclass(frozen=True, slots=True)
class Carried:
    """One round of WORKERS streams: chunks of the provider, messages of the engine, and what it cost."""

    chunks: int
    messages: int
    seconds: float
    cpu_s: float

    @property
    def speed(self) -> float:
        """Chunks per second."""
        return self.chunks / self.seconds

    @property
    def share(self) -> float:
        """Of the core that the engine had."""
        return self.cpu_s / self.seconds


async def carry(
    stub: engine_service_pb2_grpc.EngineServiceAsyncStub, pid: int, chunks: int
) -> Carried:
    """WORKERS streams of so many chunks each, at once. Raises RuntimeError if one of them has another number."""

    async def one(number: int) -> tuple[int, int]:
        request = engine_service_pb2.GenerateRequest(
            request_id=f"bench-{time.perf_counter_ns()}-{number}", chat=chat(f"stream {number}")
        )
        pieces = messages = 0
        async for message in stub.Generate(request):
            messages += 1
            pieces += sum(event.delta.pieces for event in in_order(message))
        return pieces, messages

    cpu_s, started = tree_cpu_s(pid), time.perf_counter()
    found = await asyncio.gather(*(one(number) for number in range(WORKERS)))
    seconds = time.perf_counter() - started
    if any(pieces != chunks for pieces, _ in found):
        raise RuntimeError(f"not every stream had {chunks} chunks: {found}")
    messages = sum(count for _, count in found)
    return Carried(WORKERS * chunks, messages, seconds, tree_cpu_s(pid) - cpu_s)


def first_table(first: dict[str, list[float]]) -> Table:
    """Times to the first token."""
    base = percentile(first[DIRECT], 0.5)
    rows = tuple(
        (
            name,
            f"{percentile(values, 0.5):.2f}",
            f"{percentile(values, 0.99):.2f}",
            f"{statistics.fmean(values):.2f}",
            f"{percentile(values, 0.5) - base:.2f}",
        )
        for name, values in first.items()
    )
    columns = ("way", "p50", "p99", "mean", "p50 added")
    return Table("to the first token, one at a time, ms", columns, rows)


def capacity_table(carried: dict[int, list[Carried]]) -> Table:
    """Chunks per second by pace."""
    rows = tuple(
        (
            f"{pace} ms" if pace else "none",
            f"{WORKERS * 1000 / pace:.0f}" if pace else "-",
            f"{median([c.speed for c in rounds]):.0f}",
            f"{median([c.messages / c.chunks for c in rounds]):.2f}",
            f"{median([c.share for c in rounds]):.0%}",
            f"{median([1e6 * c.cpu_s / c.chunks for c in rounds]):.0f}",
        )
        for pace, rounds in carried.items()
    )
    columns = (
        "pace of a stream",
        "offered chunks/s",
        "carried",
        "messages per chunk",
        "of the core",
        "CPU us/chunk",
    )
    return Table(f"{WORKERS} streams through an engine with one core", columns, rows)


async def run(
    stack: contestants.Stack, served: Provider, trials: int, rounds: int, seconds: float
) -> Report:
    """Measures a stack that runs."""
    engine_pid = next(int(p["pid"]) for p in stack.processes if p["name"] == "engine-0")
    carried: dict[int, list[Carried]] = {pace: [] for pace in PACES_MS}
    async with (
        open_channel(stack.address("engine-0")) as channel,
        HttpClient(served.base_url, MODEL) as direct,
        HttpClient(f"http://127.0.0.1:{stack.server.port}/v1", MODEL) as rest,
    ):
        engine = EngineClient(channel)

        async def grpc(prompt: str, tokens: int) -> Answer:
            return await engine.generate(f"bench-{time.perf_counter_ns()}", prompt, tokens)

        served.script(tokens=FIRST_TOKENS, pace_s=0)
        ways = {DIRECT: direct.stream, ENGINE: grpc, REST: rest.stream}
        first = await first_tokens(ways, trials)
        stub: engine_service_pb2_grpc.EngineServiceAsyncStub
        stub = engine_service_pb2_grpc.EngineServiceStub(channel)
        with core_of_its_own(engine_pid, [served.pid]):
            for number in range(rounds + 1):
                for pace in PACES_MS:
                    chunks = int(1000 * seconds / (pace or 5))
                    served.script(tokens=chunks, pace_s=pace / 1000)
                    found = await carry(stub, engine_pid, chunks)
                    progress(f"capacity, round {number}, {pace} ms: {found.speed:.0f} chunks/s")
                    if number:
                        carried[pace].append(found)
    return report(first, carried)


def report(first: dict[str, list[float]], carried: dict[int, list[Carried]]) -> Report:
    """The tables and the claims."""
    result = Report("remote")
    result.notes.append(
        "scripted provider over HTTP/1.1; client, provider, Envoy and all services on the same cores"
    )
    result.tables += [first_table(first), capacity_table(carried)]
    base = percentile(first[DIRECT], 0.5)
    judged = carried[JUDGED_MS]
    result.claims += [
        ceiling(
            "the remote engine adds to the first token, p50",
            percentile(first[ENGINE], 0.5) - base,
            ADDED_MS,
            "ms",
        ),
        floor(
            f"{WORKERS} streams of {JUDGED_MS} ms through one core",
            median([c.speed for c in judged]),
            CARRIED,
            "chunks/s",
        ),
    ]
    return result


def main() -> int:
    """Parses the command line, runs, prints."""
    parser = arguments("remote", __doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a paced stream")
    args = parser.parse_args()
    with provider() as served, stack_before(served) as stack:
        result = asyncio.run(run(stack, served, args.trials, args.rounds, args.seconds))
    return finish(result, args.json)


if __name__ == "__main__":
    sys.exit(main())
