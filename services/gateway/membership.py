"""The session of this gateway with the coordinator: joins, beats, and joins again for ever."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Protocol

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc

from services.gateway.held import HeldLeases
from services.runtime.clock import Clock, IdSource
from services.runtime.errors import CaravanError
from services.runtime.server import cancel_all

_LOG = logging.getLogger(__name__)
_BACKOFF_MIN_S: Final = 0.1
_BACKOFF_MAX_S: Final = 2.0
_SILENT_INTERVALS_MAX: Final = 3
_Call = grpc.aio.StreamStreamCall[pb.JoinGatewayRequest, pb.JoinGatewayResponse]


def coordinator_down() -> CaravanError:
    """No session with the coordinator, or no answer from it."""
    return CaravanError(
        "SERVICE_UNAVAILABLE",
        "The coordinator cannot be reached.",
        retry_after_s=1.0,
        service="coordinator",
    )


class _Cancellable(Protocol):
    def cancel(self) -> bool: ...


class Session:
    """One session. Calls that were made in it are cancelled with its end: nobody knows any more what they asked for.

    `succeeds_another`: the gateway was joined before. `joined_at` is in monotonic seconds.
    """

    def __init__(self, gateway_id: str, *, succeeds_another: bool) -> None:
        self.gateway_id = gateway_id
        self.succeeds_another = succeeds_another
        self.joined_at = 0.0
        self.ended = False
        self._calls: set[_Cancellable] = set()

    @contextmanager
    def holding(self, call: _Cancellable) -> Iterator[None]:
        """Ends the call if the session ends before it."""
        if self.ended:
            call.cancel()
        self._calls.add(call)
        try:
            yield
        finally:
            self._calls.discard(call)

    def end(self) -> None:
        """The coordinator is gone, or has forgotten this gateway."""
        self.ended = True
        for call in list(self._calls):
            call.cancel()


class Membership:
    """Holds one session at a time. Each has an id of its own, so that leases of an older one cannot be mixed up with it.

    The coordinator learns `held` at each join. `timeout_s` is the longest wait for the answer to a join, in seconds.
    """

    def __init__(
        self,
        stub: pb_grpc.CoordinatorServiceAsyncStub,
        clock: Clock,
        ids: IdSource,
        held: HeldLeases,
        *,
        timeout_s: float,
        on_change: Callable[[bool], Awaitable[None]],
    ) -> None:
        self._stub = stub
        self._clock = clock
        self._ids = ids
        self._timeout_s = timeout_s
        self._held = held
        self._on_change = on_change
        self._joined = asyncio.Event()
        self._renewing = False
        self._current = Session("", succeeds_another=False)
        self._was_joined = False
        self._hearing: asyncio.Task[None] | None = None
        self._heard_at = 0.0
        self._interval_s = timeout_s

    async def session(self, within_s: float) -> Session:
        """The session, as soon as there is one. Raises SERVICE_UNAVAILABLE after `within_s` seconds without."""
        if not self._joined.is_set():
            try:
                async with asyncio.timeout(within_s):
                    await self._joined.wait()
            except TimeoutError:
                raise coordinator_down() from None
        return self._current

    def renew(self, unknown: Session) -> None:
        """The coordinator does not know this session: joins again at once, unless that has happened since."""
        if self._joined.is_set() and self._current is unknown:
            self._joined.clear()
            self._renewing = True
            unknown.end()
            if self._hearing is not None:
                # Not the call: a write to it that is under way would be cancelled, and with it the task of run().
                self._hearing.cancel()

    async def run(self) -> None:
        """Joins, and joins again after each end, until cancelled."""
        backoff_s = _BACKOFF_MIN_S
        while True:
            was_joined = await self._session()
            backoff_s = _BACKOFF_MIN_S if was_joined else min(2 * backoff_s, _BACKOFF_MAX_S)
            if was_joined and self._renewing:
                continue
            self._renewing = False
            await asyncio.sleep(backoff_s)

    async def _session(self) -> bool:
        """One session, to its end; whether it was joined at all."""
        self._current = Session(self._ids("gateway"), succeeds_another=self._was_joined)
        call = self._stub.JoinGateway()
        try:
            first = pb.JoinGatewayRequest(
                gateway_id=self._current.gateway_id,
                held=self._held.messages(self._clock.monotonic()),
            )
            await call.write(first)
            async with asyncio.timeout(self._timeout_s):
                joined = await self._hear(call)
            if joined:
                await self._stay(call)
        except TimeoutError:
            _LOG.warning("the coordinator does not answer")
            return False
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError) as error:
            _LOG.warning("no session with the coordinator: %s", _why(error))
            return False
        finally:
            call.cancel()
        return joined

    async def _stay(self, call: _Call) -> None:
        """Beats until the session ends."""
        _LOG.info("joined the coordinator as %s", self._current.gateway_id)
        self._renewing = False
        self._was_joined = True
        self._current.joined_at = self._clock.monotonic()
        self._joined.set()
        await self._on_change(self._joined.is_set())
        hearing = self._hearing = asyncio.create_task(self._keep_hearing(call))
        try:
            while True:
                await asyncio.wait({hearing}, timeout=self._interval_s)
                silent_s = self._clock.monotonic() - self._heard_at
                if hearing.done():
                    break
                if silent_s > _SILENT_INTERVALS_MAX * self._interval_s:
                    _LOG.warning("the coordinator has been silent for %.1f s", silent_s)
                    break
                with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    # A call that has ended is noticed by hearing, which knows why.
                    await call.write(pb.JoinGatewayRequest())
        finally:
            self._joined.clear()
            self._current.end()
            await cancel_all([hearing])
            await self._on_change(self._joined.is_set())

    async def _keep_hearing(self, call: _Call) -> None:
        try:
            while await self._hear(call):
                pass
            _LOG.warning("the coordinator ended the session %s", self._current.gateway_id)
        except grpc.aio.AioRpcError as error:
            _LOG.warning("the session with the coordinator broke: %s", _why(error))

    async def _hear(self, call: _Call) -> bool:
        """One answer of the coordinator; false at the end of the session."""
        response: Any = await call.read()
        if response is grpc.aio.EOF:
            return False
        self._heard_at = self._clock.monotonic()
        self._interval_s = max(0.01, response.heartbeat_interval.ToMilliseconds() / 1000)
        return True


def _why(error: Exception) -> object:
    return error.details() if isinstance(error, grpc.aio.AioRpcError) else error
