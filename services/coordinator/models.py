"""The models that engines have registered or that have rules, with their queues, and for how long one stays known.

Pure. A model whose engines all went away is remembered for a while, so that clients are told to come back (503) while an
engine restarts, instead of that the model does not exist (404); and while requests wait for it. One with rules stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from services.coordinator.ahead import AheadLine
from services.coordinator.backpressure import Backpressure
from services.coordinator.choice import EngineChoice
from services.coordinator.deployment import Deployment
from services.coordinator.engines import EngineRecord
from services.coordinator.routing import Policy

ABANDONED_MODELS_MAX = 256
"""Models without an engine that are remembered; beyond it the one abandoned longest is forgotten."""

_HOLD_WEIGHT = 0.1  # Share of the newest lease in the mean: about the last twenty leases count.


@dataclass(slots=True)
class ModelRecord:
    """A model: times are in seconds, `created_at` since the epoch, 0 before an engine or rules came; `abandoned_at` monotonic.

    The queue's tasks in flight are the leases of the model. `slots` are the capacities of the ready engines, and the leases that
    are still held on others or beyond a capacity that shrank; so without rules the queue's room is exactly that of the engines.
    `ahead` are the waiting requests that go before all others. One that is
    `is_passing` goes as soon as it has no engines and nobody waits: its deployment was removed, or none of its engines has come.
    One that `is_throttled` gives half of its places, because its budget is spent.
    """

    name: str
    created_at: float
    queue: Backpressure
    choice: EngineChoice
    ahead: AheadLine = field(default_factory=AheadLine)
    engines: dict[str, EngineRecord] = field(default_factory=dict)
    rules: Deployment | None = None
    is_passing: bool = False
    is_throttled: bool = False
    abandoned_at: float | None = None
    lease_mean_s: float | None = None
    ready_engines: int = 0
    slots: int = 0
    _context_tokens: int = 0

    @property
    def limit(self) -> int:
        """Most leases at a time: what its engines can take, or less by its rules; half of that, but one, where it is throttled."""
        most = 0 if self.rules is None else self.rules.serving.max_concurrent
        limit = min(self.slots, most) if most else self.slots
        return max(1, limit // 2) if limit and self.is_throttled else limit

    def can_grant(self, avoid: frozenset[str]) -> bool:
        """Whether a request that avoids these lives of engines gets a lease now. O(lives that are avoided)."""
        return self.queue.room > 0 and self.choice.has_room_for(avoid)

    @property
    def context_tokens(self) -> int:
        """The least context of its engines in tokens; the last known one while none tells; 0 where none ever did."""
        known = [e.model.context_tokens for e in self.engines.values() if e.model.context_tokens]
        if known:
            self._context_tokens = min(known)
        return self._context_tokens

    def set_rules(self, rules: Deployment | None, max_queued: int) -> None:
        """Takes other rules, or none; `max_queued` is the bound of the queue under them."""
        self.rules = rules
        self.is_passing = rules is None
        self.queue.resize(self.limit, max_queued)

    def throttle(self, *, is_throttled: bool) -> None:
        """Halves its places, or gives them back."""
        self.is_throttled = is_throttled
        self.queue.resize(self.limit)

    def settle(self, engine: EngineRecord, held: int) -> None:
        """Takes a change of an engine into the sums, the limit of the queue and the choice."""
        engine.held = held
        self._count(
            engine, max(engine.capacity, held) if engine.is_ready else held, engine.is_ready
        )
        if engine.has_room:
            self.choice.offer(engine)
        else:
            self.choice.withdraw(engine)

    def remove(self, engine: EngineRecord) -> None:
        """The engine is gone, and its leases with it."""
        del self.engines[engine.engine_id]
        self._count(engine, 0, is_ready=False)
        self.choice.withdraw(engine)

    def _count(self, engine: EngineRecord, slots: int, is_ready: bool) -> None:
        self.slots += slots - engine.slots
        self.ready_engines += is_ready - engine.counted_ready
        engine.slots, engine.counted_ready = slots, is_ready
        self.queue.resize(self.limit)

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
        model = self._models.get(engine.model.name) or self._add(engine.model.name)
        model.created_at = model.created_at or wall
        model.engines[engine.engine_id] = engine
        model.is_passing = False
        self._keep(model)
        model.settle(engine, 0)

    def remove_engine(self, engine: EngineRecord, now: float) -> None:
        """An engine serves its model no more."""
        model = self._models[engine.model.name]
        _ = model.context_tokens  # Remembers the last known value before its teller goes.
        model.remove(engine)
        self._abandon_if_empty(model, now)

    def set_rules(
        self, name: str, rules: Deployment | None, max_queued: int, *, now: float, wall: float
    ) -> ModelRecord | None:
        """Gives a model rules, also before it has an engine, or takes them away; None where it is not known then."""
        model = self._models.get(name)
        if rules is None and (model is None or model.rules is None):
            return model
        model = model or self._add(name)
        model.set_rules(rules, max_queued)
        if rules is None:
            self._abandon_if_empty(model, now)
        else:
            model.created_at = model.created_at or wall
            self._keep(model)
        return self._models.get(name)

    def expect(self, name: str, now: float) -> ModelRecord:
        """The model; one that is not known is so only for as long as somebody waits for it."""
        model = self._models.get(name)
        if model is None:
            model = self._add(name)
            self._abandon_if_empty(model, now)
            model.is_passing = True
        return model

    def expire(self, now: float) -> None:
        """Forgets the models that have been without an engine for the time of memory."""
        while self._abandoned:
            model = next(iter(self._abandoned.values()))
            assert model.abandoned_at is not None
            if now - model.abandoned_at < self._memory_s or model.queue.queued_count:
                return
            self._forget(model.name)

    def forget_passing(self, model: ModelRecord) -> None:
        """Forgets a passing model when it has no engines and nobody waits."""
        if model.is_passing and model.name in self._abandoned and not model.queue.queued_count:
            self._forget(model.name)

    def _add(self, name: str) -> ModelRecord:
        model = ModelRecord(name, 0.0, self._new_queue(), EngineChoice(self._new_policy))
        self._models[name] = model
        return model

    def _keep(self, model: ModelRecord) -> None:
        model.abandoned_at = None
        self._abandoned.pop(model.name, None)

    def _abandon_if_empty(self, model: ModelRecord, now: float) -> None:
        if model.engines or model.rules is not None or model.name in self._abandoned:
            return
        model.abandoned_at = now
        self._abandoned[model.name] = model
        self.forget_passing(model)
        idle = [name for name, other in self._abandoned.items() if not other.queue.queued_count]
        if len(idle) > ABANDONED_MODELS_MAX:
            self._forget(idle[0])

    def _forget(self, name: str) -> None:
        del self._abandoned[name]
        del self._models[name]
