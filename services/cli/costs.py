"""`caravan costs`: what deployments and their tenants have cost."""

from __future__ import annotations

import json
from typing import TextIO

from caravan.coordinator.v1 import coordinator_service_pb2 as pb

from services.cli.coordinator_client import OK, TIMEOUT_S, Where, connected
from services.cli.costs_tables import cost_lines
from services.cli.status_view import messages


async def list_costs(where: Where, out: TextIO, *, as_json: bool) -> int:
    """Prints the costs; returns the exit code. Raises CommandError."""
    async with connected(where) as coordinator:
        found = await coordinator.GetCosts(pb.GetCostsRequest(), timeout=TIMEOUT_S)
    if as_json:
        for told in messages(found.deployments):
            out.write(json.dumps(told) + "\n")
    elif found.deployments:
        out.writelines(f"{line}\n" for line in cost_lines(found.deployments))
    else:
        out.write("no costs\n")
    return OK
