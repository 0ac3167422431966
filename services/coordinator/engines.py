"""The engines that have joined: who they are, what they last reported, and whether they are alive.

Pure. A record belongs to one session, the life of one JoinEngine stream. Whatever is said in the name of a session that
was replaced is not about the engine any more (W6).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from caravan.engine.v1 import engine_service_pb2 as engine_pb

READY_PHASES = frozenset(
    {
        engine_pb.ENGINE_PHASE_IDLE,
        engine_pb.ENGINE_PHASE_PREFILLING,
        engine_pb.ENGINE_PHASE_GENERATING,
    }
)
"""Phases in which an engine takes requests."""


@dataclass(slots=True)
class EngineRecord:
    """One engine in one session.

    `incarnation` names the life of its process, `revision` the deployment's revision for which it was started, "" by hand.
    `capacity` is the most leases it may hold, `held` those it holds; `slots` and `counted_ready` are what it counts for in its
    model (models.py keeps the three). `reported_at` is in monotonic seconds; `last_grant` is the number of the last grant that
    it got, 0 before its first. `written_off` requests were not ended in time after it was asked to; since then, or since one
    failed, it `is_suspect` until one finishes. `is_drained` by command; `is_held_back` by its deployment. `requests` is what its
    last report said of each, kept as it came: most reports are never looked at.
    """

    engine_id: str
    session: int
    address: str
    model: engine_pb.ModelInfo
    load: engine_pb.EngineLoad
    capacity: int
    reported_at: float
    is_serving: bool
    incarnation: str = ""
    revision: str = ""
    is_drained: bool = False
    is_held_back: bool = False
    is_suspect: bool = False
    requests: Sequence[engine_pb.InflightRequest] = ()
    last_grant: int = 0
    written_off: int = 0
    held: int = 0
    slots: int = 0
    counted_ready: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether it is in a phase in which it takes requests, and neither drained nor held back."""
        return self.is_serving and not (self.is_drained or self.is_held_back)

    @property
    def has_room(self) -> bool:
        """Whether it takes one more request."""
        return self.is_ready and self.held < self.capacity


class EngineRegistry:
    """Engines by id, one session each."""

    def __init__(self, max_leases_per_engine: int) -> None:
        self._max_leases = max_leases_per_engine
        self._engines: dict[str, EngineRecord] = {}
        self._sessions: dict[int, EngineRecord] = {}

    def __len__(self) -> int:
        return len(self._engines)

    def __iter__(self) -> Iterator[EngineRecord]:
        """In the order of their joining. Copies first, so that the metrics thread may iterate too."""
        return iter(tuple(self._engines.values()))

    def find(self, engine_id: str) -> EngineRecord | None:
        """The engine, or None where it has not joined."""
        return self._engines.get(engine_id)

    def of_session(self, session: int) -> EngineRecord | None:
        """The engine whose session this is, or None where the session is over."""
        return self._sessions.get(session)

    def add(
        self,
        engine_id: str,
        session: int,
        address: str,
        model: engine_pb.ModelInfo,
        load: engine_pb.EngineLoad,
        *,
        incarnation: str,
        revision: str,
        now: float,
    ) -> EngineRecord:
        """Adds an engine. The session before, if any, has been removed."""
        assert engine_id not in self._engines
        record = EngineRecord(
            engine_id=engine_id,
            session=session,
            address=address,
            model=model,
            load=load,
            capacity=self._capacity(model),
            reported_at=now,
            is_serving=load.phase in READY_PHASES,
            incarnation=incarnation,
            revision=revision,
        )
        self._engines[engine_id] = self._sessions[session] = record
        return record

    def report(
        self,
        record: EngineRecord,
        model: engine_pb.ModelInfo | None,
        load: engine_pb.EngineLoad,
        requests: Sequence[engine_pb.InflightRequest],
        now: float,
    ) -> None:
        """Takes a report; `model` is None where the report does not repeat it, and `requests` are empty in most of them."""
        if model is not None:
            record.model = model
            record.capacity = self._capacity(model)
        record.load = load
        record.is_serving = load.phase in READY_PHASES
        record.reported_at = now
        if requests or load.phase == engine_pb.ENGINE_PHASE_IDLE:
            record.requests = requests

    def remove(self, session: int) -> EngineRecord | None:
        """Removes the engine of a session and returns it; None where the session is over already."""
        record = self._sessions.pop(session, None)
        if record is not None:
            del self._engines[record.engine_id]
        return record

    def silent_since(self, then: float) -> list[EngineRecord]:
        """Engines that have not reported after `then`."""
        return [record for record in self._engines.values() if record.reported_at <= then]

    def _capacity(self, model: engine_pb.ModelInfo) -> int:
        return min(model.max_sequences, self._max_leases)
