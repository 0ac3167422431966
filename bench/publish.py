"""What saving KV blocks costs the decode loop: eight streams with the cache and without it, in turn.

`python -m bench.publish [--rounds 5]`. Two stacks run, one with the cache and one without; each round asks both for 8 streams
with a 250-token prompt that nobody has seen and 96 tokens of answer, so that every stream saves a block while all decode, and a
tail at its end. Throughput counts tokens from the first token of the last stream to start until the last token: decoding only.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections import defaultdict
from pathlib import Path

from bench import contestants, model_files
from bench.engine_client import PublicClient, TokenAnswer
from bench.measures import median, paired_ratio, rotated
from bench.report import Report, Table, arguments, finish, floor, progress
from services.runtime.channel import open_channel

STREAMS = 8
PROMPT_TOKENS = 250
ANSWER_TOKENS = 96
SHARE = 0.98
WITH, WITHOUT = "with the cache", "without"


def decode_speed(answers: list[TokenAnswer]) -> float:
    """Tokens per second while all streams decode and until the last ends."""
    started = max(answer.times[0] for answer in answers)
    ended = max(answer.times[-1] for answer in answers)
    events = sum(1 for answer in answers for at in answer.times if at > started)
    return events / (ended - started)


async def ask(port: int, round_number: int, name: str) -> float:
    """One round of one stack."""
    async with open_channel(f"127.0.0.1:{port}") as channel:
        public = PublicClient(channel)
        rng = random.Random(f"{round_number} {name}")
        prompts = [
            [rng.randrange(1000, 100_000) for _ in range(PROMPT_TOKENS)] for _ in range(STREAMS)
        ]
        answers = await asyncio.gather(
            *(public.complete(contestants.MODEL_NAME, p, ANSWER_TOKENS) for p in prompts)
        )
    return decode_speed(list(answers))


def run(model: Path, rounds: int, threads: int) -> Report:
    """Both stacks, in turn."""
    served = [f"{contestants.MODEL_NAME}={model}"]
    options = ["--threads", str(threads)]
    found: dict[str, list[float]] = defaultdict(list)
    with (
        contestants.caravan(served, options=options, log_name="caravan-with") as with_cache,
        contestants.caravan(
            served,
            options=[*options, "--no-cache"],
            environment={"CARAVAN_ENGINE_KV_RAM_BYTES": "0"},
            log_name="caravan-without",
        ) as without,
    ):
        ports = {WITH: with_cache.server.port, WITHOUT: without.server.port}
        for round_number in range(rounds + 1):
            for name in rotated(list(ports), round_number):
                speed = asyncio.run(ask(ports[name], round_number, name))
                progress(f"round {round_number}, {name}: {speed:.1f} tokens/s")
                if round_number:
                    found[name].append(speed)
    result = Report("publish")
    result.notes.append(f"0.5B-shaped Q8_0 model, {STREAMS} streams, {rounds} interleaved rounds")
    rows = tuple((name, f"{median(speeds):.1f}") for name, speeds in found.items())
    result.tables.append(Table("decoding, tokens per second", ("stack", "tokens/s"), rows))
    ratio = paired_ratio(found[WITH], found[WITHOUT])
    result.claims.append(floor("with the cache / without", ratio, SHARE))
    return result


def main() -> int:
    """Parses the command line, runs, prints."""
    parser = arguments("publish", __doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    model = model_files.ensure("qwen-0.5b")
    return finish(run(model, args.rounds, args.threads), args.json)


if __name__ == "__main__":
    sys.exit(main())
