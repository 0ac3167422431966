"""Every series of the coordinator. Gauges read the state at each scrape; label values come from enums and registered models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from services.coordinator.cost_metrics import CostMetrics
from services.coordinator.deployment_status import State
from services.coordinator.effects import Effects, Ending
from services.coordinator.limit_metrics import LimitMetrics
from services.coordinator.state import CoordinatorState
from services.runtime.errors import TABLE

GRANTED = "granted"
_QUEUE_BUCKETS_S = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


def _words(names: Iterable[str], prefix: str) -> list[str]:
    return [name.removeprefix(prefix).lower() for name in names]


_PHASES: dict[int, str] = dict(
    zip(
        engine_pb.EnginePhase.values(),
        _words(engine_pb.EnginePhase.keys(), "ENGINE_PHASE_"),
        strict=True,
    )
)
_OUTCOMES: dict[int, str] = dict(
    zip(pb.Outcome.values(), _words(pb.Outcome.keys(), "OUTCOME_"), strict=True)
)


class _Queues(Collector):
    """Depths by model. Read at each scrape, so that a model that is forgotten leaves no series behind."""

    def __init__(self, state: CoordinatorState) -> None:
        self._state = state

    def collect(self) -> Iterator[GaugeMetricFamily]:
        depth = GaugeMetricFamily(
            "caravan_route_queue_depth", "Requests that wait for a sequence.", labels=["model"]
        )
        for model in self._state.models:
            depth.add_metric([model.name], model.queue.queued_count)
        yield depth


class CoordinatorMetrics:
    """The series, registered with one registry."""

    def __init__(self, registry: CollectorRegistry, state: CoordinatorState) -> None:
        self._state = state
        engines = Gauge(
            "caravan_engines", "Engines that have joined.", ["phase"], registry=registry
        )
        for phase, word in _PHASES.items():
            engines.labels(word).set_function(partial(self._in_phase, phase))
        Gauge("caravan_gateways", "Gateways that have joined.", registry=registry).set_function(
            lambda: len(state.gateways)
        )
        deployments = Gauge(
            "caravan_deployments", "Deployments that are kept.", ["state"], registry=registry
        )
        for standing in State:
            deployments.labels(standing.value).set_function(partial(self._standing, standing))
        registry.register(_Queues(state))
        self._costs = CostMetrics(registry, state)
        self._queued = Histogram(
            "caravan_route_queue_seconds",
            "From the arrival of a route to its grant.",
            registry=registry,
            buckets=_QUEUE_BUCKETS_S,
        )
        Gauge("caravan_leases", "Requests in flight.", registry=registry).set_function(
            lambda: len(state.leases)
        )
        self._routes = Counter(
            "caravan_route_total",
            "Answers to Route: granted, or the reason of the refusal.",
            ["result"],
            registry=registry,
        )
        self._routes.labels(GRANTED)
        self._releases = Counter(
            "caravan_releases_total",
            "Leases that their gateways ended, by the outcome of the request.",
            ["outcome"],
            registry=registry,
        )
        for word in _OUTCOMES.values():
            self._releases.labels(word)
        self._swept = Counter(
            "caravan_leases_swept_total",
            "Leases that ended because their engine or gateway went away.",
            registry=registry,
        )
        self._fell_back = Counter(
            "caravan_route_fallbacks_total",
            "Leases that were granted by a fallback of the deployment that was asked for.",
            registry=registry,
        )
        self._adopted = Counter(
            "caravan_leases_adopted_total",
            "Leases that gateways held of an earlier coordinator or session, and that were taken over.",
            registry=registry,
        )
        self._written_off = Counter(
            "caravan_leases_written_off_total",
            "Leases that ended because their engine did not end the request in time after it was asked to.",
            registry=registry,
        )
        self._ended = Counter(
            "caravan_sessions_ended_total",
            "Sessions that the coordinator ended of its own accord.",
            ["why"],
            registry=registry,
        )
        for why in Ending:
            self._ended.labels(why.name.lower())
        self._limits = LimitMetrics(registry, state)

    def count_permit(self, *, is_granted: bool) -> None:
        """One answer to AcquireLimit."""
        self._limits.count(is_granted=is_granted)

    def count_grant(self, queued_s: float, *, fell_back: bool) -> None:
        """One lease that was granted after `queued_s` seconds in the queue, by the deployment asked for or a fallback."""
        self._routes.labels(GRANTED).inc()
        if fell_back:
            self._fell_back.inc()
        self._queued.observe(queued_s)

    def count_refusal(self, reason: str) -> None:
        """One route that was refused, with a reason of the error table."""
        assert reason in TABLE
        self._routes.labels(reason.lower()).inc()

    def count_release(self, outcome: int) -> None:
        """One lease that was released; an outcome that is not known counts as unspecified."""
        self._releases.labels(_OUTCOMES.get(outcome, "unspecified")).inc()

    def count_effects(self, effects: Effects) -> None:
        """Leases that were swept, adopted or written off, and sessions that were ended."""
        if effects.swept:
            self._swept.inc(len(effects.swept))
        if effects.adopted:
            self._adopted.inc(len(effects.adopted))
        if effects.written_off:
            self._written_off.inc(len(effects.written_off))
        self._costs.count(effects.crossings)
        for ending in effects.endings:
            self._ended.labels(ending.why.name.lower()).inc()

    def _standing(self, state: State) -> int:
        return sum(kept.status.state is state for kept in self._state.deployments)

    def _in_phase(self, phase: int) -> int:
        # A phase that this version does not know is shown as unspecified: labels stay bounded.
        return sum(
            (engine.load.phase if engine.load.phase in _PHASES else 0) == phase
            for engine in self._state.engines
        )
