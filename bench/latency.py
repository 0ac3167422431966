"""What Envoy, gateway and coordinator add to the engine: time to the first token, and tokens per second they can carry.

`python -m bench.latency [--trials 300]`. The engine is the scripted one, which costs nothing to compute, so all that is seen
is the path. First token: one request at a time, in turn to the engine directly (gRPC), through the whole stack over REST,
and through the whole stack over gRPC. Capacity: 16 streams at once, once as fast as they go, where an event carries all
tokens that became ready since the one before, and once of an engine that pauses in each step, which leaves less to gather.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from bench import contestants
from bench.engine_client import EngineClient, PublicClient
from bench.measures import median, percentile, rotated
from bench.report import Report, Table, arguments, ceiling, finish, floor, progress
from bench.sse_client import Answer, stream
from services.runtime.channel import open_channel

FAST = "fast"
PACED = "paced"
PACED_MS = 1.0
DIRECT, GRPC, REST = "engine directly", "whole stack, gRPC", "whole stack, REST"
ADDED_MS = 5.0
CAPACITY = 8000.0
STREAMS = 16
FIRST_TOKENS = 4
WARM_UP = 20
Ask = Callable[[str, int], Awaitable[Answer]]


def asks(
    stack: contestants.Stack, engine: EngineClient, public: PublicClient, model: str
) -> dict[str, Ask]:
    """The three ways to ask a model: (prompt, tokens) -> answer."""

    async def rest(prompt: str, tokens: int) -> Answer:
        body = stack.server.chat_body(prompt, tokens) | {"model": model}
        return await stream(stack.server.port, "/v1/chat/completions", body)

    async def direct(prompt: str, tokens: int) -> Answer:
        return await engine.generate(f"bench-{time.perf_counter_ns()}", prompt, tokens)

    async def grpc(prompt: str, tokens: int) -> Answer:
        return await public.chat(model, prompt, tokens)

    return {DIRECT: direct, GRPC: grpc, REST: rest}


async def first_tokens(ways: dict[str, Ask], trials: int) -> dict[str, list[float]]:
    """Milliseconds to the first token of each way, one request at a time in rotating order."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for trial in range(trials + WARM_UP):
        for name in rotated(list(ways), trial):
            answer = await ways[name](f"trial {trial}", FIRST_TOKENS)
            if trial >= WARM_UP:
                found[name].append(1000 * answer.first_s)
    return found


@dataclass(slots=True)
class Carried:
    """What one way carried: tokens per second, and tokens per event, of each round."""

    speeds: list[float] = field(default_factory=list)
    coalesced: list[float] = field(default_factory=list)


async def capacity(ways: dict[str, Ask], rounds: int, tokens: int) -> dict[str, Carried]:
    """STREAMS streams at once, by way and round."""
    found = {name: Carried() for name in ways}
    for round_number in range(rounds + 1):
        for name in rotated(list(ways), round_number):
            started = time.perf_counter()
            answers = await asyncio.gather(
                *(ways[name](f"stream {round_number} {s}", tokens) for s in range(STREAMS))
            )
            seconds = max(a.times[-1] for a in answers) - started
            if any(a.completion_tokens != tokens for a in answers):
                raise RuntimeError(f"{name}: not every stream gave {tokens} tokens")
            speed = STREAMS * tokens / seconds
            progress(f"capacity, round {round_number}, {name}: {speed:.0f} tokens/s")
            if round_number:
                found[name].speeds.append(speed)
                events = sum(len(a.times) for a in answers)
                found[name].coalesced.append(STREAMS * tokens / events)
    return found


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


def capacity_table(title: str, carried: dict[str, Carried]) -> Table:
    """Tokens per second."""
    rows = tuple(
        (name, f"{median(c.speeds):.0f}", f"{median(c.coalesced):.2f}")
        for name, c in carried.items()
    )
    return Table(title, ("way", "tokens/s", "tokens per event"), rows)


async def run(stack: contestants.Stack, trials: int, rounds: int, tokens: int) -> Report:
    """Measures a stack that runs."""
    async with (
        open_channel(stack.address("engine-0")) as fast_engine,
        open_channel(stack.address("engine-1")) as paced_engine,
        open_channel(f"127.0.0.1:{stack.server.port}") as channel,
    ):
        public = PublicClient(channel)
        fast = asks(stack, EngineClient(fast_engine), public, FAST)
        paced = asks(stack, EngineClient(paced_engine), public, PACED)
        first = await first_tokens(fast, trials)
        unpaced = await capacity(fast, rounds, tokens)
        steady = await capacity(paced, rounds, tokens)
    result = Report("latency")
    result.notes.append("scripted engines; client, Envoy and all services on the same cores")
    result.tables += [
        first_table(first),
        capacity_table(f"{STREAMS} streams as fast as they go", unpaced),
        capacity_table(
            f"{STREAMS} streams of an engine that waits {PACED_MS:g} ms in each step", steady
        ),
    ]
    added = percentile(first[REST], 0.5) - percentile(first[DIRECT], 0.5)
    result.claims += [
        ceiling("added to the first token over REST, p50", added, ADDED_MS, "ms"),
        floor(f"{STREAMS} streams over REST", median(unpaced[REST].speeds), CAPACITY, "tokens/s"),
        floor(f"{STREAMS} streams over gRPC", median(unpaced[GRPC].speeds), CAPACITY, "tokens/s"),
    ]
    return result


def main() -> int:
    """Parses the command line, runs, prints."""
    parser = arguments("latency", __doc__)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1000, help="per stream, for the capacity")
    args = parser.parse_args()
    models = [
        f"{FAST}=scripted:?context=8192",
        f"{PACED}=scripted:?context=8192&step_ms={PACED_MS:g}",
    ]
    with contestants.caravan(models) as stack:
        result = asyncio.run(run(stack, args.trials, args.rounds, args.tokens))
    return finish(result, args.json)


if __name__ == "__main__":
    sys.exit(main())
