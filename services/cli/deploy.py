"""`caravan deploy`: applies a file of deployments, lists them, removes one."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import aclosing, asynccontextmanager
from typing import Final, TextIO

import grpc
from caravan.coordinator.v1 import deployment_service_pb2 as pb
from caravan.coordinator.v1 import deployment_service_pb2_grpc as pb_grpc

from services.cli import deploy_tables
from services.cli.coordinator_client import FAILED, OK, TIMEOUT_S, CommandError, Where, complaint
from services.cli.deploy_arguments import Deploying, Removing, asked
from services.cli.deployment_watch import Records, watch_records
from services.runtime.channel import open_channel
from services.runtime.clock import SystemClock
from services.runtime.deployment_file import DeploymentFile, read_deployments

WRONG_USE: Final = 2


class MistakesError(CommandError):
    """The file has mistakes; nothing was changed."""


def run(options: argparse.Namespace) -> int:
    """Runs the command of the options; returns the exit code."""
    what = asked(options)
    try:
        asyncio.run(_run(what, Where(options.address, options.state_dir), sys.stdout))
    except CommandError as error:
        print(f"caravan deploy: {error}", file=sys.stderr)
        return WRONG_USE if isinstance(error, MistakesError) else FAILED
    return OK


async def _run(what: Deploying | Removing | None, where: Where, out: TextIO) -> None:
    async with _connected(where) as stub:
        commands = DeployCommands(stub, out)
        if isinstance(what, Deploying):
            await commands.apply(what)
        elif isinstance(what, Removing):
            await commands.remove(what)
        else:
            await commands.list(SystemClock().wall())


@asynccontextmanager
async def _connected(where: Where) -> AsyncIterator[pb_grpc.DeploymentServiceAsyncStub]:
    address = where.find()
    async with open_channel(address) as channel:
        try:
            yield pb_grpc.DeploymentServiceStub(channel)
        except grpc.aio.AioRpcError as error:
            raise CommandError(complaint(error, address)) from error


class DeployCommands:
    """What can be asked of the coordinator. What it refuses ends as grpc.aio.AioRpcError."""

    def __init__(self, stub: pb_grpc.DeploymentServiceAsyncStub, out: TextIO) -> None:
        self._stub = stub
        self._out = out

    async def list(self, now_s: float) -> None:
        """Prints the deployments; `now_s` is in seconds since the epoch."""
        found = await self._stub.ListDeployments(pb.ListDeploymentsRequest(), timeout=TIMEOUT_S)
        if not found.deployments:
            self._say("no deployments")
        else:
            for line in deploy_tables.deployments_text(found.deployments, now_s):
                self._say(line)

    async def apply(self, deploying: Deploying) -> None:
        """Applies a file. Raises CommandError, or MistakesError with all that is wrong in it."""
        read = _read(deploying)
        request = pb.ApplyDeploymentsRequest(
            deployments=read.deployments,
            remove_others=deploying.prune,
            # What is wrong in its form is told together with what is wrong in its meaning.
            validate_only=deploying.dry_run or bool(read.mistakes),
        )
        told = await self._stub.ApplyDeployments(request, timeout=TIMEOUT_S)
        mistakes = {mistake.field: mistake for mistake in (*told.mistakes, *read.mistakes)}
        if mistakes:
            lines = "\n".join(deploy_tables.mistakes_text(mistakes.values()))
            raise MistakesError(f"{deploying.file} has mistakes; nothing was changed:\n{lines}")
        for line in deploy_tables.changes_text(told.changes):
            self._say(line)
        if deploying.dry_run:
            self._say("Nothing was changed: this was a rehearsal.")
        elif deploying.wait_s is not None:
            names = {deployment.name for deployment in read.deployments}
            await self._wait(
                deploying.wait_s,
                lambda records: list(deploy_tables.unfinished(records, names)),
                lambda records: list(deploy_tables.failed(records, names)),
            )
            self._say("All engines are ready.")

    async def remove(self, removing: Removing) -> None:
        """Drains and removes a deployment. Raises CommandError."""
        request = pb.RemoveDeploymentRequest(name=removing.name)
        await self._stub.RemoveDeployment(request, timeout=TIMEOUT_S)
        if removing.wait_s is None:
            self._say(f"{removing.name} takes no more requests, and ends when none is left.")
            return
        await self._wait(
            removing.wait_s,
            lambda records: [
                f"{removing.name}: {record.note}"
                for record in records
                if record.deployment.name == removing.name
            ],
            lambda _: [],
        )
        self._say(f"{removing.name} is gone.")

    async def _wait(
        self,
        wait_s: float,
        unfinished: Callable[[Records], Collection[str]],
        failed: Callable[[Records], Collection[str]],
    ) -> None:
        """Returns when nothing is unfinished, also where the coordinator restarts meanwhile.

        Raises CommandError after `wait_s` seconds, or where something has failed.
        """
        left: Collection[str] = ["no coordinator answers"]
        try:
            async with (
                asyncio.timeout(wait_s),
                aclosing(watch_records(self._stub)) as watch,
            ):
                async for records in watch:
                    broken, left = failed(records), unfinished(records)
                    if broken:
                        raise CommandError("\n  ".join(["it has failed:", *broken]))
                    if not left:
                        return
        except TimeoutError:
            lines = "\n  ".join([f"not done after {wait_s:g} s:", *left])
            raise CommandError(lines) from None

    def _say(self, line: str) -> None:
        self._out.write(line + "\n")


def _read(deploying: Deploying) -> DeploymentFile:
    try:
        text = deploying.file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise MistakesError(f"cannot read {deploying.file}: {reason}") from error
    return read_deployments(text, deploying.file.parent)
