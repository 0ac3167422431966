"""Tokens per second of the whole stack, beside a plain llama_decode loop and the two nearest servers.

`python -m bench.throughput [--rounds 5] [--peers raw,example,xllamacpp]`. Every round runs every contestant with 1 and
8 streams of 64 greedy tokens, on the same file, with the same threads, cells and batch size, one after the other, in
rotating order, with prompts that nobody has seen. Tokens per second count from the first request sent to the last
token received, prefill included. Ratios are medians of the ratios within rounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from bench import contestants, model_files, prompts
from bench.measures import median, paired_ratio, rotated
from bench.report import Claim, Report, Table, arguments, finish, floor, progress
from bench.sse_client import stream

STREAMS = (1, 8)
TOKENS = 64
RAW_SHARE = 0.92
PEER_SHARE = 1.0
PEERS = ("raw", "example", "xllamacpp")
TITLES = {
    "caravan": "caravan, REST through Envoy",
    "raw": "llama_decode loop, in process",
    "example": "llama-cpp-python example server",
    "xllamacpp": "llama.cpp server (xllamacpp)",
}
Runner = Callable[[int, int], float]


def server_runner(server: contestants.Server) -> Runner:
    """Measures a server: (round, streams) -> tokens per second."""

    async def together(round_number: int, streams: int) -> float:
        bodies = [
            server.chat_body(prompts.chat_prompt(round_number, streams, s), TOKENS)
            for s in range(streams)
        ]
        started = time.perf_counter()
        answers = await asyncio.gather(
            *(stream(server.port, "/v1/chat/completions", body) for body in bodies)
        )
        for answer in answers:
            if answer.finish != "length" or answer.completion_tokens not in {None, TOKENS}:
                raise RuntimeError(f"{server.title} did not give {TOKENS} tokens: {answer}")
        return streams * TOKENS / (max(a.times[-1] for a in answers) - started)

    return lambda round_number, streams: asyncio.run(together(round_number, streams))


def raw_runner(loop: contestants.RawLoop) -> Runner:
    """Measures the plain loop: (round, streams) -> tokens per second."""

    def run(round_number: int, streams: int) -> float:
        texts = [
            prompts.rendered(prompts.chat_prompt(round_number, streams, s)) for s in range(streams)
        ]
        result = loop.run(texts, TOKENS)
        return float(result["tokens"]) / float(result["wall_s"])

    return run


def measure(runners: dict[str, Runner], rounds: int) -> dict[tuple[str, int], list[float]]:
    """Runs all rounds; returns tokens per second by contestant and number of streams. Round 0 warms up and is not kept."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for round_number in range(rounds + 1):
        for streams in STREAMS:
            for key in rotated(sorted(runners), round_number):
                speed = runners[key](round_number, streams)
                progress(f"round {round_number}, {streams} streams, {key}: {speed:.1f} tokens/s")
                if round_number:
                    found[key, streams].append(speed)
    return found


def report(found: dict[tuple[str, int], list[float]], threads: int, rounds: int) -> Report:
    """Tables and claims of the measured speeds."""
    result = Report("throughput")
    result.notes.append(
        f"0.5B-shaped Q8_0 model, {threads} threads, {TOKENS} greedy tokens per stream, {rounds} interleaved rounds"
    )
    keys = [key for key in TITLES if (key, STREAMS[0]) in found]
    rows = []
    for key in keys:
        cells = [TITLES[key]]
        for streams in STREAMS:
            ratio = paired_ratio(found["caravan", streams], found[key, streams])
            cells += [f"{median(found[key, streams]):.1f}", f"{ratio:.3f}"]
        rows.append(tuple(cells))
    heads = [(f"{s} stream{'s' * (s > 1)}: tokens/s", "caravan / this") for s in STREAMS]
    columns = ("contestant", *(cell for pair in heads for cell in pair))
    result.tables.append(Table("tokens per second, medians", columns, tuple(rows)))
    result.claims += [claim(found, key, s) for key in keys if key != "caravan" for s in STREAMS]
    return result


def claim(found: dict[tuple[str, int], list[float]], key: str, streams: int) -> Claim:
    """The bound that holds against one contestant."""
    ratio = paired_ratio(found["caravan", streams], found[key, streams])
    bound = RAW_SHARE if key == "raw" else PEER_SHARE
    return floor(f"caravan / {TITLES[key]}, {streams} streams", ratio, bound)


def run(model: Path, peers: list[str], rounds: int, threads: int) -> Report:
    """Starts everybody, measures, ends everybody."""
    with contextlib.ExitStack() as everybody:
        runners: dict[str, Runner] = {}
        stack = everybody.enter_context(
            contestants.caravan(
                [f"{contestants.MODEL_NAME}={model}"], options=["--threads", str(threads)]
            )
        )
        runners["caravan"] = server_runner(stack.server)
        if "raw" in peers:
            loop = everybody.enter_context(contestants.raw_loop(model, threads))
            runners["raw"] = raw_runner(loop)
        if "example" in peers:
            server = everybody.enter_context(contestants.example_server(model, threads))
            runners["example"] = server_runner(server)
        if "xllamacpp" in peers:
            server = everybody.enter_context(contestants.xllamacpp_server(model, threads))
            runners["xllamacpp"] = server_runner(server)
        return report(measure(runners, rounds), threads, rounds)


def main() -> int:
    """Parses the command line, runs, prints."""
    parser = arguments("throughput", __doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--shape", choices=sorted(model_files.SHAPES), default="qwen-0.5b")
    parser.add_argument("--peers", default=",".join(PEERS), help="default: %(default)s")
    args = parser.parse_args()
    peers = args.peers.split(",") if args.peers else []
    if unknown := set(peers) - set(PEERS):
        parser.error(f"unknown peers: {', '.join(sorted(unknown))}")
    model = model_files.ensure(args.shape)
    return finish(run(model, peers, args.rounds, args.threads), args.json)


if __name__ == "__main__":
    sys.exit(main())
