"""What Envoy, gateway and coordinator add to the engine: time to the first token, and tokens per second they can carry.

`python -m bench.latency [--trials 300]`. The engine is the scripted one, which costs nothing to compute, so all that is seen
is the path. First token: one request at a time, in turn to the engine directly (gRPC), through the whole stack over REST,
and through the whole stack over gRPC. Capacity: 16 streams at once, as fast as they go, in turn over REST and gRPC.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable

from bench import contestants
from bench.engine_client import EngineClient, PublicClient
from bench.measures import median, percentile, rotated
from bench.report import Report, Table, arguments, ceiling, finish, floor, progress
from bench.sse_client import Answer, stream
from services.runtime.channel import open_channel

MODEL = "scripted"
ADDED_MS = 5.0
CAPACITY = 8000.0
STREAMS = 16
FIRST_TOKENS = 4
WARM_UP = 20
Ask = Callable[[str, int], Awaitable[Answer]]


def asks(stack: contestants.Stack, engine: EngineClient, public: PublicClient) -> dict[str, Ask]:
    """The three ways to ask: (prompt, tokens) -> answer."""

    async def rest(prompt: str, tokens: int) -> Answer:
        body = stack.server.chat_body(prompt, tokens) | {"model": MODEL}
        return await stream(stack.server.port, "/v1/chat/completions", body)

    async def direct(prompt: str, tokens: int) -> Answer:
        return await engine.generate(f"bench-{time.perf_counter_ns()}", prompt, tokens)

    async def grpc(prompt: str, tokens: int) -> Answer:
        return await public.chat(MODEL, prompt, tokens)

    return {"engine directly": direct, "whole stack, gRPC": grpc, "whole stack, REST": rest}


async def first_tokens(ways: dict[str, Ask], trials: int) -> dict[str, list[float]]:
    """Milliseconds to the first token of each way, one request at a time in rotating order."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for trial in range(trials + WARM_UP):
        for name in rotated(list(ways), trial):
            answer = await ways[name](f"trial {trial}", FIRST_TOKENS)
            if trial >= WARM_UP:
                found[name].append(1000 * answer.first_s)
    return found


async def capacity(ways: dict[str, Ask], rounds: int, tokens: int) -> dict[str, list[float]]:
    """Tokens per second of STREAMS streams at once, by way and round."""
    found: dict[str, list[float]] = {name: [] for name in ways}
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
                found[name].append(speed)
    return found


def report(first: dict[str, list[float]], carried: dict[str, list[float]]) -> Report:
    """The tables and claims."""
    result = Report("latency")
    result.notes.append(
        "scripted engine without delays; client, Envoy, three services on the same cores"
    )
    base = percentile(first["engine directly"], 0.5)
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
    result.tables.append(Table("to the first token, one at a time, ms", columns, rows))
    speeds = tuple((name, f"{median(v):.0f}") for name, v in carried.items())
    title = f"{STREAMS} streams as fast as they go"
    result.tables.append(Table(title, ("way", "tokens/s"), speeds))
    added = percentile(first["whole stack, REST"], 0.5) - base
    result.claims += [
        ceiling("added to the first token over REST, p50", added, ADDED_MS, "ms"),
        floor(
            f"{STREAMS} scripted streams over REST",
            median(carried["whole stack, REST"]),
            CAPACITY,
            "tokens/s",
        ),
    ]
    return result


async def run(stack: contestants.Stack, trials: int, rounds: int, tokens: int) -> Report:
    """Measures a stack that runs."""
    async with (
        open_channel(stack.address("engine-0")) as engine,
        open_channel(f"127.0.0.1:{stack.server.port}") as public,
    ):
        ways = asks(stack, EngineClient(engine), PublicClient(public))
        first = await first_tokens(ways, trials)
        return report(first, await capacity(ways, rounds, tokens))


def main() -> int:
    """Parses the command line, runs, prints."""
    parser = arguments("latency", __doc__)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1000, help="per stream, for the capacity")
    args = parser.parse_args()
    with contestants.caravan([f"{MODEL}=scripted:?context=8192"]) as stack:
        result = asyncio.run(run(stack, args.trials, args.rounds, args.tokens))
    return finish(result, args.json)


if __name__ == "__main__":
    sys.exit(main())
