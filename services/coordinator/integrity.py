"""Asserts that everything that is counted is what a recount says, and that nobody waits beside room (I4, I6), for tests. O(n)."""

from __future__ import annotations

from services.coordinator.admission import Admission
from services.coordinator.models import ModelCatalogue, ModelRecord


def check_admission(admission: Admission, models: ModelCatalogue) -> None:
    """Raises AssertionError where queues, leases, waiting requests and sums disagree."""
    admission.leases.check_integrity()
    admission.waiting.check_integrity()
    for model in models:
        _check_model(admission, model)
    assert len(admission.waiting) == sum(model.queue.queued_count for model in models)
    for engine_id in admission.cancelling.counts():
        for lease in admission.cancelling.items(engine_id):
            assert admission.leases.find(lease.lease_id) is lease
            assert lease.engine_id == engine_id


def _check_model(admission: Admission, model: ModelRecord) -> None:
    queue, engines = model.queue, model.engines.values()
    queue.check_integrity()
    assert queue.in_flight_count == admission.leases.of_model(model.name)
    assert queue.boundary.max_in_flight == model.limit
    ready = [engine for engine in engines if engine.is_ready]
    assert model.ready_engines == len(ready)
    free = sum(max(0, engine.capacity - engine.held) for engine in ready)
    assert queue.room <= free, (queue.room, free)
    assert model.limit < model.slots or queue.room == free, (queue.room, free)
    assert queue.room == 0 or queue.in_turn_count == 0, model.name
    assert queue.queued_count == queue.in_turn_count + len(model.ahead)
    assert not (queue.room and model.ahead.first(model.choice.has_room_for)), model.name
    model.choice.check_integrity([engine for engine in engines if engine.has_room])
    for engine in engines:
        assert engine.held == admission.leases.on_engine(engine.engine_id)
