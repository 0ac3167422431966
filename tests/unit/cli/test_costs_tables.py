"""The table of costs."""

from __future__ import annotations

import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import deployment_pb2

from services.cli.costs_tables import cost_lines, money, tokens_text

NANO = 1_000_000_000


def test_budgets_and_states() -> None:
    """Each line has the limits that are its own; without one there is no state. Names cannot command the terminal."""
    told = pb.DeploymentCosts(
        deployment="chat\x1b[2J",
        total=pb.Costs(hour_nanousd=3 * NANO, requests=7, prompt_tokens=1_500_000),
        budget=deployment_pb2.Budget(usd_per_hour=2.5, usd_per_day=20, tenant_usd_per_day=5),
        exceeded=True,
        tenants=[pb.TenantCosts(tenant="ants"), pb.TenantCosts(exceeded=True)],
    )
    bare = pb.DeploymentCosts(deployment="small", exceeded=False)
    _, *lines = cost_lines([told, bare])
    assert [line.split() for line in lines] == [
        [
            *("chat?[2J", "$3.00", "$0.00", "$0.00", "$2.50/h", "$20.00/day", "exceeded"),
            *("7", "1.5M", "0", "0"),
        ],
        ["ants", *["$0.00"] * 3, "$5.00/day", "ok", *["0"] * 4],
        ["-", *["$0.00"] * 3, "$5.00/day", "exceeded", *["0"] * 4],
        ["small", *["$0.00"] * 3, "-", "-", *["0"] * 4],
    ]
    assert lines[1].startswith("  ants")


@pytest.mark.parametrize(
    ("nanousd", "text"),
    [(0, "$0.00"), (1_234 * NANO, "$1,234.00"), (10_000_000, "$0.01"), (12_000, "$0.000012")],
)
def test_money(nanousd: int, text: str) -> None:
    """Cents; more digits below one."""
    assert money(nanousd) == text


def test_tokens() -> None:
    """Short."""
    assert [tokens_text(n) for n in (0, 999, 1_000, 1_260_000, 2_000_000_000)] == [
        *("0", "999", "1.0K", "1.3M", "2.0G"),
    ]
