"""CacheService over gRPC: translates between messages and the state, and holds calls that wait."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, TypeVar, cast

import grpc
from caravan.cache.v1 import cache_service_pb2 as pb
from caravan.cache.v1 import cache_service_pb2_grpc as pb_grpc

from services.cache import checks, inbound, messages
from services.cache.dump import PAGE, key_pages
from services.cache.edge import Answer, Edge, SessionOutbox
from services.cache.effects import Change, Ending, ReserveOutcome, WaitOutcome
from services.cache.metrics import CacheMetrics
from services.cache.rows import KEY_BYTES, CopyState, Tier
from services.cache.sessions import Session
from services.cache.state import SILENT_HEARTBEATS_MAX, CacheState
from services.runtime.clock import Clock, IdSource
from services.runtime.errors import CaravanError
from services.runtime.server import cancel_all

NAME: Final = pb.DESCRIPTOR.services_by_name["CacheService"].full_name
_LOG = logging.getLogger(__name__)
_ALL_BYTES: Final = 2**63
_ALL_TIERS: Final[frozenset[Tier]] = frozenset()
Outcome = TypeVar("Outcome", WaitOutcome, ReserveOutcome)
_Context = grpc.aio.ServicerContext[Any, Any]


class CacheServicer(pb_grpc.CacheServiceServicer):
    """The cache service at the edge. All its methods run on one event loop, so the state needs no lock.

    `room_wait_s` is the longest time, in seconds, that Reserve waits for dropped copies to be confirmed.
    """

    def __init__(
        self,
        state: CacheState,
        edge: Edge,
        metrics: CacheMetrics,
        clock: Clock,
        ids: IdSource,
        *,
        room_wait_s: float,
    ) -> None:
        self.state = state
        self.edge = edge
        self._metrics = metrics
        self._clock = clock
        self._ids = ids
        self._room_wait_s = room_wait_s

    # --- sessions ------------------------------------------------------------------------------------------------

    async def Join(
        self, request_iterator: AsyncIterator[pb.JoinRequest], context: _Context
    ) -> AsyncIterator[pb.JoinResponse]:
        registration = checks.to_registration(await self._first(request_iterator))
        session, effects = self.state.join(
            registration, session_id=self._ids("session"), now=self._clock.monotonic()
        )
        outbox = self.edge.open_session(session)
        outbox.put(self._welcome(session))
        self.edge.perform(effects)
        _LOG.info("engine %s joined as %s", session.engine_id, session.session_id)
        reader = asyncio.create_task(self._read(request_iterator, session.session_id, outbox))
        try:
            async for response in outbox:
                yield response
        finally:
            self.edge.close_session(session)
            _LOG.info("%s of %s ended", session.session_id, session.engine_id)
            await cancel_all([reader])

    async def _first(self, requests: AsyncIterator[pb.JoinRequest]) -> pb.JoinRequest:
        """The first message of a stream. Raises CaravanError where it does not come."""
        wait_s = SILENT_HEARTBEATS_MAX * self.state.limits.heartbeat_s
        try:
            async with asyncio.timeout(wait_s):
                first = await anext(requests, None)
        except TimeoutError:
            raise CaravanError(
                "DEADLINE_EXCEEDED", f"No first message came within {wait_s:g} s."
            ) from None
        if first is None:
            raise CaravanError("MISSING_FIELD", "The stream ended before its first message.")
        return first

    async def _read(
        self, requests: AsyncIterator[pb.JoinRequest], session_id: str, outbox: SessionOutbox
    ) -> None:
        """Takes the messages of an engine until its stream ends; the end, and an error, close the outbox."""
        try:
            async for request in requests:
                now = self._clock.monotonic()
                self.edge.perform(inbound.take(self.state, session_id, request, now))
        except Exception as error:
            outbox.close(error)  # The handler of the stream raises it.
        else:
            outbox.close()

    def _welcome(self, session: Session) -> pb.JoinResponse:
        limits = self.state.limits
        return pb.JoinResponse(
            welcome=pb.Welcome(
                session_id=session.session_id,
                heartbeat_interval=messages.to_duration(limits.heartbeat_s),
                live_session_ids=[one.session_id for one in self.state.core.sessions],
                reservation_ttl=messages.to_duration(limits.reservation_ttl_s),
            )
        )

    def expire(self) -> None:
        """Ends silent sessions and lost saves; to be called at least once per heartbeat."""
        self.edge.perform(self.state.expire(self._clock.monotonic()))

    def drain(self) -> None:
        """Takes no new sessions, and ends all sessions and watches, so that peers turn to the next service."""
        self.edge.perform(self.state.drain(self._clock.monotonic()))
        self.edge.close_watches(
            CaravanError("DRAINING", f"The watch ended: {Ending.DRAINING.value}.")
        )

    # --- lookups -------------------------------------------------------------------------------------------------

    async def Acquire(  # type: ignore[override]  # See `register`.
        self, request: pb.AcquireRequest, context: _Context
    ) -> bytes:
        began = self._clock.monotonic()
        keys, root_key, tail = checks.checked_chain(request, self.state.limits.keys_max)
        found = self.state.acquire(
            request.session_id,
            keys,
            request.skip,
            root_key,
            tail,
            claim_id=self._ids("claim"),
            now=began,
        )
        response = messages.to_acquire_response(found)
        if found.claim_id:
            # A caller that went away before the answer never learns of its claim.
            unheard = self._release_unheard(request.session_id, found.claim_id)
            context.add_done_callback(cast(Any, unheard))
        self._metrics.observe_acquire(self._clock.monotonic() - began)
        return response

    def _release_unheard(self, session_id: str, claim_id: str) -> Callable[[_Context], None]:
        def done(context: _Context) -> None:
            if context.cancelled():
                with contextlib.suppress(CaravanError):
                    self.edge.perform(self.state.release(session_id, claim_id)[1])

        return done

    async def Release(self, request: pb.ReleaseRequest, context: _Context) -> pb.ReleaseResponse:
        found, effects = self.state.release(request.session_id, request.claim_id)
        self.edge.perform(effects)
        return pb.ReleaseResponse(found=found)

    async def Wait(self, request: pb.WaitRequest, context: _Context) -> pb.WaitResponse:
        key = checks.checked_key("key", request.key)
        timeout_s = checks.to_timeout_s(request)
        waiter_id = self._ids("waiter")
        outcome = self.state.wait(request.session_id, key, waiter_id)
        if outcome is None:
            answer = self.edge.expect(waiter_id)
            try:
                outcome = await _within(answer, timeout_s, WaitOutcome)
            finally:
                self.edge.forget(waiter_id)
                self.state.stop_waiting(waiter_id)
        return pb.WaitResponse(outcome=(outcome or WaitOutcome.TIMED_OUT).value)

    # --- saves ---------------------------------------------------------------------------------------------------

    async def Reserve(self, request: pb.ReserveRequest, context: _Context) -> pb.ReserveResponse:
        facts = checks.to_facts("block", request.block)
        session_id, token = request.session_id, self._ids("save")
        answer = self.edge.expect(token)
        try:
            outcome, effects = self.state.reserve(
                session_id, request.root_id, facts, token=token, now=self._clock.monotonic()
            )
            self.edge.perform(effects)
            if outcome is None:
                outcome = await _within(answer, self._room_wait_s, ReserveOutcome)
            if outcome is None:
                self._give_up(session_id, token)
                outcome = ReserveOutcome.NO_ROOM
        except asyncio.CancelledError:
            # The caller does not hear of the grant, if there was one.
            self._give_up(session_id, token)
            raise
        finally:
            self.edge.forget(token)
        return pb.ReserveResponse(
            outcome=outcome.value,
            token=token if outcome is ReserveOutcome.GRANTED else "",
        )

    def _give_up(self, session_id: str, token: str) -> None:
        now = self._clock.monotonic()
        given_up, effects = self.state.give_up(session_id, token, now)
        self.edge.perform(effects)
        if not given_up:
            with contextlib.suppress(CaravanError):
                self.edge.perform(self.state.cancel(session_id, token, now)[1])

    async def Renew(self, request: pb.RenewRequest, context: _Context) -> pb.RenewResponse:
        lost, effects = self.state.renew(
            request.session_id, request.tokens, self._clock.monotonic()
        )
        self.edge.perform(effects)
        return pb.RenewResponse(lost=lost)

    async def CheckReservation(
        self, request: pb.CheckReservationRequest, context: _Context
    ) -> pb.CheckReservationResponse:
        now = self._clock.monotonic()
        valid, effects = self.state.check(request.session_id, request.token, now)
        self.edge.perform(effects)
        return pb.CheckReservationResponse(valid=valid)

    async def MarkPublished(
        self, request: pb.MarkPublishedRequest, context: _Context
    ) -> pb.MarkPublishedResponse:
        now = self._clock.monotonic()
        valid, effects = self.state.mark(request.session_id, request.token, now)
        self.edge.perform(effects)
        return pb.MarkPublishedResponse(valid=valid)

    async def Announce(self, request: pb.AnnounceRequest, context: _Context) -> pb.AnnounceResponse:
        facts = checks.to_facts("block", request.block)
        now = self._clock.monotonic()
        valid, effects = self.state.announce(request.session_id, request.token, facts, now)
        self.edge.perform(effects)
        return pb.AnnounceResponse(valid=valid)

    async def CancelReservation(
        self, request: pb.CancelReservationRequest, context: _Context
    ) -> pb.CancelReservationResponse:
        now = self._clock.monotonic()
        found, effects = self.state.cancel(request.session_id, request.token, now)
        self.edge.perform(effects)
        return pb.CancelReservationResponse(found=found)

    # --- for operators and routers ---------------------------------------------------------------------------------

    async def Watch(
        self, request: pb.WatchRequest, context: _Context
    ) -> AsyncIterator[pb.WatchResponse]:
        outbox = self.edge.open_watch()
        try:
            if request.with_present:
                async for change in self._present():
                    yield change
                yield pb.WatchResponse(present_done=True)
            async for change in outbox:
                yield change
        finally:
            self.edge.close_watch(outbox)

    async def _present(self) -> AsyncIterator[pb.WatchResponse]:
        """What is there now, row by row; what changes meanwhile waits in the outbox and is told after it."""
        rows = self.state.core.index.rows
        for number, key in enumerate(list(rows), 1):
            row = rows.get(key)
            for copy in row.copies if row is not None else ():
                if copy.state is CopyState.AVAILABLE:
                    yield messages.to_change(Change(copy, published=True))
            if number % PAGE == 0:
                await asyncio.sleep(0)

    async def Evict(self, request: pb.EvictRequest, context: _Context) -> pb.EvictResponse:
        tiers = checks.to_tiers("tiers", request.tiers)
        keys = checks.checked_keys("keys", request.keys)
        if request.bytes >= _ALL_BYTES:
            raise checks.invalid("bytes", "is not below 2^63")
        if keys:
            (copies, freed), effects = self.state.evict_keys(keys, tiers, request.root_id)
            self.edge.perform(effects)
        else:
            copies, freed = await self._evict(request.bytes, tiers, request.root_id)
        return pb.EvictResponse(copies=copies, bytes=freed)

    async def Collect(self, request: pb.CollectRequest, context: _Context) -> pb.CollectResponse:
        copies, freed = await self._evict(_ALL_BYTES, _ALL_TIERS, "")
        return pb.CollectResponse(copies=copies, bytes=freed)

    async def _evict(self, wanted: int, tiers: frozenset[Tier], root_id: str) -> tuple[int, int]:
        """Drops step by step, so that a million copies do not hold the loop."""
        copies = freed = 0
        while freed < wanted:
            (more, more_bytes), effects = self.state.evict(wanted - freed, tiers, root_id)
            self.edge.perform(effects)
            if not more:
                break
            copies, freed = copies + more, freed + more_bytes
            await asyncio.sleep(0)
        return copies, freed

    async def Dump(
        self, request: pb.DumpRequest, context: _Context
    ) -> AsyncIterator[pb.DumpResponse]:
        if len(request.key_prefix) > KEY_BYTES:
            raise checks.invalid("key_prefix", f"is longer than {KEY_BYTES} bytes")
        index = self.state.core.index
        for page in key_pages(index, request.key_prefix, request.limit):
            await asyncio.sleep(0)
            now, wall = self._clock.monotonic(), self._clock.wall()
            for key in page:
                row = index.rows.get(key)
                if row is not None:
                    yield messages.to_dump(row, now, wall)

    async def GetStats(self, request: pb.GetStatsRequest, context: _Context) -> pb.GetStatsResponse:
        return messages.to_stats(self.state.core)


def register(servicer: CacheServicer, server: grpc.aio.Server) -> None:
    """Adds the service to a server. Acquire answers with bytes of an AcquireResponse, which are sent as they are."""
    acquire: grpc.RpcMethodHandler[pb.AcquireRequest, bytes] = grpc.unary_unary_rpc_method_handler(
        servicer.Acquire, request_deserializer=pb.AcquireRequest.FromString
    )
    # What is added first is asked first, so that the handler of the generated code is not reached.
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(NAME, {"Acquire": acquire})]
    )
    pb_grpc.add_CacheServiceServicer_to_server(servicer, server)


async def _within(
    answer: asyncio.Future[Answer], timeout_s: float, kind: type[Outcome]
) -> Outcome | None:
    """The answer, or None after the timeout. Raises the error that the reply holds."""
    done, _ = await asyncio.wait((answer,), timeout=timeout_s)
    if not done:
        return None
    outcome = answer.result()
    assert isinstance(outcome, kind)
    return outcome
