"""Runs every bench in turn: `python -m bench [--only NAME,...] [--write]`.

Each runs as a process of its own. The exit code is 1 if any claim does not hold. `--write` puts what was found into
bench/RESULTS.md, failed claims included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BENCHES = (
    "memory",
    "latency",
    "cancel",
    "acquire",
    "routing",
    "admission",
    "limits",
    "affinity",
    "overload",
    "remote",
    "litellm",
    "throughput",
    "warm",
    "publish",
    "conversations",
    "contention",
    "neighbour",
)


def results_page(found: Sequence[dict[str, Any]]) -> str:
    """The page of results, from the JSON of each bench."""
    machine = found[0]["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        "# Results",
        "Written by `make bench ARGS=--write`. How each figure is measured is said at the top of its bench.",
        f"Machine: {machine['cores']} cores of {machine['processor']}, {machine['system']}.",
        f"Software: Python {machine['python']}, {versions}.",
    ]
    for bench in found:
        parts.append(f"## {bench['bench']}")
        measured = bench["machine"]
        parts.append(
            f"`python -m bench.{bench['bench']}`, {measured['measured']}, commit {measured['commit']}"
        )
        parts.append(f"```\n{bench['text'].partition(chr(10))[2]}\n```")
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Runs the benches, all of them even when one fails."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default=",".join(BENCHES), help="default: %(default)s")
    parser.add_argument("--write", action="store_true", help="write bench/RESULTS.md")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := set(names) - set(BENCHES):
        parser.error(f"no such bench: {', '.join(sorted(unknown))}")
    results = HERE / ".peers" / "results"
    results.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        file = results / f"{name}.json"
        file.unlink(missing_ok=True)
        command = [sys.executable, "-m", f"bench.{name}", "--json", str(file)]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        print(flush=True)
    if args.write:
        # With --only, the others keep what an earlier run has found.
        files = [results / f"{name}.json" for name in BENCHES]
        found = [json.loads(file.read_text()) for file in files if file.exists()]
        (HERE / "RESULTS.md").write_text(results_page(found), encoding="utf-8")
    print(f"FAILED: {', '.join(failed)}" if failed else "every claim holds")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
