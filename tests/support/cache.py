"""A cache service on a loopback port, and engines that a test moves by hand."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from caravan.cache.v1 import cache_service_pb2 as pb
from caravan.cache.v1 import cache_service_pb2_grpc as pb_grpc
from prometheus_client import CollectorRegistry

from services.cache.__main__ import compose, sweep
from services.cache.integrity import check_integrity
from services.cache.rows import CopyState
from services.cache.servicer import CacheServicer, register
from services.cache.settings import CacheSettings
from services.cache.state import CacheState
from services.runtime.channel import open_channel
from services.runtime.clock import Clock, CountingIds, ManualClock, SystemClock
from services.runtime.errors import CaravanError, from_rpc_error
from services.runtime.server import ServiceServer, cancel_all

CALL_TIMEOUT_S = 10.0
MIB = 1024 * 1024
UNPRESSED = {"pressure_high": 1.0, "pressure_low": 0.99}


async def until(condition: Callable[[], bool], deadline_s: float = 10.0) -> None:
    """Returns when the condition holds; fails the test after the deadline."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110 - the states of the service have no events
            await asyncio.sleep(0.002)


async def refused(call: Awaitable[object]) -> CaravanError:
    """The error of the table with which a call ends."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error, service="cache service")
    raise AssertionError("the call was not refused")


def key(name: object) -> bytes:
    """A key that stands for a name."""
    return hashlib.sha256(repr(name).encode()).digest()


ROOT_KEY = key("the empty prompt")


def block(
    name: object,
    parent: object = None,
    *,
    start: int = 0,
    size: int = 1,
    tokens: Sequence[int] = (),
    hits: int = 0,
) -> pb.Block:
    """A block; without a parent it is the first one of a prompt. With tokens it may be used in part."""
    return pb.Block(
        key=key(name),
        parent_key=ROOT_KEY if parent is None else key(parent),
        start=start,
        end=start + (len(tokens) or 256),
        size_bytes=size,
        save_reason=pb.SAVE_REASON_COLD,
        tokens=tokens,
        hits=hits,
    )


def chain(*names: object, size: int = 1) -> list[pb.Block]:
    """Blocks that follow each other."""
    return [
        block(name, names[at - 1] if at else None, start=256 * at, size=size)
        for at, name in enumerate(names)
    ]


def root(
    root_id: str = "disk",
    tier: pb.Tier.ValueType = pb.TIER_DISK,
    quota: int = MIB,
    *,
    writable: bool = True,
) -> pb.Root:
    """A root as an engine declares it."""
    return pb.Root(root_id=root_id, tier=tier, quota_bytes=quota, writable=writable)


class EnginePeer:
    """The engine's side of a session."""

    def __init__(
        self, stub: pb_grpc.CacheServiceAsyncStub, engine_id: str, roots: Sequence[pb.Root]
    ) -> None:
        self.engine_id = engine_id
        self.roots = roots
        self.session_id = ""
        self._stub = stub
        self._call = stub.Join()

    async def join(self, address: str = "", ram_quota: int = MIB) -> pb.Welcome:
        """Registers; returns when the service has taken it. Each root still awaits its inventory."""
        register = pb.Registration(
            engine_id=self.engine_id,
            address=address or f"{self.engine_id}:7010",
            roots=self.roots,
            ram_quota_bytes=ram_quota,
        )
        await self.send(pb.JoinRequest(register=register))
        response = await self.receive()
        assert response.WhichOneof("message") == "welcome"
        self.session_id = response.welcome.session_id
        return response.welcome

    async def inventory(
        self, blocks: Sequence[pb.Block] = (), root_id: str = "disk", *, complete: bool = True
    ) -> None:
        """Tells what a root holds."""
        part = pb.Inventory(root_id=root_id, blocks=blocks, complete=complete)
        await self.send(pb.JoinRequest(inventory=part))

    async def ram(self, added: Sequence[pb.Block] = (), removed: Sequence[bytes] = ()) -> None:
        """Tells what changed in RAM."""
        await self.send(pb.JoinRequest(ram=pb.RamChange(added=added, removed=removed)))

    async def send(self, request: pb.JoinRequest) -> None:
        """Sends a message; the service takes it some time later."""
        await self._call.write(request)

    async def receive(self) -> pb.JoinResponse:
        """The next message of the service."""
        async with asyncio.timeout(CALL_TIMEOUT_S):
            response = await self._call.read()
        assert isinstance(response, pb.JoinResponse), "the stream ended"
        return response

    async def drop(self) -> pb.Drop:
        """The next message, which must be a Drop."""
        response = await self.receive()
        assert response.WhichOneof("message") == "drop"
        return response.drop

    async def confirm(self, drop: pb.Drop) -> None:
        """Tells that a Drop was carried out."""
        await self.send(pb.JoinRequest(dropped=pb.Dropped(root_id=drop.root_id, keys=drop.keys)))

    async def settle(self) -> pb.Settle:
        """The next message, which must be a Settle."""
        response = await self.receive()
        assert response.WhichOneof("message") == "settle"
        return response.settle

    async def settled(self, settle: pb.Settle, found: pb.Block | None) -> None:
        """Tells what was found."""
        message = pb.Settled(root_id=settle.root_id, key=settle.key, block=found)
        await self.send(pb.JoinRequest(settled=message))

    async def end(self) -> CaravanError:
        """Waits until the service ends the stream; returns the error."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                while await self._call.read() is not grpc.aio.EOF:
                    pass
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error, service="cache service")
        raise AssertionError("the stream ended without an error")

    async def leave(self) -> None:
        """Ends the stream in good order."""
        await self._call.done_writing()
        async with asyncio.timeout(CALL_TIMEOUT_S):
            assert await self._call.code() is grpc.StatusCode.OK

    def die(self) -> None:
        """Breaks the stream."""
        self._call.cancel()

    # --- calls ---------------------------------------------------------------------------------------------------

    async def reserve(self, wanted: pb.Block, root_id: str = "disk") -> pb.ReserveResponse:
        """Asks to save a block."""
        request = pb.ReserveRequest(session_id=self.session_id, root_id=root_id, block=wanted)
        return await self._stub.Reserve(request, timeout=CALL_TIMEOUT_S)

    async def check(self, token: str) -> bool:
        """Asks whether the file may get its name."""
        request = pb.CheckReservationRequest(session_id=self.session_id, token=token)
        return (await self._stub.CheckReservation(request, timeout=CALL_TIMEOUT_S)).valid

    async def mark(self, token: str) -> bool:
        """Tells that the file has its name."""
        request = pb.MarkPublishedRequest(session_id=self.session_id, token=token)
        return (await self._stub.MarkPublished(request, timeout=CALL_TIMEOUT_S)).valid

    async def announce(self, token: str, saved: pb.Block) -> bool:
        """Tells that the block is saved."""
        request = pb.AnnounceRequest(session_id=self.session_id, token=token, block=saved)
        return (await self._stub.Announce(request, timeout=CALL_TIMEOUT_S)).valid

    async def cancel(self, token: str) -> bool:
        """Gives a reservation back."""
        request = pb.CancelReservationRequest(session_id=self.session_id, token=token)
        return (await self._stub.CancelReservation(request, timeout=CALL_TIMEOUT_S)).found

    async def save(self, *blocks: pb.Block, root_id: str = "disk") -> None:
        """Saves blocks the way a writer does."""
        for one in blocks:
            granted = await self.reserve(one, root_id)
            assert granted.outcome == pb.RESERVE_OUTCOME_GRANTED, granted
            assert await self.check(granted.token)
            assert await self.mark(granted.token)
            assert await self.announce(granted.token, one)

    async def acquire(
        self, names: Sequence[object], *, skip: int = 0, tail: Sequence[int] = ()
    ) -> pb.AcquireResponse:
        """Asks for the chain of some names."""
        request = pb.AcquireRequest(
            session_id=self.session_id,
            keys=b"".join(map(key, names)),
            skip=skip,
            root_key=ROOT_KEY,
            tail=tail,
        )
        return await self._stub.Acquire(request, timeout=CALL_TIMEOUT_S)

    async def release(self, claim_id: str) -> bool:
        """Gives a claim back."""
        request = pb.ReleaseRequest(session_id=self.session_id, claim_id=claim_id)
        return (await self._stub.Release(request, timeout=CALL_TIMEOUT_S)).found

    async def wait(self, name: object, timeout_s: float = 5.0) -> pb.WaitOutcome.ValueType:
        """Waits for a block."""
        request = pb.WaitRequest(session_id=self.session_id, key=key(name))
        request.timeout.FromMilliseconds(round(1000 * timeout_s))
        return (await self._stub.Wait(request, timeout=timeout_s + CALL_TIMEOUT_S)).outcome


@dataclass
class CacheRig:
    """A running cache service and what a test needs of it."""

    address: str
    state: CacheState
    servicer: CacheServicer
    registry: CollectorRegistry
    clock: Clock
    stub: pb_grpc.CacheServiceAsyncStub

    def advance(self, seconds: float) -> None:
        """Moves the clock on, where it is one that stands still."""
        assert isinstance(self.clock, ManualClock)
        self.clock.advance(seconds)

    def metric(self, name: str, **labels: str) -> float:
        """The value of a series at this moment."""
        value = self.registry.get_sample_value(name, labels)
        assert value is not None, name
        return value

    async def engine(
        self,
        engine_id: str = "engine-0",
        roots: Sequence[pb.Root] | None = None,
        *,
        held: Sequence[pb.Block] = (),
    ) -> EnginePeer:
        """An engine that has joined and told what its roots hold (`held` in the first one)."""
        peer = EnginePeer(self.stub, engine_id, [root()] if roots is None else roots)
        await peer.join()
        for number, one in enumerate(peer.roots):
            await peer.inventory(held if number == 0 else (), one.root_id)
        session = self.state.session(peer.session_id)
        await until(lambda: not session.scanning)
        return peer

    def available(self, name: object) -> int:
        """How many copies of a block can be used."""
        row = self.state.core.index.rows.get(key(name))
        copies = row.copies if row is not None else ()
        return sum(copy.state is CopyState.AVAILABLE for copy in copies)


@asynccontextmanager
async def running_cache(clock: Clock | None = None, **settings: Any) -> AsyncIterator[CacheRig]:
    """A cache service in this process, with fields of CacheSettings.

    By default on the clock of the machine, and it expires by itself. With a ManualClock nothing expires until the test
    calls `servicer.expire()`. A machine that is short of memory drops nothing, unless a test wants it. At the end nothing may be left that belonged to a session.
    """
    chosen = CacheSettings(**{**UNPRESSED, **settings})
    registry = CollectorRegistry()
    time = clock or SystemClock()
    servicer = compose(chosen, registry, time, CountingIds())
    server = ServiceServer("127.0.0.1:0", [], drain_grace_s=0)
    register(servicer, server.services)
    port = await server.start()
    sweeper = None
    if clock is None:
        sweeper = asyncio.create_task(sweep(servicer, chosen.heartbeat_s / 2))
    address = f"127.0.0.1:{port}"
    state = servicer.state
    try:
        async with open_channel(address) as channel:
            stub = pb_grpc.CacheServiceStub(channel)
            yield CacheRig(address, state, servicer, registry, time, stub)
            check_integrity(state.core)
    finally:
        await cancel_all([sweeper] if sweeper else [])
        await server.drain_and_stop()
    await until(lambda: servicer.edge.is_idle)
    check_integrity(state.core)
    assert len(state.core.sessions) == len(state.core.waiters) == 0  # I6
