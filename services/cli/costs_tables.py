"""The table of `caravan costs`. Pure. Names come from clients, so whatever could command the terminal is replaced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from caravan.coordinator.v1 import coordinator_service_pb2 as pb

from services.cli.tables import aligned, printable

_HEAD: Final = (
    *("DEPLOYMENT", "HOUR", "DAY", "TOTAL", "BUDGET", "STATE"),
    *("REQUESTS", "PROMPT", "CACHED", "ANSWER"),
)
_RIGHT: Final = (1, 2, 3, 6, 7, 8, 9)
_NANO: Final = 1_000_000_000
_CENT: Final = 0.01


def cost_lines(deployments: Sequence[pb.DeploymentCosts]) -> Iterator[str]:
    """A line for each deployment, in the order given, and under it one for each of its tenants."""
    rows: list[tuple[str, ...]] = []
    for told in deployments:
        budget = told.budget
        limits = _limits(budget.usd_per_hour, budget.usd_per_day)
        name = printable(told.deployment)
        rows.append(_row(name, told.total, limits, exceeded=told.exceeded))
        limits = _limits(budget.tenant_usd_per_hour, budget.tenant_usd_per_day)
        rows += (
            _row(f"  {printable(one.tenant) or '-'}", one.costs, limits, exceeded=one.exceeded)
            for one in told.tenants
        )
    return aligned([_HEAD, *rows], right=_RIGHT)


def _row(name: str, costs: pb.Costs, limits: str, *, exceeded: bool) -> tuple[str, ...]:
    state = "exceeded" if exceeded else "ok"
    tokens = (costs.prompt_tokens, costs.cached_tokens, costs.completion_tokens)
    return (
        name,
        *map(money, (costs.hour_nanousd, costs.day_nanousd, costs.total_nanousd)),
        limits or "-",
        state if limits else "-",
        str(costs.requests),
        *map(tokens_text, tokens),
    )


def _limits(usd_per_hour: float, usd_per_day: float) -> str:
    parts = ((usd_per_hour, "h"), (usd_per_day, "day"))
    return " ".join(f"{money(round(usd * _NANO))}/{span}" for usd, span in parts if usd)


def money(nanousd: int) -> str:
    """US dollars for people: cents, and more digits where there would be nothing else to see."""
    usd = nanousd / _NANO
    return f"${usd:,.2f}" if not nanousd or usd >= _CENT else f"${usd:.6f}"


def tokens_text(count: int) -> str:
    """A number of tokens for people, such as `1.5M`."""
    for size, unit in ((1_000_000_000, "G"), (1_000_000, "M"), (1_000, "K")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
