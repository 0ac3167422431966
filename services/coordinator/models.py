"""The models that engines have registered, with their queues, and for how long one without an engine stays known.

Pure. A model whose engines all went away is remembered for a while, so that clients are told to come back (503) while an
engine restarts, instead of that the model does not exist (404); and while requests wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from services.coordinator.backpressure import Backpressure
from services.coordinator.engines import EngineRecord
from services.coordinator.routing import Policy

ABANDONED_MODELS_MAX = 256
"""Models without an engine that are remembered; beyond it the one abandoned longest is forgotten."""

_HOLD_WEIGHT = 0.1  # Share of the newest lease in the mean: about the last twenty leases count.


@dataclass(slots=True)
class ModelRecord:
    """A model: times are in seconds, `created_at` since the epoch, `abandoned_at` monotonic.

    The queue's tasks in flight are the leases of the model. `slots` is its limit: the capacities of the ready engines, and the
    leases that are still held on others or beyond a capacity that shrank; so its room is exactly the room of the engines.
    """

    name: str
    created_at: float
    queue: Backpressure
    policy: Policy
    engines: dict[str, EngineRecord] = field(default_factory=dict)
    abandoned_at: float | None = None
    lease_mean_s: float | None = None
    ready_engines: int = 0
    slots: int = 0
    _context_tokens: int = 0

    @property
    def context_tokens(self) -> int:
        """The least context of its engines in tokens; the last known one while none tells; 0 where none ever did."""
        known = [e.model.context_tokens for e in self.engines.values() if e.model.context_tokens]
        if known:
            self._context_tokens = min(known)
        return self._context_tokens

    def settle(self, engine: EngineRecord, held: int) -> None:
        """Takes a change of an engine into the sums, the limit of the queue and the policy."""
        engine.held = held
        self._count(
            engine, max(engine.capacity, held) if engine.is_ready else held, engine.is_ready
        )
        if engine.has_room:
            self.policy.offer(engine)
        else:
            self.policy.withdraw(engine)

    def remove(self, engine: EngineRecord) -> None:
        """The engine is gone, and its leases with it."""
        del self.engines[engine.engine_id]
        self._count(engine, 0, is_ready=False)
        self.policy.withdraw(engine)

    def _count(self, engine: EngineRecord, slots: int, is_ready: bool) -> None:
        self.slots += slots - engine.slots
        self.ready_engines += is_ready - engine.counted_ready
        engine.slots, engine.counted_ready = slots, is_ready
        self.queue.resize(self.slots)

    def note_lease(self, held_s: float) -> None:
        """Takes the duration of a lease that ended into the mean."""
        mean = held_s if self.lease_mean_s is None else self.lease_mean_s
        self.lease_mean_s = mean + _HOLD_WEIGHT * (held_s - mean)


class ModelCatalogue:
    """Models by name."""

    def __init__(
        self,
        memory_s: float,
        new_queue: Callable[[], Backpressure],
        new_policy: Callable[[], Policy],
    ) -> None:
        self._memory_s = memory_s
        self._new_queue = new_queue
        self._new_policy = new_policy
        self._models: dict[str, ModelRecord] = {}
        # In the order of abandonment, so that the oldest is found without a search.
        self._abandoned: dict[str, ModelRecord] = {}

    def __len__(self) -> int:
        return len(self._models)

    def __iter__(self) -> Iterator[ModelRecord]:
        """Sorted by name."""
        return iter(sorted(self._models.values(), key=lambda model: model.name))

    def find(self, name: str) -> ModelRecord | None:
        """The model, or None where no engine has registered it lately."""
        return self._models.get(name)

    def add_engine(self, engine: EngineRecord, wall: float) -> None:
        """An engine serves its model from now on."""
        name = engine.model.name
        model = self._models.get(name)
        if model is None:
            model = ModelRecord(name, wall, self._new_queue(), self._new_policy())
            self._models[name] = model
        model.engines[engine.engine_id] = engine
        model.abandoned_at = None
        self._abandoned.pop(name, None)
        model.settle(engine, 0)

    def remove_engine(self, engine: EngineRecord, now: float) -> None:
        """An engine serves its model no more."""
        model = self._models[engine.model.name]
        _ = model.context_tokens  # Remembers the last known value before its teller goes.
        model.remove(engine)
        if model.engines:
            return
        model.abandoned_at = now
        self._abandoned[model.name] = model
        idle = [name for name, other in self._abandoned.items() if not other.queue.queued_count]
        if len(idle) > ABANDONED_MODELS_MAX:
            self._forget(idle[0])

    def expire(self, now: float) -> None:
        """Forgets the models that have been without an engine for the time of memory."""
        while self._abandoned:
            model = next(iter(self._abandoned.values()))
            assert model.abandoned_at is not None
            if now - model.abandoned_at < self._memory_s or model.queue.queued_count:
                return
            self._forget(model.name)

    def _forget(self, name: str) -> None:
        del self._abandoned[name]
        del self._models[name]
