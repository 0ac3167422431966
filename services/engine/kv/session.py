"""The engine's session with the cache service: registers, tells what it holds, beats, obeys, and joins again for ever."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

import grpc
from caravan.cache.v1 import cache_service_pb2 as pb
from caravan.cache.v1 import cache_service_pb2_grpc as pb_grpc

from services.engine.kv.blocking import RunBlocking
from services.engine.kv.holdings import Holdings, ram_rows
from services.engine.kv.host_memory import host_memory
from services.engine.kv.ledger import CacheDown
from services.engine.kv.root import RootError
from services.runtime.server import cancel_all

_LOG = logging.getLogger(__name__)
_Call = grpc.aio.StreamStreamCall[pb.JoinRequest, pb.JoinResponse]
BACKOFF_FIRST_S: Final = 0.1
BACKOFF_MOST_S: Final = 5.0
WELCOME_SECONDS: Final = 5.0
RAM_CHANGES_APART_S: Final = 0.01
"""Changes of the RAM that come together are told together."""
ROWS_AT_ONCE: Final = 256
WITHDRAWALS_MAX: Final = 4096
"""Withdrawals that wait to be told; beyond it, a new session tells everything anew."""


def backoff_s(attempt: int, share: float) -> float:
    """Seconds before attempt `attempt` (from 0): doubling, bounded, between half and whole by `share` in [0, 1)."""
    whole: float = min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2.0 ** min(attempt, 16))
    return whole * (0.5 + 0.5 * share)


class CacheSession:
    """Runs until it is cancelled. On the event loop; blocking work goes to `blocking`."""

    def __init__(
        self,
        stub: pb_grpc.CacheServiceAsyncStub,
        holdings: Holdings,
        registration: pb.Registration,
        *,
        blocking: RunBlocking,
        jitter: Callable[[], float],
    ) -> None:
        self._stub = stub
        self._holdings = holdings
        self._registration = registration
        self._blocking = blocking
        self._jitter = jitter
        self.on_joined: Callable[[], None] = lambda: None
        """Called at the beginning of each session."""
        self._session_id = ""
        self._welcome = pb.Welcome()
        self._life: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        self._news = asyncio.Event()
        self._withdrawals: list[pb.Withdrawal] = []

    # --- for others ----------------------------------------------------------------------------------------------

    @property
    def joined(self) -> bool:
        """Whether there is a session."""
        return bool(self._session_id)

    @property
    def reservation_ttl_s(self) -> float:
        """How long a reservation lives without being renewed, in seconds."""
        return max(0.05, self._welcome.reservation_ttl.ToMilliseconds() / 1000)

    def session_id(self) -> str:
        """The id of the session. Raises CacheDown where there is none: nobody waits for one."""
        if not self._session_id:
            raise CacheDown("no session with the cache service")
        return self._session_id

    def renew(self, session_id: str, why: str) -> None:
        """Ends the session, if it is still this one, and joins again: the service then looks at everything anew."""
        if session_id == self._session_id and self._life is not None:
            _LOG.warning("cache service: joining anew: %s", why)
            self._session_id = ""
            self._life.cancel()

    def ram_changed(self) -> None:
        """The RAM holds something else: tell soon."""
        self._news.set()

    def withdraw(self, root_id: str, key: bytes, *, corrupt: bool) -> None:
        """A copy is gone or bad: tell soon. Without a session nothing is told: the next inventory does not name it."""
        if not self._session_id:
            return
        self._withdrawals.append(pb.Withdrawal(root_id=root_id, keys=[key], corrupt=corrupt))
        if len(self._withdrawals) > WITHDRAWALS_MAX:
            self.renew(self._session_id, "too many withdrawals wait")
        self._news.set()

    # --- life ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Joins, and joins again whenever the session ends."""
        attempt = 0
        while True:
            self._life = asyncio.create_task(self._session())
            try:
                await asyncio.wait({self._life})
            finally:
                await cancel_all([self._life])
            attempt = 0 if self._welcome.session_id else attempt + 1
            if not self._life.cancelled() and (error := self._life.exception()) is not None:
                _LOG.error("the session with the cache service failed", exc_info=error)
            await asyncio.sleep(backoff_s(attempt, self._jitter()))

    async def _session(self) -> None:
        """One session, to its end."""
        self._welcome = pb.Welcome()
        call = self._stub.Join()
        parts: set[asyncio.Task[None]] = set()
        try:
            await self._write(call, pb.JoinRequest(register=self._registration))
            async with asyncio.timeout(WELCOME_SECONDS):
                first: Any = await call.read()
            if not isinstance(first, pb.JoinResponse) or first.WhichOneof("message") != "welcome":
                _LOG.warning("the cache service did not welcome this engine")
                return
            self._begin(first.welcome)
            lives: tuple[Coroutine[Any, Any, None], ...] = (
                self._obey(call),
                self._beat(call),
                self._tell(call),
            )
            parts = {asyncio.create_task(life) for life in lives}
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
            _LOG.warning("the cache service ended the session")
        except TimeoutError:
            _LOG.warning("the cache service does not answer")
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError) as error:
            _LOG.warning("no session with the cache service: %s", _why(error))
        finally:
            self._session_id = ""
            self._holdings.ram.unwatch()
            # The call last: cancelled first, it would cancel the tasks that write to it in its own way.
            for part in parts:
                part.cancel()
            # All of them, also those that ended together with the first: an error that nobody looks at is logged late.
            await asyncio.gather(*parts, return_exceptions=True)
            call.cancel()

    def _begin(self, welcome: pb.Welcome) -> None:
        self._welcome = welcome
        self._session_id = welcome.session_id
        self._withdrawals.clear()
        _LOG.info("joined the cache service as %s", welcome.session_id)
        self.on_joined()

    async def _write(self, call: _Call, message: pb.JoinRequest) -> None:
        # A stream takes one message at a time.
        async with self._writing:
            await call.write(message)

    async def _beat(self, call: _Call) -> None:
        interval_s = max(0.01, self._welcome.heartbeat_interval.ToMilliseconds() / 1000)
        while True:
            await asyncio.sleep(interval_s)
            used, total = host_memory()
            beat = pb.Heartbeat(memory_used_bytes=used, memory_total_bytes=total)
            await self._write(call, pb.JoinRequest(heartbeat=beat))

    async def _tell(self, call: _Call) -> None:
        """What the RAM holds, then the inventories, then what changes."""
        present = ram_rows(self._holdings.ram.watch())
        for at in range(0, len(present), ROWS_AT_ONCE):
            ram = pb.RamChange(added=present[at : at + ROWS_AT_ONCE])
            await self._write(call, pb.JoinRequest(ram=ram))
        for root_id in self._holdings.roots:
            await self._take_inventory(call, root_id)
        while True:
            await self._news.wait()
            self._news.clear()
            await self._tell_news(call)
            await asyncio.sleep(RAM_CHANGES_APART_S)

    async def _take_inventory(self, call: _Call, root_id: str) -> None:
        parts = self._holdings.inventory(root_id)
        try:
            while part := await self._blocking(lambda: next(parts, None)):
                inventory = pb.Inventory(root_id=root_id, blocks=part)
                await self._write(call, pb.JoinRequest(inventory=inventory))
        except RootError as error:
            # What was not named must not be taken for gone: the inventory stays incomplete.
            _LOG.warning("the root %s cannot be listed: %s", root_id, error)
            return
        await self._write(
            call, pb.JoinRequest(inventory=pb.Inventory(root_id=root_id, complete=True))
        )

    async def _tell_news(self, call: _Call) -> None:
        withdrawals, self._withdrawals = self._withdrawals, []
        for withdrawal in withdrawals:
            await self._write(call, pb.JoinRequest(withdrawal=withdrawal))
        changes = self._holdings.ram.changes()
        if changes.added or changes.removed:
            ram = pb.RamChange(added=ram_rows(changes.added), removed=changes.removed)
            await self._write(call, pb.JoinRequest(ram=ram))

    async def _obey(self, call: _Call) -> None:
        """Carries out what the service asks, in order, until it ends the stream."""
        while True:
            response: Any = await call.read()
            if not isinstance(response, pb.JoinResponse):
                return
            kind = response.WhichOneof("message")
            if kind == "drop":
                await self._drop(call, response.drop)
            elif kind == "settle":
                await self._settle(call, response.settle)

    async def _drop(self, call: _Call, drop: pb.Drop) -> None:
        gone = await self._blocking(
            lambda: self._holdings.drop(drop.root_id, list(drop.keys)),
        )
        dropped = pb.Dropped(root_id=drop.root_id, keys=gone)
        await self._write(call, pb.JoinRequest(dropped=dropped))

    async def _settle(self, call: _Call, settle: pb.Settle) -> None:
        row = await self._blocking(lambda: self._holdings.settle(settle.root_id, settle.key))
        settled = pb.Settled(root_id=settle.root_id, key=settle.key, block=row)
        await self._write(call, pb.JoinRequest(settled=settled))


def _why(error: Exception) -> object:
    return error.details() if isinstance(error, grpc.aio.AioRpcError) else error
