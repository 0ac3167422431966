"""How commands find and ask the coordinator, and what they say where that fails."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc

from services.cli.state_dir import StateDirError, address_of
from services.runtime.channel import open_channel
from services.runtime.errors import from_rpc_error

OK: Final = 0
FAILED: Final = 1
TIMEOUT_S: Final = 10.0
"""Longest time for one call."""


class CommandError(Exception):
    """The command cannot do what was asked; the message is for the user."""


@dataclass(frozen=True)
class Where:
    """Where the coordinator is: an address, host:port, or what the state directory of `caravan up` says."""

    address: str | None
    state_dir: Path

    def find(self) -> str:
        """The address. Raises CommandError."""
        try:
            return self.address or address_of(self.state_dir, "coordinator")
        except StateDirError as error:
            raise CommandError(str(error)) from error


@asynccontextmanager
async def connected(where: Where) -> AsyncIterator[pb_grpc.CoordinatorServiceAsyncStub]:
    """The coordinator, for one command. Raises CommandError where it does not answer, or refuses what is asked."""
    address = where.find()
    async with open_channel(address) as channel:
        try:
            yield pb_grpc.CoordinatorServiceStub(channel)
        except grpc.aio.AioRpcError as error:
            raise CommandError(complaint(error, address)) from error


def complaint(error: grpc.aio.AioRpcError, address: str) -> str:
    """What to tell the user of a call that failed."""
    meant = from_rpc_error(error, service="coordinator")
    if meant.reason in {"SERVICE_UNAVAILABLE", "DEADLINE_EXCEEDED"}:
        return f"no coordinator answers at {address}"
    return meant.message
