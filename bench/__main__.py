"""Runs every bench in turn: `python -m bench [--only NAME,...] [--results FOLDER]`.

Each runs as a process of its own and writes FOLDER/NAME.json. The exit code is 1 if any claim does not hold.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

BENCHES = ("memory", "latency", "cancel", "throughput", "contention", "neighbour")


def main() -> int:
    """Runs the benches, all of them even when one fails."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default=",".join(BENCHES), help="default: %(default)s")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / ".peers" / "results"
    )
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := set(names) - set(BENCHES):
        parser.error(f"no such bench: {', '.join(sorted(unknown))}")
    args.results.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        command = [
            sys.executable,
            "-m",
            f"bench.{name}",
            "--json",
            str(args.results / f"{name}.json"),
        ]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        print(flush=True)
    print(f"FAILED: {', '.join(failed)}" if failed else "every claim holds")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
