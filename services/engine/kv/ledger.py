"""The calls that an engine makes to the cache service: each bounded in time, refused at once while there is no session (I7)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import grpc
from caravan.cache.v1 import cache_service_pb2 as pb
from caravan.cache.v1 import cache_service_pb2_grpc as pb_grpc

from services.runtime.clock import Clock
from services.runtime.errors import from_rpc_error

T = TypeVar("T")
CALL_SECONDS: Final = 5.0
"""Deadline of calls that no request waits for; Reserve may wait a second at the service for room."""
SLOW_PAUSE_S: Final = 1.0
"""After a call for a request ran out of time, others go cold at once for so long."""


class CacheDown(Exception):  # noqa: N818 - a condition that callers expect, not a defect
    """There is no session with the cache service, or it did not answer."""


class _NoAnswer(CacheDown):
    """It did not answer in time: whether it did what it was asked is not known."""


class SessionHolder(Protocol):
    """Who has the session of this engine."""

    def session_id(self) -> str:
        """The id of the session. Raises CacheDown."""
        ...

    def renew(self, session_id: str, why: str) -> None:
        """Ends the session, if it is still this one, and joins again."""
        ...


@dataclass(frozen=True, slots=True)
class Reservation:
    """The right to save one block into one root."""

    token: str
    session_id: str


class Ledger:
    """The calls."""

    def __init__(
        self,
        stub: pb_grpc.CacheServiceAsyncStub,
        session: SessionHolder,
        clock: Clock,
        acquire_seconds: float,
    ) -> None:
        self._stub = stub
        self._session = session
        self._clock = clock
        self._acquire_seconds = acquire_seconds
        self._paused_until = 0.0
        self._releasing: set[asyncio.Future[None]] = set()

    # --- reading -------------------------------------------------------------------------------------------------

    async def acquire(
        self, root_key: bytes, keys: Sequence[bytes], skip: int, tail: Sequence[int]
    ) -> pb.AcquireResponse:
        """Pins the longest chain of `keys` after the first `skip`. Raises CacheDown.

        The caller releases the claim. One that arrives too late, or after a cancel, is released here.
        """
        self._refuse_while_paused()
        request = pb.AcquireRequest(
            session_id=self._session.session_id(),
            keys=b"".join(keys),
            skip=skip,
            root_key=root_key,
            tail=tail,
        )
        call = asyncio.ensure_future(self._acquire(request))
        try:
            async with asyncio.timeout(self._acquire_seconds):
                return await asyncio.shield(call)
        except TimeoutError:
            self._pause()
            call.add_done_callback(self._release_late)
            raise CacheDown("no answer in time") from None
        except asyncio.CancelledError:
            call.add_done_callback(self._release_late)
            raise

    async def _acquire(self, request: pb.AcquireRequest) -> pb.AcquireResponse:
        try:
            return await self._call(self._stub.Acquire, request, CALL_SECONDS, request.session_id)
        except _NoAnswer:
            # Whether a claim is held is not known; the end of the session releases it.
            self._session.renew(request.session_id, "a lookup was not answered")
            raise

    def _release_late(self, call: asyncio.Future[pb.AcquireResponse]) -> None:
        if call.cancelled() or call.exception() is not None:
            return
        if claim_id := call.result().claim_id:
            self.release_soon(claim_id)

    def release_soon(self, claim_id: str) -> None:
        """Gives a claim back without waiting for it; where that fails, the end of the session does it."""
        task = asyncio.ensure_future(self._release(claim_id))
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)

    async def _release(self, claim_id: str) -> None:
        with contextlib.suppress(CacheDown):
            await self.release(claim_id)

    async def close(self) -> None:
        """Waits until claims are given back."""
        await asyncio.gather(*self._releasing, return_exceptions=True)

    async def release(self, claim_id: str) -> None:
        """Gives a claim back. Raises CacheDown; the end of the session releases it then."""
        request = pb.ReleaseRequest(session_id=self._session.session_id(), claim_id=claim_id)
        await self._call(self._stub.Release, request, CALL_SECONDS, request.session_id)

    async def wait(self, key: bytes, seconds: float) -> pb.WaitOutcome.ValueType:
        """Waits for a save in flight, `seconds` at most. Raises CacheDown."""
        self._refuse_while_paused()
        request = pb.WaitRequest(session_id=self._session.session_id(), key=key)
        request.timeout.FromMilliseconds(round(seconds * 1000))
        patience = seconds + self._acquire_seconds
        try:
            response = await self._call(self._stub.Wait, request, patience, request.session_id)
        except _NoAnswer:
            self._pause()
            raise
        return response.outcome

    # --- publishing ----------------------------------------------------------------------------------------------

    async def reserve(
        self, root_id: str, row: pb.Block
    ) -> tuple[pb.ReserveOutcome.ValueType, Reservation]:
        """Asks to save a block; the reservation counts only where the outcome is GRANTED. Raises CacheDown."""
        request = pb.ReserveRequest(
            session_id=self._session.session_id(), root_id=root_id, block=row
        )
        response = await self._call(self._stub.Reserve, request, CALL_SECONDS, request.session_id)
        return response.outcome, Reservation(response.token, request.session_id)

    async def renew(self, reservation: Reservation) -> None:
        """Prolongs a reservation. Raises CacheDown."""
        request = pb.RenewRequest(session_id=reservation.session_id, tokens=[reservation.token])
        await self._call(self._stub.Renew, request, CALL_SECONDS, request.session_id)

    async def check(self, reservation: Reservation) -> bool:
        """Whether a reservation holds. Raises CacheDown."""
        request = pb.CheckReservationRequest(
            session_id=reservation.session_id, token=reservation.token
        )
        call = self._stub.CheckReservation
        return (await self._call(call, request, CALL_SECONDS, request.session_id)).valid

    async def mark_published(self, reservation: Reservation) -> bool:
        """Tells that the file has its name; whether the reservation held. Raises CacheDown."""
        request = pb.MarkPublishedRequest(
            session_id=reservation.session_id, token=reservation.token
        )
        call = self._stub.MarkPublished
        return (await self._call(call, request, CALL_SECONDS, request.session_id)).valid

    async def announce(self, reservation: Reservation, row: pb.Block) -> bool:
        """Tells that the block can be read; whether the reservation held. Raises CacheDown."""
        request = pb.AnnounceRequest(
            session_id=reservation.session_id, token=reservation.token, block=row
        )
        call = self._stub.Announce
        return (await self._call(call, request, CALL_SECONDS, request.session_id)).valid

    async def cancel(self, reservation: Reservation) -> None:
        """Gives a reservation back. Raises CacheDown; the end of the session does it then."""
        request = pb.CancelReservationRequest(
            session_id=reservation.session_id, token=reservation.token
        )
        await self._call(self._stub.CancelReservation, request, CALL_SECONDS, request.session_id)

    def doubt(self, reservation: Reservation, why: str) -> None:
        """It is not known what the service knows of a file: a new session lets it look for itself."""
        self._session.renew(reservation.session_id, why)

    # --- one call ------------------------------------------------------------------------------------------------

    def _pause(self) -> None:
        self._paused_until = self._clock.monotonic() + SLOW_PAUSE_S

    def _refuse_while_paused(self) -> None:
        if self._clock.monotonic() < self._paused_until:
            raise CacheDown("it was slow a moment ago")

    async def _call(
        self,
        method: Callable[..., Awaitable[T]],
        request: object,
        seconds: float,
        session_id: str,
    ) -> T:
        """One call. Raises CacheDown, as _NoAnswer where the time ran out."""
        try:
            # The deadline of gRPC alone does not bound a call whose channel is connecting again.
            async with asyncio.timeout(seconds):
                return await method(request, timeout=seconds)
        except TimeoutError:
            raise _NoAnswer("no answer in time") from None
        except grpc.aio.AioRpcError as error:
            why = f"{error.code().name}: {error.details()}"
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise _NoAnswer(why) from None
            if from_rpc_error(error, service="cache").reason == "SESSION_UNKNOWN":
                self._session.renew(session_id, why)
            raise CacheDown(why) from None
