"""Twice the load that the engines can carry: what is still served, how soon the rest is refused, and what it costs in memory.

`python -m bench.overload [--seconds 60]`. Two scripted engines of eight sequences whose steps take a fixed time, so their capacity
is known; the whole stack in front of them, and a short queue, so that refusals happen. First the capacity is measured: as many
clients as there are places to run and to wait, each with one request after the other. Then twice as many requests per second
arrive as were served, evenly, whatever became of those before. Memory is compared between a sixth of that time and its end.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import grpc.aio

from bench import contestants
from bench.engine_client import PublicClient
from bench.measures import percentile
from bench.memory import processes, resident
from bench.report import Report, Table, arguments, ceiling, finish, floor, progress
from services.runtime.channel import open_channel

MODEL = "paced"
ENGINES = 2
SEQUENCES = 8
STEP_MS = 25.0
TOKENS = 8
QUEUED = 16
OVERLOAD = 2.0
WARM_UP_S = 2.0
SERVED_SHARE = 0.95
REFUSED_MS = 50.0
GROWTH_MB = 8.0
KNOWN_PER_S = ENGINES * SEQUENCES / (TOKENS * STEP_MS / 1000)


@dataclass(slots=True)
class Offered:
    """What became of requests: when each was served, how long refusals took, other ends by code, and how late it was sent."""

    served_at: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)
    late_s: list[float] = field(default_factory=list)

    def served_within(self, start: float, end: float) -> int:
        """How many were served within a span."""
        return sum(start <= at < end for at in self.served_at)


async def ask(public: PublicClient, seen: Offered) -> None:
    """One request, to whatever end it comes."""
    sent = time.perf_counter()
    try:
        await public.chat(MODEL, "hello", TOKENS)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            seen.refused_s.append(time.perf_counter() - sent)
        else:
            name = error.code().name
            seen.failed[name] = seen.failed.get(name, 0) + 1
    else:
        seen.served_at.append(time.perf_counter())


async def capacity(public: PublicClient, seconds: float) -> float:
    """Requests per second with every place taken."""
    seen = Offered()
    start = time.perf_counter() + WARM_UP_S
    end = start + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            await ask(public, seen)

    await asyncio.gather(*(client() for _ in range(ENGINES * SEQUENCES + QUEUED // 2)))
    return seen.served_within(start, end) / seconds


async def offer(public: PublicClient, per_s: float, seconds: float, seen: Offered) -> None:
    """Sends so many requests per second, evenly, and waits for the ends of all."""
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(round(per_s * seconds)):
            due = start + number / per_s
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            seen.late_s.append(time.perf_counter() - due)
            group.create_task(ask(public, seen))


@dataclass(slots=True)
class Found:
    """Requests per second alone and under overload, what became of the rest, and MB of each process early and late."""

    capacity_per_s: float
    served_per_s: float
    offered: Offered
    early_mb: Mapping[str, float]
    late_mb: Mapping[str, float]


def memory(stack: contestants.Stack) -> dict[str, float]:
    """Resident MB by process."""
    return {name: resident(pid)[0] for name, pid in processes(stack).items()}


async def measure(stack: contestants.Stack, seconds: float) -> Found:
    """Measures a stack that runs."""
    async with open_channel(f"127.0.0.1:{stack.server.port}") as channel:
        public = PublicClient(channel)
        progress("capacity")
        alone = await capacity(public, max(2.0, seconds / 4))
        progress(f"{alone:.0f} requests/s; now {OVERLOAD:g} times that for {seconds:g} s")
        seen = Offered()
        offering = asyncio.create_task(offer(public, OVERLOAD * alone, seconds, seen))
        started = time.perf_counter()
        await asyncio.sleep(seconds / 6)
        early, since = await asyncio.to_thread(memory, stack), time.perf_counter()
        await asyncio.sleep(started + seconds - since)
        until = time.perf_counter()
        late = await asyncio.to_thread(memory, stack)
        served = seen.served_within(since, until) / (until - since)
        await offering
    return Found(alone, served, seen, early, late)


def report(found: Found, seconds: float) -> Report:
    """The tables and the claims."""
    seen = found.offered
    result = Report("overload")
    result.notes.append(
        f"{ENGINES} scripted engines of {SEQUENCES} sequences, {TOKENS} steps of {STEP_MS:g} ms: {KNOWN_PER_S:.0f} requests/s"
        f" at most; {QUEUED} may wait; {OVERLOAD:g} times the measured capacity for {seconds:g} s, over gRPC"
    )
    refused = [1000 * value for value in seen.refused_s] or [0.0]
    rows = (
        ("capacity, requests/s", f"{found.capacity_per_s:.1f}"),
        ("served under overload, requests/s", f"{found.served_per_s:.1f}"),
        ("requests offered", f"{len(seen.late_s):,}"),
        ("served", f"{len(seen.served_at):,}"),
        ("refused", f"{len(seen.refused_s):,}"),
        ("ended otherwise", ", ".join(f"{n} {code}" for code, n in seen.failed.items()) or "0"),
        ("refusal p50, ms", f"{percentile(refused, 0.5):.1f}"),
        ("refusal p99, ms", f"{percentile(refused, 0.99):.1f}"),
        ("sent late p99, ms", f"{1000 * percentile(seen.late_s, 0.99):.1f}"),
    )
    result.tables.append(Table("requests", ("what", "how many"), rows))
    growth = {name: found.late_mb[name] - early for name, early in found.early_mb.items()}
    grown = tuple(
        (name, f"{early:.1f}", f"{found.late_mb[name]:.1f}", f"{growth[name]:+.1f}")
        for name, early in found.early_mb.items()
    )
    result.tables.append(
        Table("resident memory, MB", ("process", "early", "at the end", "growth"), grown)
    )
    share = found.served_per_s / found.capacity_per_s
    result.claims += [
        floor("served under overload / capacity", share, SERVED_SHARE),
        floor("requests refused", len(seen.refused_s), 1),
        ceiling("slowest refusal", max(refused), REFUSED_MS, "ms"),
        ceiling("requests that ended otherwise", sum(seen.failed.values()), 0),
        ceiling("largest growth of a process", max(growth.values()), GROWTH_MB, "MB"),
    ]
    return result


def main() -> int:
    """Parses the command line, runs, prints."""
    parser = arguments("overload", __doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    args = parser.parse_args()
    environment = {
        "CARAVAN_ENGINE_MAX_SEQUENCES": str(SEQUENCES),
        "CARAVAN_COORDINATOR_MAX_QUEUED": str(QUEUED),
    }
    models = [f"{MODEL}=scripted:?step_ms={STEP_MS:g}"]
    options = ["--engines", str(ENGINES)]
    with contestants.caravan(models, options=options, environment=environment) as stack:
        found = asyncio.run(measure(stack, args.seconds))
    return finish(report(found, args.seconds), args.json)


if __name__ == "__main__":
    sys.exit(main())
