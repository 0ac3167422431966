"""A service as its operator starts it: `python -m services.NAME`, on free ports."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_PATIENCE_S = 30


@asynccontextmanager
async def process(service: str, **settings: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The service as a process; killed at the end if it still runs. Settings are environment variables."""
    env = {
        **os.environ,
        f"CARAVAN_{service.upper()}_ADDRESS": "127.0.0.1:0",
        f"CARAVAN_{service.upper()}_METRICS_ADDRESS": "127.0.0.1:0",
        **settings,
    }
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", f"services.{service}", env=env, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.communicate()


async def log_line(
    running: asyncio.subprocess.Process, pattern: re.Pattern[bytes]
) -> re.Match[bytes]:
    """The next line of the log that matches. Fails the test if the process ends before."""
    assert running.stderr is not None
    async with asyncio.timeout(_PATIENCE_S):
        async for text in running.stderr:
            found = pattern.search(text)
            if found:
                return found
    raise AssertionError("the process ended")


async def failure(service: str, **settings: str) -> tuple[int, str]:
    """Exit code and stderr of a process that must not start."""
    async with process(service, **settings) as running:
        async with asyncio.timeout(_PATIENCE_S):
            _, errors = await running.communicate()
        assert running.returncode is not None
        return running.returncode, errors.decode()
