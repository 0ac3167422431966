"""`caravan remote`: engines in front of providers, how they stand, and what the person on call can do about it."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, TextIO

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.engine.v1 import remote_service_pb2 as remote_pb
from caravan.engine.v1 import remote_service_pb2_grpc as remote_grpc
from google.protobuf.json_format import MessageToDict

from services.cli.coordinator_client import (
    FAILED,
    OK,
    TIMEOUT_S,
    CommandError,
    Where,
    connected,
)
from services.cli.remote_tables import Seen, remote_lines
from services.runtime.channel import open_channel
from services.runtime.errors import from_rpc_error

_MODES: Final = {
    "open": remote_pb.SetBreakerRequest.MODE_OPEN,
    "closed": remote_pb.SetBreakerRequest.MODE_CLOSED,
    "auto": remote_pb.SetBreakerRequest.MODE_AUTOMATIC,
}
_WRONG_USE: Final = 2


def run(options: argparse.Namespace) -> int:
    """Runs the command of the options; returns the exit code."""
    where = Where(options.address, options.state_dir)
    try:
        if options.action == "rotate":
            secret = sys.stdin.read().strip() if options.secret_from_stdin else None
            return asyncio.run(rotate(where, options.deployment, secret, sys.stdout))
        if options.action == "breaker":
            if options.mode == "auto" and options.for_s is not None:
                print("caravan remote: auto has no end, so --for means nothing", file=sys.stderr)
                return _WRONG_USE
            held = hold_breaker(where, options.deployment, options.mode, options.for_s, sys.stdout)
            return asyncio.run(held)
        return asyncio.run(show(where, sys.stdout, as_json=options.as_json))
    except CommandError as error:
        print(f"caravan remote: {error}", file=sys.stderr)
        return FAILED


async def show(where: Where, out: TextIO, *, as_json: bool) -> int:
    """Prints how the engines stand; returns the exit code. Raises CommandError."""
    engines = await _find(where)
    seen = await asyncio.gather(*(look_at(engine) for engine in engines))
    if as_json:
        for one in seen:
            out.write(json.dumps(_as_dict(one)) + "\n")
    elif seen:
        out.writelines(f"{line}\n" for line in remote_lines(seen))
    else:
        out.write("no engine in front of a provider\n")
    return OK


async def rotate(where: Where, deployment: str, secret: str | None, out: TextIO) -> int:
    """Replaces the credential, by `secret` or (None) by what stands where it comes from. Raises CommandError."""
    request = remote_pb.RotateCredentialRequest(reread=True)
    if secret is not None:
        request = remote_pb.RotateCredentialRequest(secret=secret)

    async def tell(engine: remote_grpc.RemoteServiceAsyncStub) -> str:
        fresh = await engine.RotateCredential(request, timeout=TIMEOUT_S)
        return f"has credential #{fresh.generation}"

    return await _tell_all(where, deployment, tell, out)


async def hold_breaker(
    where: Where, deployment: str, mode: str, for_s: float | None, out: TextIO
) -> int:
    """Sets the breaker: `open`, `closed` or `auto`, for so many seconds or without an end. Raises CommandError."""
    request = remote_pb.SetBreakerRequest(mode=_MODES[mode])
    if for_s is not None:
        request.duration.FromMicroseconds(round(for_s * 1e6))

    async def tell(engine: remote_grpc.RemoteServiceAsyncStub) -> str:
        await engine.SetBreaker(request, timeout=TIMEOUT_S)
        return "goes by failures" if mode == "auto" else f"holds its breaker {mode}"

    return await _tell_all(where, deployment, tell, out)


async def _tell_all(
    where: Where,
    deployment: str,
    tell: Callable[[remote_grpc.RemoteServiceAsyncStub], Awaitable[str]],
    out: TextIO,
) -> int:
    engines = [e for e in await _find(where) if e.model.name == deployment]
    if not engines:
        raise CommandError(f"no engine in front of a provider serves {deployment!r}")
    failed = False
    for engine in engines:
        try:
            async with _engine(engine.address) as stub:
                told = await tell(stub)
        except CommandError as error:
            failed = True
            told = f"did not: {error}"
        out.write(f"{engine.engine_id} {told}\n")
    return FAILED if failed else OK


async def _find(where: Where) -> list[pb.Engine]:
    async with connected(where) as coordinator:
        found = await coordinator.ListEngines(pb.ListEnginesRequest(), timeout=TIMEOUT_S)
    return [engine for engine in found.engines if engine.model.provider]


async def look_at(engine: pb.Engine, timeout_s: float = TIMEOUT_S) -> Seen:
    """How an engine stands with its provider; never fails: a problem is a part of what is seen."""
    try:
        async with _engine(engine.address) as stub:
            request = remote_pb.GetRemoteStatusRequest()
            return Seen(engine, await stub.GetRemoteStatus(request, timeout=timeout_s))
    except CommandError as error:
        return Seen(engine, None, str(error))


@asynccontextmanager
async def _engine(address: str) -> AsyncIterator[remote_grpc.RemoteServiceAsyncStub]:
    async with open_channel(address) as channel:
        try:
            yield remote_grpc.RemoteServiceStub(channel)
        except grpc.aio.AioRpcError as error:
            raise CommandError(from_rpc_error(error, service="engine").message) from error


def _as_dict(one: Seen) -> dict[str, object]:
    told: dict[str, object] = {
        "engineId": one.engine.engine_id,
        "deployment": one.engine.model.name,
    }
    if one.status is None:
        return {**told, "problem": one.problem}
    shown: dict[str, object] = MessageToDict(one.status, always_print_fields_with_no_presence=True)
    return told | shown
