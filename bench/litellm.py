"""The whole stack beside the LiteLLM proxy, in front of the same provider: added latency, and CPU seconds per request.

`python -m bench.litellm [--trials 150]`. The provider is the scripted one, which costs both sides the same. Latency: one request at a
time, in turn to the provider directly and through each of the two, with the same httpx client; streamed (to the first token) and plain (to
the answer). What a side adds is the difference of the medians. CPU: rounds of requests of 64 tokens, 8 at a time, in turn; what all
processes of a side have spent in its own round, by the kernel's count. Once the provider answers as fast as it can, and once it is paced as
models are, so that every chunk travels by itself.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from bench.http_client import HttpClient
from bench.litellm_proxy import litellm_proxy
from bench.measures import median, percentile, rotated
from bench.processor_time import tree_cpu_s
from bench.provider_process import MODEL, Provider, provider, stack_before
from bench.report import Claim, Report, Table, arguments, ceiling, finish, progress
from bench.sse_client import Answer

DIRECT, OURS, THEIRS = "provider directly", "caravan (REST through Envoy)", "LiteLLM proxy"
STREAM, PLAIN = "streamed", "plain"
RATIO = 1 / 3
AT_ONCE = 8
TOKENS = 64
FIRST_TOKENS = 4
PACES_MS = (0, 10)
"""Between two tokens of the provider, for the CPU time."""
WARM_UP = 20
Ask = Callable[[str, int], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class Side:
    """One way to the provider. `pid` is the root of its processes; 0 for the direct way."""

    client: HttpClient
    pid: int

    def asks(self) -> Mapping[str, Ask]:
        """The two ways to ask."""
        return {STREAM: self.client.stream, PLAIN: self.client.plain}


@dataclass(slots=True)
class Found:
    """What was measured of one side: milliseconds by way of asking, and CPU milliseconds per request by way and pace."""

    latency_ms: dict[str, list[float]] = field(default_factory=lambda: {STREAM: [], PLAIN: []})
    cpu_ms: dict[tuple[str, int], list[float]] = field(
        default_factory=lambda: {(way, pace): [] for way in (STREAM, PLAIN) for pace in PACES_MS}
    )


async def latency(sides: Mapping[str, Side], trials: int, found: Mapping[str, Found]) -> None:
    """One request at a time, in rotating order."""
    for trial in range(trials + WARM_UP):
        for name in rotated(list(sides), trial):
            for way, ask in sides[name].asks().items():
                answer = await ask(f"trial {trial}", FIRST_TOKENS)
                if answer.completion_tokens != FIRST_TOKENS:
                    raise RuntimeError(f"{name}, {way}: {answer.completion_tokens} tokens")
                if trial >= WARM_UP:
                    found[name].latency_ms[way].append(1000 * answer.first_s)


async def cpu(
    sides: Mapping[str, Side], pace_ms: int, rounds: int, requests: int, found: Mapping[str, Found]
) -> None:
    """Rounds of requests, AT_ONCE at a time; what a side spends while the other is asked does not count."""
    for number in range(rounds + 1):
        for name in rotated(list(sides), number):
            for way, ask in sides[name].asks().items():
                before = tree_cpu_s(sides[name].pid)
                await _many(ask, requests)
                spent_ms = 1000 * (tree_cpu_s(sides[name].pid) - before) / requests
                said = f"CPU, {pace_ms} ms, round {number}, {name}, {way}"
                progress(f"{said}: {spent_ms:.2f} ms a request")
                if number:
                    found[name].cpu_ms[way, pace_ms].append(spent_ms)


async def _many(ask: Ask, requests: int) -> None:
    numbers = iter(range(requests))

    async def worker() -> None:
        for number in numbers:
            answer = await ask(f"request {number}", TOKENS)
            if answer.completion_tokens != TOKENS:
                raise RuntimeError(f"{answer.completion_tokens} tokens instead of {TOKENS}")

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))


async def run(
    sides: Mapping[str, Side], served: Provider, trials: int, rounds: int, requests: int
) -> dict[str, Found]:
    """Measures sides that run."""
    found = {name: Found() for name in sides}
    progress("latency")
    served.script(tokens=FIRST_TOKENS, pace_s=0)
    await latency(sides, trials, found)
    compared = {name: side for name, side in sides.items() if name != DIRECT}
    for pace_ms in PACES_MS:
        served.script(tokens=TOKENS, pace_s=pace_ms / 1000)
        await cpu(compared, pace_ms, rounds, requests, found)
    return found


def added(found: Mapping[str, Found], name: str, way: str) -> float:
    """What a side adds to the median, in milliseconds."""
    base = percentile(found[DIRECT].latency_ms[way], 0.5)
    return percentile(found[name].latency_ms[way], 0.5) - base


def report(found: Mapping[str, Found]) -> Report:
    """The tables and the claims."""
    result = Report("litellm")
    result.notes.append(
        f"scripted provider; client, provider and both sides on the same cores; CPU: {AT_ONCE} at a time, {TOKENS} tokens"
    )
    result.notes.append(
        "both with their defaults: ours gathers deltas for 30 ms, LiteLLM sends each; idle work counts for both"
    )
    for way in (STREAM, PLAIN):
        rows = tuple(
            (
                name,
                f"{percentile(side.latency_ms[way], 0.5):.2f}",
                f"{percentile(side.latency_ms[way], 0.99):.2f}",
                f"{added(found, name, way):.2f}",
            )
            for name, side in found.items()
        )
        what = "to the first token" if way == STREAM else "to the answer"
        title = f"{way}: {what}, one at a time, ms"
        result.tables.append(Table(title, ("way", "p50", "p99", "p50 added"), rows))
    result.tables.append(cpu_table(found))
    result.claims += claims(found)
    return result


def cpu_table(found: Mapping[str, Found]) -> Table:
    """What a request costs each side."""
    rows = tuple(
        (
            f"{way}, {f'{pace_ms} ms between tokens' if pace_ms else 'as fast as it goes'}",
            *(f"{median(found[name].cpu_ms[way, pace_ms]):.2f}" for name in (OURS, THEIRS)),
        )
        for way in (STREAM, PLAIN)
        for pace_ms in PACES_MS
    )
    return Table("CPU of all processes per request, ms", ("requests", OURS, THEIRS), rows)


def claims(found: Mapping[str, Found]) -> list[Claim]:
    """A third of what LiteLLM adds, and of what it costs."""
    kept = [
        ceiling(
            f"{way}: added latency p50, ours / LiteLLM's",
            added(found, OURS, way) / added(found, THEIRS, way),
            RATIO,
        )
        for way in (STREAM, PLAIN)
    ]
    for way, pace_ms in found[OURS].cpu_ms:
        ours, theirs = (median(found[name].cpu_ms[way, pace_ms]) for name in (OURS, THEIRS))
        paced = f"paced {pace_ms} ms" if pace_ms else "not paced"
        kept.append(ceiling(f"{way}, {paced}: CPU, ours / LiteLLM's", ours / theirs, RATIO))
    return kept


async def measure(
    served: Provider, ours: tuple[int, int], theirs: tuple[int, int], counts: tuple[int, int, int]
) -> dict[str, Found]:
    """Opens a client of each; `ours` and `theirs` are port and process."""
    async with (
        HttpClient(served.base_url, MODEL) as direct,
        HttpClient(f"http://127.0.0.1:{ours[0]}/v1", MODEL) as to_us,
        HttpClient(f"http://127.0.0.1:{theirs[0]}/v1", MODEL) as to_them,
    ):
        sides = {
            DIRECT: Side(direct, 0),
            OURS: Side(to_us, ours[1]),
            THEIRS: Side(to_them, theirs[1]),
        }
        return await run(sides, served, *counts)


def main() -> int:
    """Parses the command line, runs, prints."""
    parser = arguments("litellm", __doc__)
    parser.add_argument("--trials", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64, help="of a round and side")
    args = parser.parse_args()
    counts = (args.trials, args.rounds, args.requests)
    with provider() as served, stack_before(served) as stack, litellm_proxy(served) as proxy:
        ours = (stack.server.port, stack.server.pid)
        found = asyncio.run(measure(served, ours, (proxy.port, proxy.pid), counts))
    return finish(report(found), args.json)


if __name__ == "__main__":
    sys.exit(main())
