"""Time to the first token of a prompt that was computed before, from each place where its KV state may be.

`python -m bench.warm [--prompts 3] [--long 1]`. A 0.5B-shaped Q8_0 model; prompts of 2,048 and of 8,192 random tokens,
asked through the whole stack (typed API, Envoy). Each prompt is asked cold and, once its blocks are saved (bench.publish
says what saving costs), again from the engine's cells. Then every process is ended and started anew with the same state
directory, now without resident sequences, and each prompt is asked twice: from disk, with its files put out of the page
cache first, and from RAM. Then the same on a stack of two engines: cold on one, again on the other. Ratios are cold to warm
of the same prompt; the medians count.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections import defaultdict
from pathlib import Path

from bench import contestants, model_files
from bench.engine_client import EngineClient, PublicClient, TokenAnswer
from bench.measures import median
from bench.report import Report, Table, arguments, finish, floor, progress
from services.runtime.channel import open_channel

LENGTHS = (2048, 8192)
ANSWER_TOKENS = 4
RESIDENT, RAM, DISK, OTHER = "resident cells", "RAM", "disk, after a restart", "another engine"
BOUNDS = {RESIDENT: 200.0, RAM: 150.0, DISK: 100.0, OTHER: 100.0}
SIZES = {"CARAVAN_ENGINE_CONTEXT_TOKENS": "10240", "CARAVAN_ENGINE_CELLS": "20480"}
# Nothing stays in cells, and nothing is taken into RAM, unless it was read.
NO_RESIDENTS = {"CARAVAN_ENGINE_RESIDENTS": "0"}
NO_RAM = {"CARAVAN_ENGINE_KV_RAM_BYTES": "0"}
Times = dict[tuple[str, int], list[tuple[float, float]]]
"""(place, prompt length) -> (cold, warm) seconds of each prompt."""


def random_prompt(length: int, number: int) -> list[int]:
    """Tokens that no other prompt begins with."""
    rng = random.Random(f"{length} {number}")
    return [rng.randrange(1000, 100_000) for _ in range(length)]


def expect(answer: TokenAnswer, kind: str, what: str) -> float:
    """Seconds to the first token. Raises RuntimeError if the prompt did not come from where it should."""
    progress(
        f"{what}: {1000 * answer.first_s:.1f} ms, {answer.kind}, {answer.cached_tokens} cached"
    )
    if answer.kind != kind:
        raise RuntimeError(f"{what} was {answer.kind}, not {kind}")
    return answer.first_s


def forget_pages(folder: Path) -> None:
    """Puts the files of a folder out of the page cache, so that they are read from the disk."""
    for path in folder.rglob("*.kvc"):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def whole_blocks(folder: Path) -> int:
    """How many whole blocks are saved; the end of an answer is a smaller file."""
    sizes = [path.stat().st_size for path in folder.rglob("*.kvc")]
    return sum(1 for size in sizes if size == max(sizes))


async def until_saved(folder: Path, blocks: int) -> None:
    """Waits until so many blocks are saved: that goes on after the answer."""
    async with asyncio.timeout(60):
        while whole_blocks(folder) < blocks:  # noqa: ASYNC110 - another process makes them
            await asyncio.sleep(0.05)


async def first_life(stack: contestants.Stack, prompts: list[list[int]], state: Path) -> Times:
    """Every prompt cold, then from the cells."""
    found: Times = defaultdict(list)
    blocks = 0
    async with open_channel(f"127.0.0.1:{stack.server.port}") as channel:
        public = PublicClient(channel)
        await public.complete(contestants.MODEL_NAME, random_prompt(32, 0), ANSWER_TOKENS)
        for prompt in prompts:
            answer = await public.complete(contestants.MODEL_NAME, prompt, ANSWER_TOKENS)
            cold = expect(answer, "cold", f"{len(prompt)} tokens, cold")
            blocks += len(prompt) // 256
            await until_saved(state, blocks)
            warm = []
            for _ in range(3):
                answer = await public.complete(contestants.MODEL_NAME, prompt, ANSWER_TOKENS)
                warm.append(expect(answer, "resident", RESIDENT))
            found[RESIDENT, len(prompt)].append((cold, median(warm)))
    return found


async def second_life(
    stack: contestants.Stack, prompts: list[list[int]], state: Path, before: Times
) -> Times:
    """Every prompt from disk and then from RAM."""
    found: Times = defaultdict(list)
    seen: dict[int, int] = defaultdict(int)
    async with open_channel(f"127.0.0.1:{stack.server.port}") as channel:
        public = PublicClient(channel)
        await public.complete(contestants.MODEL_NAME, random_prompt(32, 0), ANSWER_TOKENS)
        for prompt in prompts:
            length = len(prompt)
            cold = before[RESIDENT, length][seen[length]][0]
            seen[length] += 1
            forget_pages(state)
            for place in (DISK, RAM):
                answer = await public.complete(contestants.MODEL_NAME, prompt, ANSWER_TOKENS)
                found[place, length].append((cold, expect(answer, "exact", place)))
    return found


async def two_engines(stack: contestants.Stack, prompts: list[list[int]], state: Path) -> Times:
    """Every prompt cold on one engine and then on the other, both asked directly."""
    found: Times = defaultdict(list)
    async with (
        open_channel(stack.address("engine-0")) as one,
        open_channel(stack.address("engine-1")) as other,
    ):
        first, second = EngineClient(one), EngineClient(other)
        for engine in (first, second):
            await engine.complete("warm-up", random_prompt(32, 0), ANSWER_TOKENS)
        blocks = 0
        for number, prompt in enumerate(prompts):
            name = f"bench-{number}"
            cold = await first.complete(name, prompt, ANSWER_TOKENS)
            blocks += len(prompt) // 256
            await until_saved(state, blocks)
            warm = await second.complete(name, prompt, ANSWER_TOKENS)
            found[OTHER, len(prompt)].append(
                (expect(cold, "cold", "one engine"), expect(warm, "exact", OTHER))
            )
    return found


def report(found: Times) -> Report:
    """The table and the claims."""
    result = Report("warm")
    result.notes.append("0.5B-shaped Q8_0 model, whole stack, milliseconds to the first token")
    rows, ratios = [], {}
    for place in BOUNDS:
        for length in LENGTHS:
            pairs = found.get((place, length))
            if not pairs:
                continue
            ratios[place, length] = median([cold / warm for cold, warm in pairs])
            cold, warm = (median([pair[i] for pair in pairs]) for i in (0, 1))
            rows.append(
                (
                    place,
                    str(length),
                    f"{1000 * cold:.0f}",
                    f"{1000 * warm:.1f}",
                    f"{ratios[place, length]:.0f}",
                )
            )
    columns = ("from", "prompt tokens", "cold", "warm", "cold / warm")
    result.tables.append(Table("time to the first token, ms, medians", columns, tuple(rows)))
    for (place, length), ratio in ratios.items():
        shorter = ratios.get((place, LENGTHS[0]))
        bound = BOUNDS[place] if length == LENGTHS[0] or shorter is None else shorter
        result.claims.append(floor(f"{length} tokens, cold / {place}", ratio, bound))
    return result


def run(model: Path, prompts: int, long: int, threads: int) -> Report:
    """Three lives of a stack, on one state directory each."""
    counts = dict(zip(LENGTHS, (prompts, long), strict=True))
    asked = [random_prompt(n, i + 1) for n, count in counts.items() for i in range(count)]
    others = [random_prompt(n, i + 1001) for n, count in counts.items() for i in range(count)]
    served = [f"{contestants.MODEL_NAME}={model}"]
    options = ["--threads", str(threads)]
    found: Times = {}
    with contestants.state_folder() as state:
        with contestants.caravan(
            served, options=options, environment=SIZES, state_dir=state
        ) as stack:
            found |= asyncio.run(first_life(stack, asked, state))
        environment = SIZES | NO_RESIDENTS
        with contestants.caravan(
            served, options=options, environment=environment, state_dir=state
        ) as stack:
            found |= asyncio.run(second_life(stack, asked, state, found))
    with (
        contestants.state_folder() as state,
        contestants.caravan(
            served,
            options=[*options, "--engines", "2"],
            environment=SIZES | NO_RAM,
            state_dir=state,
        ) as stack,
    ):
        found |= asyncio.run(two_engines(stack, others, state))
    return report(found)


def main() -> int:
    """Parses the command line, runs, prints."""
    parser = arguments("warm", __doc__)
    parser.add_argument("--prompts", type=int, default=3, help=f"of {LENGTHS[0]} tokens")
    parser.add_argument("--long", type=int, default=1, help=f"of {LENGTHS[1]} tokens")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    model = model_files.ensure("qwen-0.5b")
    return finish(run(model, args.prompts, args.long, args.threads), args.json)


if __name__ == "__main__":
    sys.exit(main())
