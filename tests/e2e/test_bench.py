"""The benches that need no peers and no big model run to their end against the real stack."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

QUICK = {
    "admission": ["--trials", "20"],
    "affinity": ["--turns", "1"],
    "cancel": ["--trials", "2"],
    "latency": ["--trials", "3", "--rounds", "1", "--tokens", "50"],
    "memory": [],
    "overload": ["--seconds", "2"],
    "remote": ["--trials", "3", "--rounds", "1", "--seconds", "0.3"],
}


@pytest.mark.parametrize("name", QUICK)
def test_bench_runs(name: str, tmp_path: Path) -> None:
    """It ends with a table and JSON of the same claims; whether they hold is for a quiet machine to say."""
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", f"bench.{name}", "--json", str(result), *QUICK[name]]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode in {0, 1}, ended.stderr
    claims = json.loads(result.read_text())["claims"]
    assert claims
    assert all(claim["claim"] in ended.stdout for claim in claims)
