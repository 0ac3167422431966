"""Every series of the cache service. Sizes and counters are read from the state at each scrape; labels come from enums only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from caravan.cache.v1 import cache_service_pb2 as pb
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from services.cache.core import Core
from services.cache.effects import Ending
from services.cache.rows import Tier

ACQUIRE_BUCKETS_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.2, 1.0)
_REASONS = tuple(
    name.removeprefix("SAVE_REASON_").lower()
    for name, number in sorted(pb.SaveReason.items(), key=lambda item: item[1])
)
Family = CounterMetricFamily | GaugeMetricFamily


class CacheMetrics:
    """The series, registered with one registry."""

    def __init__(self, registry: CollectorRegistry, core: Core) -> None:
        self._acquire = Histogram(
            "caravan_cache_acquire_seconds",
            "Time of one Acquire inside the service.",
            buckets=ACQUIRE_BUCKETS_S,
            registry=registry,
        )
        self._ended = Counter(
            "caravan_cache_sessions_ended_total",
            "Sessions that the service ended of its own accord.",
            ["why"],
            registry=registry,
        )
        for why in Ending:
            self._ended.labels(why.name.lower())
        registry.register(_StateCollector(core))

    def observe_acquire(self, seconds: float) -> None:
        """One Acquire took so long."""
        self._acquire.observe(seconds)

    def count_ending(self, why: Ending) -> None:
        """One session was ended."""
        self._ended.labels(why.name.lower()).inc()


class _StateCollector(Collector):
    """What the state counts by itself. Scraped on a thread of its own: it reads single values and copies only."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def collect(self) -> Iterator[Family]:
        yield from self._sizes()
        yield from self._counters()

    def _sizes(self) -> Iterable[Family]:
        core = self._core
        yield GaugeMetricFamily("caravan_cache_rows", "Blocks that are known.", len(core.index))
        held = GaugeMetricFamily(
            "caravan_cache_bytes", "Bytes of copies, reserved ones included.", labels=["tier"]
        )
        quota = GaugeMetricFamily(
            "caravan_cache_quota_bytes", "Bytes that the places may hold.", labels=["tier"]
        )
        places = list(core.places)
        for tier in Tier:
            label = [tier.name.lower()]
            ledgers = [place.ledger for place in places if place.tier is tier]
            held.add_metric(label, sum(ledger.held for ledger in ledgers))
            quota.add_metric(label, sum(ledger.quota for ledger in ledgers))
        yield held
        yield quota
        sessions = list(core.sessions)
        claims = sum(len(session.claims) for session in sessions)
        yield GaugeMetricFamily(
            "caravan_cache_sessions", "Engines that have joined.", len(sessions)
        )
        yield GaugeMetricFamily("caravan_cache_claims", "Claims that are held.", claims)
        yield GaugeMetricFamily(
            "caravan_cache_reservations", "Saves under way.", len(core.reservations)
        )
        yield GaugeMetricFamily(
            "caravan_cache_waiters", "Calls that wait for a save.", len(core.waiters)
        )

    def _counters(self) -> Iterable[Family]:
        counters = self._core.counters
        yield CounterMetricFamily("caravan_cache_acquires_total", "Acquires.", counters.acquires)
        yield CounterMetricFamily(
            "caravan_cache_blocks_wanted_total",
            "Blocks that were asked for.",
            counters.blocks_wanted,
        )
        yield CounterMetricFamily(
            "caravan_cache_blocks_found_total",
            "Blocks that were given.",
            counters.blocks_found,
        )
        yield CounterMetricFamily(
            "caravan_cache_partial_hits_total",
            "Blocks that were given for use in part.",
            counters.partial_hits,
        )
        saves = CounterMetricFamily(
            "caravan_cache_saves_total", "Copies that were saved.", labels=["reason"]
        )
        for reason, count in zip(_REASONS, counters.saves, strict=True):
            saves.add_metric([reason], count)
        yield saves
        yield CounterMetricFamily(
            "caravan_cache_duplicates_total",
            "Saves that were not needed: the copy was there or on its way.",
            counters.duplicates,
        )
        yield CounterMetricFamily(
            "caravan_cache_refused_total",
            "Saves that were refused for want of room.",
            counters.refused,
        )
        yield CounterMetricFamily(
            "caravan_cache_evictions_total",
            "Copies that were dropped.",
            counters.evictions,
        )
        yield CounterMetricFamily(
            "caravan_cache_evicted_bytes_total",
            "Bytes that were dropped.",
            counters.evicted_bytes,
        )
        yield CounterMetricFamily(
            "caravan_cache_corrupt_total",
            "Copies that failed their checks.",
            counters.corrupt,
        )
        yield CounterMetricFamily(
            "caravan_cache_adopted_total",
            "Files of lost writers that were adopted.",
            counters.adopted,
        )
