"""What is printed, what fails, and what the JSON says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bench.__main__ import results_page
from bench.report import Report, Table, align, as_json, ceiling, finish, floor, render


def test_claims_know_their_direction() -> None:
    """A floor holds at its bound and above, a ceiling at its bound and below."""
    assert floor("speed", 0.92, 0.92).kept
    assert not floor("speed", 0.919, 0.92).kept
    assert ceiling("time", 5.0, 5.0).kept
    assert not ceiling("time", 5.01, 5.0).kept


def test_no_number_keeps_no_claim() -> None:
    """A figure that could not be computed fails in both directions."""
    assert not floor("speed", math.nan, 0).kept
    assert not ceiling("time", math.nan, 1e9).kept


def test_one_broken_claim_fails_the_bench(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The exit code is 1, the claim is marked, and the JSON is written all the same."""
    report = Report("demo", claims=[floor("good", 2, 1), ceiling("bad", 2, 1, "ms")])
    assert finish(report, tmp_path / "demo.json") == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if line.startswith(("good", "bad"))] == [
        "PASS",
        "FAIL",
    ]
    written = json.loads((tmp_path / "demo.json").read_text())
    assert [claim["kept"] for claim in written["claims"]] == [True, False]


def test_kept_claims_succeed() -> None:
    """The exit code is 0 when every claim holds."""
    assert finish(Report("demo", claims=[floor("good", 2, 1)]), None) == 0


def test_columns_are_aligned() -> None:
    """Names to the left, figures to the right, under one rule."""
    table = Table("speeds", ("who", "tokens/s"), (("a", "9.5"), ("longer", "110.0")))
    assert align(table).splitlines() == [
        "speeds",
        "who     tokens/s",
        "------  --------",
        "a            9.5",
        "longer     110.0",
    ]


def test_json_rows_carry_their_column_names() -> None:
    """A reader of the JSON needs no knowledge of the order of columns."""
    table = Table("speeds", ("who", "tokens/s"), (("a", "9.5"),))
    written = as_json(Report("demo", tables=[table]))
    assert written["tables"] == [{"title": "speeds", "rows": [{"who": "a", "tokens/s": "9.5"}]}]


def test_a_report_without_claims_prints_none() -> None:
    """No empty table of claims."""
    assert "claim" not in render(Report("demo", notes=["a note"]))


def test_the_results_page_holds_every_bench_and_its_failures() -> None:
    """What did not hold is on the page too."""
    first = as_json(Report("first", claims=[floor("good", 2, 1)]))
    second = as_json(Report("second", claims=[floor("bad", 1, 2)]))
    page = results_page([first, second])
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## first",
        "## second",
    ]
    assert "PASS" in page
    assert "FAIL" in page
    assert "llama-cpp-python 0." in page
