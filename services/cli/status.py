"""`caravan status`: a live view of models, engines and requests, for the person on call."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, TextIO, TypeVar

import grpc
from caravan.cache.v1 import cache_service_pb2 as cache_pb
from caravan.cache.v1 import cache_service_pb2_grpc as cache_grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc
from caravan.coordinator.v1 import deployment_service_pb2 as deployment_pb
from caravan.coordinator.v1 import deployment_service_pb2_grpc as deployment_grpc

from services.cli.coordinator_client import FAILED, OK, CommandError, Where, complaint
from services.cli.remote import look_at
from services.cli.remote_tables import Seen
from services.cli.reused_tokens import ReusedTokens, fetch
from services.cli.state_dir import StateDirError, address_of, metrics_of
from services.cli.status_view import Snapshot, as_json, page
from services.runtime.channel import open_channel

_LOOK_TIMEOUT_S: Final = 2.0
_REDRAW_S: Final = 1.0
_OPEN_SCREEN: Final = "\x1b[?1049h\x1b[?25l"  # the alternate screen, without the cursor
_CLOSE_SCREEN: Final = "\x1b[?25h\x1b[?1049l"
_HOME: Final = "\x1b[H"
_END_OF_LINE: Final = "\x1b[K"
_END_OF_SCREEN: Final = "\x1b[J"
Answer = TypeVar("Answer")


class Looker:
    """Asks the processes how they are. Addresses are found anew each time: they change when a stack is started again."""

    def __init__(self, where: Where) -> None:
        self._where = where
        self._channels: dict[str, tuple[str, grpc.aio.Channel]] = {}

    async def close(self) -> None:
        """Closes the channels."""
        for _, channel in self._channels.values():
            await channel.close()

    async def look(self) -> Snapshot:
        """What is seen now; never fails: a problem is a part of what is seen."""
        try:
            address = self._where.find()
        except CommandError as error:
            return Snapshot(problem=str(error))
        channel = await self._channel("coordinator", address)
        stub: pb_grpc.CoordinatorServiceAsyncStub = pb_grpc.CoordinatorServiceStub(channel)
        try:
            models = await stub.ListModels(pb.ListModelsRequest(), timeout=_LOOK_TIMEOUT_S)
            engines = await stub.ListEngines(pb.ListEnginesRequest(), timeout=_LOOK_TIMEOUT_S)
            requests = await stub.ListInflight(pb.ListInflightRequest(), timeout=_LOOK_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            return Snapshot(address, problem=complaint(error, address))
        deployments = await _deployments(channel)
        costs = await _if_there(stub.GetCosts(pb.GetCostsRequest(), timeout=_LOOK_TIMEOUT_S))
        return Snapshot(
            address,
            models.models,
            engines.engines,
            requests.requests,
            () if deployments is None else deployments.deployments,
            await self._cache(),
            await self._reused(),
            await _remotes(engines.engines),
            () if costs is None else costs.deployments,
        )

    async def _reused(self) -> ReusedTokens | None:
        if self._where.address is not None:
            return None
        try:
            url = metrics_of(self._where.state_dir, "gateway")
        except StateDirError:
            return None
        return await asyncio.to_thread(fetch, url)

    async def _cache(self) -> cache_pb.GetStatsResponse | None:
        if self._where.address is not None:
            return None
        try:
            address = address_of(self._where.state_dir, "cache")
        except StateDirError:
            return None
        channel = await self._channel("cache", address)
        stub: cache_grpc.CacheServiceAsyncStub = cache_grpc.CacheServiceStub(channel)
        return await _if_there(stub.GetStats(cache_pb.GetStatsRequest(), timeout=_LOOK_TIMEOUT_S))

    async def _channel(self, service: str, address: str) -> grpc.aio.Channel:
        before = self._channels.get(service)
        if before is not None and before[0] == address:
            return before[1]
        if before is not None:
            await before[1].close()
        channel = open_channel(address)
        self._channels[service] = address, channel
        return channel


async def _remotes(engines: Iterable[pb.Engine]) -> list[Seen]:
    remotes = (engine for engine in engines if engine.model.provider)
    return await asyncio.gather(*(look_at(engine, _LOOK_TIMEOUT_S) for engine in remotes))


async def _deployments(channel: grpc.aio.Channel) -> deployment_pb.ListDeploymentsResponse | None:
    stub: deployment_grpc.DeploymentServiceAsyncStub = deployment_grpc.DeploymentServiceStub(
        channel
    )
    request = deployment_pb.ListDeploymentsRequest()
    return await _if_there(stub.ListDeployments(request, timeout=_LOOK_TIMEOUT_S))


async def _if_there(call: Awaitable[Answer]) -> Answer | None:
    """The answer of a service that may be missing."""
    try:
        return await call
    except grpc.aio.AioRpcError:
        return None


async def print_once(where: Where, out: TextIO, errors: TextIO, *, in_json: bool) -> int:
    """Prints the page, or one JSON object; returns the exit code: 1 if the coordinator does not answer."""
    looker = Looker(where)
    try:
        snapshot = await looker.look()
    finally:
        await looker.close()
    if snapshot.problem:
        errors.write(f"caravan status: {snapshot.problem}\n")
        return FAILED
    if in_json:
        out.write(json.dumps(as_json(snapshot)) + "\n")
    else:
        out.writelines(f"{line}\n" for line in page(snapshot))
    return OK


async def watch(
    where: Where,
    out: TextIO,
    size: Callable[[], tuple[int, int]] = shutil.get_terminal_size,
) -> int:
    """Redraws the page each second until Ctrl-C or SIGTERM; returns the exit code. `size` gives columns and rows."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    looker = Looker(where)
    out.write(_OPEN_SCREEN)
    try:
        while not stop.is_set():
            snapshot = await looker.look()
            columns, rows = size()
            # One column less: erasing the rest of a line that is full would erase its last character.
            out.write(frame(page(snapshot, columns - 1, rows - 1), rows))
            out.flush()
            await _wait(stop, _REDRAW_S)
    finally:
        out.write(_CLOSE_SCREEN)
        out.flush()
        await looker.close()
    return OK


def frame(lines: list[str], rows: int) -> str:
    """What draws the lines over those of the frame before, without a flicker; lines below the terminal's end are left out."""
    drawn = "\r\n".join(f"{line}{_END_OF_LINE}" for line in lines[:rows])
    return f"{_HOME}{drawn}{_END_OF_SCREEN}"


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return
