"""How soon a client that leaves gives its sequence back, for each way of leaving.

`python -m bench.cancel [--trials 100] [--real]`. The bounds are two decode steps + 50 ms, and what is being computed of the
request's own prompt, at most a chunk, which nothing can interrupt. The engine is the scripted one, whose times are known;
with --real it runs the 0.5B-shaped model, and its times are measured first. Time counts from closing the client's socket
until the engine, asked directly over gRPC, neither lists the request nor runs its sequence; the question itself is part of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from caravan.engine.v1 import engine_service_pb2

from bench import contestants, model_files
from bench.engine_client import EngineClient, EngineState
from bench.measures import gaps, median, percentile
from bench.report import Report, Table, arguments, ceiling, finish, progress
from bench.sse_client import Exchange, stream
from services.runtime.channel import open_channel

MODEL = "bench"
STEP_MS = 20.0
PREFILL_MS_PER_TOKEN = 0.5
SCRIPT = (
    f"scripted:?step_ms={STEP_MS:g}&prefill_ms_per_token={PREFILL_MS_PER_TOKEN:g}&context=16384"
)
CHUNK_TOKENS = 256
SLACK_MS = 50.0
LONG_PROMPT_WORDS = 1500
LOAD_STREAMS = 4
TOKENS = 12_000
TIMEOUT_S = 10.0
POLL_S = 0.001
PREFILLING = engine_service_pb2.REQUEST_PHASE_PREFILLING


@dataclass(frozen=True, slots=True)
class Speed:
    """How long the engine takes, in ms: a decode step, a step of all streams of the load and one more, a chunk of
    CHUNK_TOKENS of a prompt, and the short prompt of a trial, which is one chunk."""

    step_ms: float
    loaded_step_ms: float
    chunk_ms: float
    short_ms: float


@dataclass(frozen=True, slots=True)
class Bench:
    """What every trial needs."""

    port: int
    engine: EngineClient
    rng: random.Random
    speed: Speed

    def body(self, prompt: str, *, streamed: bool) -> dict[str, object]:
        """A request that would run much longer than the trial."""
        return {
            "model": MODEL,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "stream": streamed,
        }

    async def until(self, holds: Callable[[EngineState], bool], what: str) -> EngineState:
        """Asks the engine every millisecond or so until `holds` of its state, and returns that. Raises TimeoutError."""
        deadline = time.perf_counter() + TIMEOUT_S
        while time.perf_counter() < deadline:
            if holds(state := await self.engine.state()):
                return state
            await asyncio.sleep(POLL_S)
        raise TimeoutError(f"waited {TIMEOUT_S:.0f} s for {what}")


class Departure:
    """A request of a client that will leave."""

    def __init__(self, bench: Bench, exchange: Exchange, before: EngineState) -> None:
        self.exchange = exchange
        self._bench = bench
        self._before = before

    async def arrival(self) -> str:
        """Waits until the engine has the request; returns its id."""
        before = self._before.requests.keys()
        state = await self._bench.until(
            lambda seen: bool(seen.requests.keys() - before), "the request to reach the engine"
        )
        return (state.requests.keys() - before).pop()

    async def leave(self, request_id: str) -> float:
        """Disconnects; returns the milliseconds until the sequence was free."""
        left = time.perf_counter()
        self.exchange.leave()
        await self._bench.until(
            lambda seen: (
                request_id not in seen.requests
                and seen.active_sequences <= self._before.active_sequences
            ),
            f"the sequence of {request_id} to be free",
        )
        return 1000 * (time.perf_counter() - left)


@contextlib.asynccontextmanager
async def client(bench: Bench, prompt: str, *, streamed: bool = True) -> AsyncIterator[Departure]:
    """A client that has sent its request."""
    before = await bench.engine.state()
    body = bench.body(prompt, streamed=streamed)
    async with Exchange(bench.port, "/v1/chat/completions", body) as exchange:
        yield Departure(bench, exchange, before)


async def while_decoding(bench: Bench, trial: int) -> float:
    """Leaves after some tokens have come."""
    async with client(bench, f"decode {trial}") as departure:
        events = departure.exchange.events()
        for _ in range(bench.rng.randint(2, 6)):
            await anext(events)
        request_id = await departure.arrival()
        await asyncio.sleep(bench.rng.uniform(0, bench.speed.step_ms / 1000))
        return await departure.leave(request_id)


async def while_prefilling(bench: Bench, trial: int) -> float:
    """Leaves at some moment of a long prompt's prefill."""
    async with client(bench, f"{trial} " + "word " * LONG_PROMPT_WORDS) as departure:
        request_id = await departure.arrival()
        await bench.until(
            lambda seen: seen.requests[request_id].phase == PREFILLING, "the prefill to begin"
        )
        await asyncio.sleep(bench.rng.uniform(0, 2 * bench.speed.chunk_ms / 1000))
        return await departure.leave(request_id)


async def before_first_chunk(bench: Bench, trial: int) -> float:
    """Leaves as soon as the engine has the request, before anything was answered."""
    async with client(bench, f"first {trial}") as departure:
        return await departure.leave(await departure.arrival())


async def plain_under_load(bench: Bench, trial: int) -> float:
    """Leaves a plain request while other clients stream."""
    async with client(bench, f"plain {trial}", streamed=False) as departure:
        request_id = await departure.arrival()
        await asyncio.sleep(bench.rng.uniform(0.02, 0.15))
        return await departure.leave(request_id)


async def settled(bench: Bench) -> int:
    """Requests and sequences that are left when everybody has gone and the engine had time to notice."""
    with contextlib.suppress(TimeoutError):
        await bench.until(lambda seen: not seen.requests and not seen.active_sequences, "the end")
    state = await bench.engine.state()
    return len(state.requests) + state.active_sequences


@contextlib.asynccontextmanager
async def load(bench: Bench) -> AsyncIterator[None]:
    """Other clients that stream all the time until the block ends."""

    async def read(number: int) -> None:
        await stream(
            bench.port, "/v1/chat/completions", bench.body(f"load {number}", streamed=True)
        )

    clients = [asyncio.create_task(read(number)) for number in range(LOAD_STREAMS)]
    try:
        await bench.until(lambda seen: seen.active_sequences >= LOAD_STREAMS, "the load to run")
        yield
    finally:
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class Case:
    """A way of leaving. Until the sequence is free, two steps may pass, and what of its own prompt is being computed."""

    name: str
    trial: Callable[[Bench, int], Awaitable[float]]
    prompt: str = "computed"
    loaded: bool = False

    def bound_ms(self, speed: Speed) -> float:
        """How long the sequence may stay."""
        if self.prompt == "long":
            return speed.chunk_ms + speed.step_ms + SLACK_MS
        steps = 2 * (speed.loaded_step_ms if self.loaded else speed.step_ms)
        return steps + (speed.short_ms if self.prompt == "short" else 0) + SLACK_MS


CASES = (
    Case("while decoding", while_decoding),
    Case("while prefilling a long prompt", while_prefilling, prompt="long"),
    Case("before the first chunk", before_first_chunk, prompt="short"),
    Case("plain request, others stream", plain_under_load, prompt="short", loaded=True),
)
SCRIPTED = Speed(STEP_MS, STEP_MS, CHUNK_TOKENS * PREFILL_MS_PER_TOKEN, 0)


async def measured_speed(engine: EngineClient) -> Speed:
    """What a model that nobody else uses takes."""
    long = "word " * (2 * CHUNK_TOKENS)
    await engine.generate("warm-up", long, 2)
    short = await engine.generate("short", "plain 100", 32)
    first = await engine.generate("long", f"speed {long}", 2)
    streams = await asyncio.gather(
        *(engine.generate(f"load-{n}", f"load {n}", 32) for n in range(LOAD_STREAMS + 1))
    )
    return Speed(
        step_ms=1000 * median(gaps(short.times)),
        loaded_step_ms=1000 * median(gaps(streams[-1].times)),
        chunk_ms=1000 * first.first_s / 2,
        short_ms=1000 * short.first_s,
    )


async def run_case(bench: Bench, case: Case, trials: int) -> list[float]:
    """All trials of a case; milliseconds each."""
    progress(f"{case.name}: {trials} trials")
    async with contextlib.AsyncExitStack() as surroundings:
        if case.loaded:
            await surroundings.enter_async_context(load(bench))
        return [await case.trial(bench, number) for number in range(trials)]


async def run(stack: contestants.Stack, trials: int, seed: int, *, real: bool) -> Report:
    """Measures a stack that runs."""
    rng = random.Random(seed)
    async with open_channel(stack.address("engine-0")) as channel:
        engine = EngineClient(channel)
        speed = await measured_speed(engine) if real else SCRIPTED
        bench = Bench(stack.server.port, engine, rng, speed)
        found = {case: await run_case(bench, case, trials) for case in CASES}
        left = await settled(bench)
    return report(found, speed, left, "0.5B-shaped Q8_0 model" if real else "scripted engine")


def report(found: dict[Case, list[float]], speed: Speed, left: int, engine: str) -> Report:
    """The table and the claims."""
    result = Report("cancel")
    trials = min(map(len, found.values()))
    result.notes.append(
        f"{engine}: {speed.step_ms:.0f} ms a step ({speed.loaded_step_ms:.0f} ms beside {LOAD_STREAMS} streams), "
        f"{speed.chunk_ms:.0f} ms a chunk of {CHUNK_TOKENS} prompt tokens; {trials} trials each"
    )
    rows = tuple(
        (
            case.name,
            *(f"{percentile(times, share):.1f}" for share in (0.5, 0.9, 0.99)),
            f"{max(times):.1f}",
            f"{case.bound_ms(speed):.0f}",
        )
        for case, times in found.items()
    )
    columns = ("client leaves", "p50", "p90", "p99", "max", "bound")
    result.tables.append(Table("until the sequence is free, ms", columns, rows))
    result.claims += [
        ceiling(f"{case.name}, p99", percentile(times, 0.99), case.bound_ms(speed), "ms")
        for case, times in found.items()
    ]
    result.claims.append(ceiling("requests and sequences left at the end", left, 0))
    return result


def main() -> int:
    """Parses the command line, runs, prints."""
    parser = arguments("cancel", __doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--real", action="store_true", help="with llama.cpp and a 0.5B-shaped model"
    )
    args = parser.parse_args()
    source = str(model_files.ensure("qwen-0.5b")) if args.real else SCRIPT
    with contestants.caravan([f"{MODEL}={source}"]) as stack:
        result = asyncio.run(run(stack, args.trials, args.seed, real=args.real))
    return finish(result, args.json)


if __name__ == "__main__":
    sys.exit(main())
