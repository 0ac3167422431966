"""What OpenMP's settings cost alone and beside two busy processes: the measurement behind the engine's defaults.

`python -m bench.neighbour [--rounds 3]`. llama.cpp's threads meet at about two hundred barriers per token and spin there
for a while. While a competitor holds a core, the thread that spins burns its own share of the processor and waits for one
that cannot run. Each setting is a plain llama_decode loop in a process of its own; rounds are interleaved.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import contestants, model_files, prompts
from bench.children import busy_pair
from bench.measures import median, paired_ratio, percentile, rotated
from bench.report import Report, Table, arguments, ceiling, finish, floor, progress
from services.engine.settings import EngineSettings

TOKENS = 65
IDLE_SHARE = 0.97
CONTENDED_SHARE = 0.45


@dataclass(frozen=True, slots=True)
class Setting:
    """How one loop runs."""

    name: str
    threads: int
    environment: Mapping[str, str]


@dataclass(slots=True)
class Found:
    """Step times in seconds and tokens per second of each round, alone and beside the busy pair."""

    alone: list[float] = field(default_factory=list)
    alone_speed: list[float] = field(default_factory=list)
    contended: list[float] = field(default_factory=list)


DEFAULT = "library default (300000)"
SPIN = EngineSettings().spin_count
CHOSEN = f"GOMP_SPINCOUNT={SPIN}"


def settings(threads: int) -> list[Setting]:
    """What is compared."""
    spins = [
        Setting(f"GOMP_SPINCOUNT={count}", threads, {"GOMP_SPINCOUNT": str(count)})
        for count in sorted({0, 1000, SPIN, 20000})
    ]
    return [
        Setting(DEFAULT, threads, {}),
        *spins,
        Setting("OMP_WAIT_POLICY=passive", threads, {"OMP_WAIT_POLICY": "passive"}),
        Setting("one thread, default spin", 1, {}),
    ]


def measure(model: Path, compared: Sequence[Setting], rounds: int) -> dict[str, Found]:
    """Runs all rounds, first alone, then beside the busy pair."""
    found = {setting.name: Found() for setting in compared}
    with contextlib.ExitStack() as everybody:
        loops = {
            s.name: everybody.enter_context(contestants.raw_loop(model, s.threads, s.environment))
            for s in compared
        }
        for round_number in range(rounds):
            for name in rotated(list(loops), round_number):
                steps = _steps(loops[name], round_number)
                found[name].alone += steps
                found[name].alone_speed.append(len(steps) / sum(steps))
                progress(
                    f"round {round_number}, alone, {name}: {len(steps) / sum(steps):.1f} tokens/s"
                )
        with busy_pair():
            for round_number in range(rounds):
                for name in rotated(list(loops), round_number):
                    steps = _steps(loops[name], round_number)
                    found[name].contended += steps
                    progress(
                        f"round {round_number}, beside two, {name}: {len(steps) / sum(steps):.1f} tokens/s"
                    )
    return found


def _steps(loop: contestants.RawLoop, round_number: int) -> list[float]:
    text = prompts.rendered(prompts.chat_prompt(round_number, 0))
    return [float(step) for step in loop.run([text], TOKENS)["step_s"]]


def milliseconds(steps: Sequence[float]) -> tuple[str, str, str, str]:
    """p50, p90, p99 and the longest of the times."""
    values = (*(percentile(steps, share) for share in (0.5, 0.9, 0.99)), max(steps))
    p50, p90, p99, longest = (f"{1000 * value:.1f}" for value in values)
    return p50, p90, p99, longest


def report(found: Mapping[str, Found], rounds: int) -> Report:
    """The tables and the two claims behind the default."""
    result = Report("neighbour")
    result.notes.append(
        f"plain llama_decode loop, 0.5B-shaped Q8_0 model, one stream, {rounds} interleaved rounds of {TOKENS - 1} steps"
    )
    heads = ("p50", "p90", "p99", "max", "tokens/s")
    alone = tuple(
        (name, *milliseconds(f.alone), f"{median(f.alone_speed):.1f}") for name, f in found.items()
    )
    contended = tuple(
        (name, *milliseconds(f.contended), f"{len(f.contended) / sum(f.contended):.1f}")
        for name, f in found.items()
    )
    result.tables += [
        Table("alone: step time, ms", ("setting", *heads), alone),
        Table("beside two busy processes: step time, ms", ("setting", *heads), contended),
    ]
    chosen, default = found[CHOSEN], found[DEFAULT]
    speed = paired_ratio(chosen.alone_speed, default.alone_speed)
    tail = percentile(chosen.contended, 0.99) / percentile(default.contended, 0.99)
    result.claims += [
        floor(f"{CHOSEN}: speed alone / default's", speed, IDLE_SHARE),
        ceiling(f"{CHOSEN}: p99 step beside two / default's", tail, CONTENDED_SHARE),
    ]
    return result


def main() -> int:
    """Parses the command line, runs, prints."""
    parser = arguments("neighbour", __doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--shape", choices=sorted(model_files.SHAPES), default="qwen-0.5b")
    args = parser.parse_args()
    found = measure(model_files.ensure(args.shape), settings(args.threads), args.rounds)
    return finish(report(found, args.rounds), args.json)


if __name__ == "__main__":
    sys.exit(main())
