"""Resident memory of everything but the engine, idle and after work.

`python -m bench.memory`. RSS counts shared pages (the Python interpreter, gRPC's library) once per process; PSS divides
them among the processes that share them. Both are printed; the claim is made for RSS, the larger. `caravan up` itself and
its guard process count too.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from pathlib import Path

from bench import contestants
from bench.report import Report, Table, arguments, ceiling, finish
from bench.sse_client import stream

LIMIT_MB = 400.0
MODEL = "scripted"
SETTLE_S = 3.0
WORK_STREAMS = 8
WORK_TOKENS = 256


def resident(pid: int) -> tuple[float, float]:
    """(RSS, PSS) of a process in MB of 1,000,000 bytes."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = dict(re.findall(r"^(Rss|Pss):\s+(\d+) kB$", text, re.MULTILINE))
    return int(found["Rss"]) * 1024 / 1e6, int(found["Pss"]) * 1024 / 1e6


def children(pid: int) -> list[int]:
    """Ids of the direct children of a process."""
    listed = (Path(f"/proc/{pid}/task") / str(pid) / "children").read_text()
    return [int(word) for word in listed.split()]


def processes(stack: contestants.Stack) -> dict[str, int]:
    """Name and id of all processes of the stack: those of endpoints.json, `caravan up`, and what else it started."""
    named = {str(p["name"]): int(p["pid"]) for p in stack.processes}
    found = {"caravan up": stack.server.pid} | named
    others = [pid for pid in children(stack.server.pid) if pid not in named.values()]
    return found | {f"guard {index}": pid for index, pid in enumerate(others)}


async def work(stack: contestants.Stack) -> None:
    """Some streams, so that every code path of a request has been loaded."""
    body = stack.server.chat_body("work", WORK_TOKENS) | {"model": MODEL}
    await asyncio.gather(
        *(stream(stack.server.port, "/v1/chat/completions", body) for _ in range(WORK_STREAMS))
    )


def main() -> int:
    """Parses the command line, runs, prints."""
    args = arguments("memory", __doc__).parse_args()
    with contestants.caravan([f"{MODEL}=scripted:?"]) as stack:
        time.sleep(SETTLE_S)
        idle = {name: resident(pid) for name, pid in processes(stack).items()}
        asyncio.run(work(stack))
        time.sleep(SETTLE_S)
        after = {name: resident(pid) for name, pid in processes(stack).items()}
    front = [name for name in idle if not name.startswith("engine")]
    result = Report("memory")
    result.notes.append(f"scripted engine; idle, and idle again after {WORK_STREAMS} streams")
    total = (
        "all but the engine",
        *(f"{sum(seen[n][i] for n in front):.1f}" for seen in (idle, after) for i in (0, 1)),
    )
    rows = [(name, *(f"{value:.1f}" for value in (*idle[name], *after[name]))) for name in idle]
    columns = ("process", "RSS idle", "PSS idle", "RSS after", "PSS after")
    result.tables.append(Table("resident memory, MB", columns, (*rows, total)))
    result.claims += [
        ceiling("RSS of all but the engine, idle", sum(idle[n][0] for n in front), LIMIT_MB, "MB"),
        ceiling("the same after work", sum(after[n][0] for n in front), LIMIT_MB, "MB"),
    ]
    return finish(result, args.json)


if __name__ == "__main__":
    sys.exit(main())
