"""The options of `caravan costs`."""

from __future__ import annotations

import argparse

from services.cli.oncall_arguments import CODES, Commands, add_coordinator, add_json

_COSTS = """\
Shows what deployments have cost at their providers, within the hour and the day that end now and
since the record begins, with their budgets. Under each: its tenants, the dearest of the day first."""


def add(commands: Commands) -> None:
    """Adds the command."""
    costs = commands.add_parser(
        "costs",
        help="what deployments and tenants have cost",
        description=_COSTS,
        epilog=CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_coordinator(costs)
    add_json(costs, "a JSON object per line")
