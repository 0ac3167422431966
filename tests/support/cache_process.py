"""The cache service as a process that a test kills with SIGKILL and starts again on its port; and calls to it, step by step."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from caravan.cache.v1 import cache_service_pb2 as pb
from caravan.cache.v1 import cache_service_pb2_grpc as pb_grpc

from services.runtime.channel import open_channel
from tests.support.ports import free_port

_READY = b"serving on port"
_PATIENCE_S = 30.0


class CacheProcess:
    """`python -m services.cache`, on a port of its own. Settings are environment variables. Bound to no event loop."""

    def __init__(self, **settings: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._env = {
            **os.environ,
            "CARAVAN_CACHE_ADDRESS": self.address,
            "CARAVAN_CACHE_METRICS_ADDRESS": "127.0.0.1:0",
            **settings,
        }
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Starts it, unless it runs, and waits until it serves."""
        if self._process is None:
            async with asyncio.timeout(_PATIENCE_S):
                await asyncio.to_thread(self._start)

    def _start(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.cache"], env=self._env, stderr=subprocess.PIPE
        )
        self._process = process
        assert process.stderr is not None
        # What it logs later fits into the pipe.
        assert any(_READY in line for line in process.stderr), "the process ended"

    def kill(self) -> None:
        """SIGKILL; returns when it is dead. Nothing where it does not run."""
        if self._process is not None:
            with self._process as process:
                process.kill()
            self._process = None

    async def stats(self) -> pb.GetStatsResponse:
        """What it counts."""
        async with open_channel(self.address) as channel:
            stub: pb_grpc.CacheServiceAsyncStub = pb_grpc.CacheServiceStub(channel)
            return await stub.GetStats(pb.GetStatsRequest(), timeout=_PATIENCE_S)

    async def until(self, condition: Callable[[pb.GetStatsResponse], bool]) -> None:
        """Returns when what it counts is so; fails the test after a while."""
        async with asyncio.timeout(_PATIENCE_S):
            while not condition(await self.stats()):  # noqa: ASYNC110 - it is another process
                await asyncio.sleep(0.01)


class SteppedStub:
    """The stub of the service, with `at("Method:before")` and `at("Method:after")` awaited around each call."""

    def __init__(self, stub: Any, at: Callable[[str], Awaitable[None]]) -> None:
        self._stub = stub
        self._at = at

    def __getattr__(self, name: str) -> Callable[..., Awaitable[object]]:
        method = getattr(self._stub, name)

        async def call(request: object, timeout: float) -> object:  # noqa: ASYNC109 - as in gRPC
            await self._at(f"{name}:before")
            answer: object = await method(request, timeout=timeout)
            await self._at(f"{name}:after")
            return answer

        return call
