"""How smooth one stream is beside two busy processes of equal priority, beside the llama.cpp server's.

`python -m bench.contention [--rounds 6]`. The whole stack with its default settings and the llama.cpp server of the
xllamacpp wheel give 64 greedy tokens in turn, on the same file, alone and beside the busy pair; the time between tokens
is what a client sees over REST. Each server and the busy pair run in sessions of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench import contestants, model_files, prompts
from bench.children import busy_pair
from bench.measures import gaps, median, percentile, rotated
from bench.neighbour import milliseconds
from bench.report import Report, Table, arguments, ceiling, finish, progress
from bench.sse_client import Answer, stream

TOKENS = 64
SHARE = 1 / 3
SITUATIONS = ("alone", "beside two busy processes")


@dataclass(slots=True)
class Seen:
    """What a client saw in one situation: times between tokens in seconds; tokens per second and p99 of each round."""

    gaps: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    tails: list[float] = field(default_factory=list)

    def add(self, answer: Answer) -> None:
        """Adds one stream."""
        between = gaps(answer.times)
        self.gaps += between
        self.speeds.append(len(between) / sum(between))
        self.tails.append(percentile(between, 0.99))


Found = Mapping[tuple[str, str], Seen]


def one_stream(server: contestants.Server, round_number: int) -> Answer:
    """One stream of TOKENS tokens, read to its end."""
    body = server.chat_body(prompts.chat_prompt(round_number, 0), TOKENS)
    answer = asyncio.run(stream(server.port, "/v1/chat/completions", body))
    if answer.finish != "length":
        raise RuntimeError(f"{server.title} did not give {TOKENS} tokens: {answer}")
    return answer


def measure(model: Path, rounds: int, threads: int) -> Found:
    """Runs all rounds, first alone, then beside the busy pair."""
    found = {(who, where): Seen() for where in SITUATIONS for who in ("caravan", "xllamacpp")}
    with contextlib.ExitStack() as everybody:
        stack = everybody.enter_context(contestants.caravan([f"{contestants.MODEL_NAME}={model}"]))
        peer = everybody.enter_context(contestants.xllamacpp_server(model, threads))
        servers = [stack.server, peer]
        for server in servers:
            one_stream(server, 99)
        for where in SITUATIONS:
            if where != SITUATIONS[0]:
                everybody.enter_context(busy_pair())
            for round_number in range(rounds):
                for server in rotated(servers, round_number):
                    # Other prompts in each situation: no cache knows them.
                    answer = one_stream(server, round_number + 100 * SITUATIONS.index(where))
                    found[server.key, where].add(answer)
                    speed = found[server.key, where].speeds[-1]
                    progress(f"round {round_number}, {where}, {server.key}: {speed:.1f} tokens/s")
    return found


def report(found: Found, rounds: int, threads: int) -> Report:
    """The tables and claims."""
    result = Report("contention")
    result.notes.append(
        f"0.5B-shaped Q8_0 model, {threads} threads, one REST stream of {TOKENS} tokens, {rounds} interleaved rounds"
    )
    for where in SITUATIONS:
        rows = tuple(
            (
                title,
                *milliseconds(found[who, where].gaps),
                f"{median(found[who, where].speeds):.1f}",
            )
            for who, title in (
                ("caravan", "caravan"),
                ("xllamacpp", "llama.cpp server (xllamacpp)"),
            )
        )
        columns = ("server", "p50", "p90", "p99", "max", "tokens/s")
        result.tables.append(Table(f"{where}: time between tokens, ms", columns, rows))
    _, beside = SITUATIONS
    # The median of the rounds: one disturbed round of either server must not decide.
    p99 = {who: median(found[who, beside].tails) for who in ("caravan", "xllamacpp")}
    result.claims += [
        ceiling(
            "p99 beside two busy processes, median of rounds, caravan / llama.cpp server",
            p99["caravan"] / p99["xllamacpp"],
            SHARE,
        ),
    ]
    return result


def main() -> int:
    """Parses the command line, runs, prints."""
    parser = arguments("contention", __doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--shape", choices=sorted(model_files.SHAPES), default="qwen-0.5b")
    args = parser.parse_args()
    model = model_files.ensure(args.shape)
    found = measure(model, args.rounds, args.threads)
    return finish(report(found, args.rounds, args.threads), args.json)


if __name__ == "__main__":
    sys.exit(main())
