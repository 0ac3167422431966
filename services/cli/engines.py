"""`caravan engines`, `caravan drain` and `caravan undrain`: who serves, and who is to stop serving."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Final, TextIO

from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.cli.coordinator_client import FAILED, OK, TIMEOUT_S, Where, connected
from services.cli.oncall_tables import engine_lines
from services.cli.status_view import messages
from services.cli.tables import count
from services.runtime.clock import Clock

_POLL_S: Final = 0.1
_MARGIN_S: Final = 30.0
"""How much longer than the grace an engine may take, before the command gives up waiting."""


@dataclass(frozen=True)
class Draining:
    """What to drain: the grace is in seconds; with `stop` the process ends, with `wait` the command waits until nothing runs."""

    engine_id: str
    grace_s: float
    stop: bool = False
    wait: bool = False


async def list_engines(where: Where, out: TextIO, *, as_json: bool) -> int:
    """Prints the engines; returns the exit code. Raises CommandError."""
    async with connected(where) as coordinator:
        found = await coordinator.ListEngines(pb.ListEnginesRequest(), timeout=TIMEOUT_S)
    if as_json:
        for told in messages(found.engines):
            out.write(json.dumps(told) + "\n")
    elif found.engines:
        out.writelines(f"{line}\n" for line in engine_lines(found.engines))
    else:
        out.write("no engines\n")
    return OK


async def drain(where: Where, asked: Draining, out: TextIO, clock: Clock) -> int:
    """Takes an engine out of service; returns the exit code: 1 if it was waited for in vain. Raises CommandError."""
    name = asked.engine_id
    async with connected(where) as coordinator:
        request = pb.DrainEngineRequest(engine_id=name, stop=asked.stop)
        request.grace.FromMicroseconds(round(asked.grace_s * 1e6))
        drained = await coordinator.DrainEngine(request, timeout=TIMEOUT_S)
        held = count(drained.leases, "request")
        out.write(f"{name} is being drained: {held} on it, {asked.grace_s:g} s to finish\n")
        if not asked.wait:
            return OK
        out.flush()
        before = await _find(coordinator, name)
        deadline = clock.monotonic() + asked.grace_s + _MARGIN_S
        while clock.monotonic() < deadline:
            engine = await _find(coordinator, name)
            if engine is None or before is None or engine.incarnation != before.incarnation:
                out.write(f"{name} has stopped\n")
                return OK
            # The engine has the last word: a lease may end before the engine has heard of the drain.
            is_draining = engine.load.phase == engine_pb.ENGINE_PHASE_DRAINING
            if is_draining and not engine.leases and not asked.stop:
                out.write(f"{name} is drained\n")
                return OK
            await asyncio.sleep(_POLL_S)
    out.write(f"{name} has not become empty\n")
    return FAILED


async def _find(
    coordinator: pb_grpc.CoordinatorServiceAsyncStub, engine_id: str
) -> pb.Engine | None:
    found = await coordinator.ListEngines(pb.ListEnginesRequest(), timeout=TIMEOUT_S)
    return next((engine for engine in found.engines if engine.engine_id == engine_id), None)


async def undrain(where: Where, engine_id: str, out: TextIO) -> int:
    """Puts an engine back into service; returns the exit code. Raises CommandError."""
    async with connected(where) as coordinator:
        request = pb.UndrainEngineRequest(engine_id=engine_id)
        await coordinator.UndrainEngine(request, timeout=TIMEOUT_S)
    out.write(f"{engine_id} is back in service\n")
    return OK
