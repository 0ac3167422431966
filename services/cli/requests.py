"""`caravan requests` and `caravan cancel`: what runs and waits, and its end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TextIO

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb

from services.cli.coordinator_client import (
    FAILED,
    OK,
    TIMEOUT_S,
    Where,
    complaint,
    connected,
)
from services.cli.oncall_tables import request_lines
from services.cli.status_view import messages
from services.cli.tables import count


async def list_requests(where: Where, out: TextIO, *, as_json: bool) -> int:
    """Prints the requests in flight, oldest first; returns the exit code. Raises CommandError."""
    async with connected(where) as coordinator:
        found = await coordinator.ListInflight(pb.ListInflightRequest(), timeout=TIMEOUT_S)
    if as_json:
        for told in messages(found.requests):
            out.write(json.dumps(told) + "\n")
    elif found.requests:
        out.writelines(f"{line}\n" for line in request_lines(found.requests))
    else:
        out.write("no requests\n")
    return OK


async def cancel(where: Where, ids: Sequence[str], out: TextIO, errors: TextIO) -> int:
    """Ends requests; returns the exit code: 1 if one of them was not in flight. Raises CommandError."""
    code = OK
    async with connected(where) as coordinator:
        for request_id in ids:
            try:
                await coordinator.Cancel(pb.CancelRequest(request_id=request_id), timeout=TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise
                # The others are still to be ended.
                errors.write(f"caravan cancel: {complaint(error, where.find())}\n")
                code = FAILED
            else:
                out.write(f"{request_id} is being ended\n")
    return code


async def cancel_tenant(where: Where, tenant: str, out: TextIO) -> int:
    """Ends all requests of a tenant; returns the exit code. Raises CommandError."""
    async with connected(where) as coordinator:
        request = pb.CancelTenantRequest(tenant=tenant)
        ended = await coordinator.CancelTenant(request, timeout=TIMEOUT_S)
    verb = "is" if ended.requests == 1 else "are"
    out.write(f"{count(ended.requests, 'request')} of '{tenant}' {verb} being ended\n")
    return OK
