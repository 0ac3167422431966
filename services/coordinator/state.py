"""The coordinator's decisions: sessions of engines and gateways, leases, routing.

Pure: the time (monotonic seconds), the wall time and ids are arguments, and what has to be done outside comes back as
`Effects`. A session is a number that is never used twice, so the late end of a replaced stream cannot end its successor.
Whatever ends a session - its stream, silence, a successor - sweeps what belongs to it (I6).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator.effects import NOTHING, CancelRequest, Effects, Ending, EndSession
from services.coordinator.engines import EngineRegistry
from services.coordinator.gateways import GatewayRegistry
from services.coordinator.leases import Lease, LeaseTable
from services.coordinator.models import ModelCatalogue
from services.coordinator.routing import CAPACITY_RETRY_MIN_S, choose
from services.runtime.errors import CaravanError

SILENT_INTERVALS_MAX = 3
"""Intervals without a word after which a peer is taken for dead."""
DRAINING_RETRY_S = 1.0


@dataclass(frozen=True)
class Limits:
    """Bounds of every table, and the times, in seconds."""

    interval_s: float = 1.0
    model_memory_s: float = 600.0
    engines_max: int = 256
    gateways_max: int = 256
    leases_max: int = 16_384
    leases_per_engine_max: int = 1_024


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease and the address (host:port) of its engine."""

    lease: Lease
    address: str


class CoordinatorState:
    """Everything that the coordinator knows."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.leases = LeaseTable()
        self.engines = EngineRegistry(limits.leases_per_engine_max)
        self.gateways = GatewayRegistry()
        self.models = ModelCatalogue(limits.model_memory_s)
        self.draining = False
        self._sessions = 0
        self._grants = 0
        self._expired_at: float | None = None
        # Requests on each engine whose end was asked for while their lease is still held.
        self._cancelled: dict[str, dict[str, None]] = {}

    # --- engines -------------------------------------------------------------------------------------------------

    def join_engine(
        self,
        engine_id: str,
        address: str,
        model: engine_pb.ModelInfo,
        load: engine_pb.EngineLoad,
        *,
        now: float,
        wall: float,
    ) -> tuple[int, Effects]:
        """Registers an engine; returns its session. Its session before, if any, ends.

        Raises CaravanError: DRAINING, or CAPACITY_EXHAUSTED where `engines_max` have joined.
        """
        self._refuse_while_draining()
        before = self.engines.find(engine_id)
        if before is None and len(self.engines) >= self.limits.engines_max:
            raise _full("engines", self.limits.engines_max)
        effects = NOTHING
        if before is not None:
            effects = self._end_engine(before.session, now)
            effects += Effects(endings=(EndSession(before.session, engine_id, Ending.REPLACED),))
        session = self._next_session()
        record = self.engines.add(engine_id, session, address, model, load, now=now)
        self.models.add_engine(record, wall)
        return session, effects

    def report_engine(
        self,
        session: int,
        model: engine_pb.ModelInfo | None,
        load: engine_pb.EngineLoad,
        now: float,
    ) -> Effects:
        """Takes a report; asks again to end what was cancelled and is still leased, as a cancel may outrun its request.

        Raises CaravanError: SESSION_UNKNOWN; INVALID_VALUE where the name of the model changed.
        """
        record = self.engines.of_session(session)
        if record is None:
            raise _unknown(f"engine session {session}")
        if model is not None and model.name != record.model.name:
            raise CaravanError(
                "INVALID_VALUE",
                f"The model's name changed from '{record.model.name}' to '{model.name}' within a session.",
                param="report.model.name",
            )
        self.engines.report(record, model, load, now)
        again = self._cancelled.get(record.engine_id, ())
        return Effects(cancels=tuple(CancelRequest(session, request_id) for request_id in again))

    def _end_engine(self, session: int, now: float) -> Effects:
        record = self.engines.remove(session)
        if record is None:
            return NOTHING
        self.models.remove_engine(record, now)
        swept = self.leases.sweep_engine(record.engine_id)
        self._cancelled.pop(record.engine_id, None)
        return Effects(swept=swept)

    # --- gateways ------------------------------------------------------------------------------------------------

    def join_gateway(self, gateway_id: str, now: float) -> tuple[int, Effects]:
        """Registers a gateway; returns its session. Its session before, if any, ends.

        Raises CaravanError: DRAINING, or CAPACITY_EXHAUSTED where `gateways_max` have joined.
        """
        self._refuse_while_draining()
        before = self.gateways.find(gateway_id)
        if before is None and len(self.gateways) >= self.limits.gateways_max:
            raise _full("gateways", self.limits.gateways_max)
        effects = NOTHING
        if before is not None:
            effects = self._end_gateway(before.session)
            effects += Effects(endings=(EndSession(before.session, gateway_id, Ending.REPLACED),))
        session = self._next_session()
        self.gateways.add(gateway_id, session, now)
        return session, effects

    def hear_gateway(self, session: int, now: float) -> None:
        """Takes a heartbeat. Raises CaravanError: SESSION_UNKNOWN."""
        record = self.gateways.of_session(session)
        if record is None:
            raise _unknown(f"gateway session {session}")
        record.heard_at = now

    def _end_gateway(self, session: int) -> Effects:
        record = self.gateways.remove(session)
        if record is None:
            return NOTHING
        swept = self.leases.sweep_gateway(record.gateway_id)
        return Effects(cancels=self._forget_cancels(swept), swept=swept)

    # --- sessions ------------------------------------------------------------------------------------------------

    def end_session(self, session: int, now: float) -> Effects:
        """The stream of a session ended: sweeps what belongs to it. Nothing where the session is over already."""
        return self._end_engine(session, now) + self._end_gateway(session)

    def expire(self, now: float) -> Effects:
        """Ends the sessions of silent peers and forgets old models; to be called at least once per interval.

        Where the last call is longer ago than an interval, it was this process that stood still: what its peers said
        meanwhile still waits in the sockets, so nobody is judged until the next call.
        """
        last, self._expired_at = self._expired_at, now
        if last is not None and now - last > self.limits.interval_s:
            return NOTHING
        then = now - SILENT_INTERVALS_MAX * self.limits.interval_s
        effects = NOTHING
        for engine in self.engines.silent_since(then):
            effects += self._end_engine(engine.session, now)
            effects += _ending(engine.session, engine.engine_id, Ending.SILENT)
        for gateway in self.gateways.silent_since(then):
            effects += self._end_gateway(gateway.session)
            effects += _ending(gateway.session, gateway.gateway_id, Ending.SILENT)
        self.models.expire(now)
        return effects

    def drain(self, now: float) -> Effects:
        """Takes no new work and ends all sessions. Running requests go on: nothing is cancelled (S0.7)."""
        self.draining = True
        effects = NOTHING
        for engine in self.engines:
            self._end_engine(engine.session, now)
            effects += _ending(engine.session, engine.engine_id, Ending.DRAINING)
        for gateway in self.gateways:
            self._end_gateway(gateway.session)
            effects += _ending(gateway.session, gateway.gateway_id, Ending.DRAINING)
        return effects

    # --- requests ------------------------------------------------------------------------------------------------

    def route(
        self, request_id: str, gateway_id: str, model_name: str, *, lease_id: str, now: float
    ) -> Grant:
        """Grants a lease. O(engines of the model).

        Raises CaravanError: DRAINING, SESSION_UNKNOWN, DUPLICATE_REQUEST, MODEL_NOT_FOUND, NO_ENGINE, MODEL_LOADING,
        CAPACITY_EXHAUSTED.
        """
        self._refuse_while_draining()
        if self.gateways.find(gateway_id) is None:
            raise _unknown(gateway_id)
        if self.leases.of_request(request_id) is not None:
            raise CaravanError(
                "DUPLICATE_REQUEST",
                f"A request with the id '{request_id}' is in flight already.",
                request_id=request_id,
            )
        model = self.models.find(model_name)
        if model is None:
            raise CaravanError(
                "MODEL_NOT_FOUND",
                f"The model '{model_name}' does not exist.",
                param="model",
                model=model_name,
            )
        if len(self.leases) >= self.limits.leases_max:
            raise _full("requests in flight", self.limits.leases_max)
        engine = choose(model, self.leases)
        lease = Lease(lease_id, request_id, model_name, engine.engine_id, gateway_id, now)
        self.leases.grant(lease)
        self._grants += 1
        engine.last_grant = self._grants
        return Grant(lease, engine.address)

    def release(self, lease_id: str, now: float) -> bool:
        """Ends a lease; whether it was held until now. O(1)."""
        lease = self.leases.release(lease_id)
        if lease is None:
            return False
        model = self.models.find(lease.model)
        assert model is not None  # Its engine is live, or the lease would have been swept.
        model.note_lease(now - lease.granted_at)
        self._forget_cancel(lease)
        return True

    def cancel(self, request_id: str) -> Effects:
        """Ends a request in flight: its engine is told. Raises CaravanError: REQUEST_NOT_FOUND."""
        lease = self.leases.of_request(request_id)
        if lease is None:
            raise CaravanError(
                "REQUEST_NOT_FOUND",
                f"No request with the id '{request_id}' is in flight.",
                request_id=request_id,
            )
        self._cancelled.setdefault(lease.engine_id, {})[request_id] = None
        return Effects(cancels=tuple(self._cancels_of([lease])))

    def _cancels_of(self, leases: Iterable[Lease]) -> Iterable[CancelRequest]:
        for lease in leases:
            engine = self.engines.find(lease.engine_id)
            assert engine is not None  # A lease never outlives the session of its engine.
            yield CancelRequest(engine.session, lease.request_id)

    def _forget_cancels(self, swept: tuple[Lease, ...]) -> tuple[CancelRequest, ...]:
        for lease in swept:
            self._forget_cancel(lease)
        return tuple(self._cancels_of(swept))

    def _forget_cancel(self, lease: Lease) -> None:
        cancelled = self._cancelled.get(lease.engine_id)
        if cancelled is not None:
            cancelled.pop(lease.request_id, None)
            if not cancelled:
                del self._cancelled[lease.engine_id]

    def _next_session(self) -> int:
        self._sessions += 1
        return self._sessions

    def _refuse_while_draining(self) -> None:
        if self.draining:
            raise CaravanError(
                "DRAINING", "The coordinator is shutting down.", retry_after_s=DRAINING_RETRY_S
            )

    def check_integrity(self) -> None:
        """Asserts that every lease belongs to a live engine and gateway and every bound holds (I4, I6). O(n), for tests."""
        self.leases.check_integrity()
        for lease in self.leases:
            assert self.engines.find(lease.engine_id) is not None, lease
            assert self.gateways.find(lease.gateway_id) is not None, lease
            assert self.models.find(lease.model) is not None, lease
        for engine_id, requests in self._cancelled.items():
            assert requests
            for request_id in requests:
                lease_of = self.leases.of_request(request_id)
                assert lease_of is not None, request_id
                assert lease_of.engine_id == engine_id, request_id
        assert len(self.leases) <= self.limits.leases_max
        assert len(self.engines) <= self.limits.engines_max
        assert len(self.gateways) <= self.limits.gateways_max


def _ending(session: int, peer_id: str, why: Ending) -> Effects:
    return Effects(endings=(EndSession(session, peer_id, why),))


def _unknown(session_id: str) -> CaravanError:
    return CaravanError(
        "SESSION_UNKNOWN",
        f"The session '{session_id}' is not known: join again.",
        session_id=session_id,
    )


def _full(what: str, limit: int) -> CaravanError:
    return CaravanError(
        "CAPACITY_EXHAUSTED",
        f"There are {limit} {what}, and no more are taken.",
        retry_after_s=CAPACITY_RETRY_MIN_S,
        active=str(limit),
        capacity=str(limit),
    )
