"""Every series of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from caravan.core.v1 import generation_pb2
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from services.engine.decoder import Decoder
from services.engine.job import Job
from services.engine.kv.store import SaveReason, Source
from services.engine.kv.tiered_store import TieredStore
from services.engine.request_metrics import RequestMetrics
from services.engine.scheduler import Scheduler

# From a step of a tiny model to a prefill on a slow machine.
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_STATE_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
_HITS = {
    generation_pb2.CACHE_HIT_COLD: "cold",
    generation_pb2.CACHE_HIT_PARTIAL: "partial",
    generation_pb2.CACHE_HIT_EXACT: "exact",
    generation_pb2.CACHE_HIT_RESIDENT: "resident",
}


class EngineMetrics(RequestMetrics):
    """The series of an engine that runs its model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.decode_step_seconds = Histogram(
            "caravan_decode_step_seconds",
            "Time of one batch: decode, sampling and text.",
            buckets=_STEP_BUCKETS,
            registry=self.registry,
        )
        self.free_cells = Gauge(
            "caravan_engine_free_cells", "KV cells that no sequence holds.", registry=self.registry
        )
        self.requests_resumed = Counter(
            "caravan_engine_requests_resumed_total",
            "Requests that went on with an answer that another engine had begun.",
            registry=self.registry,
        )
        self._add_kv()

    def _add_kv(self) -> None:
        self.kv_prompts = Counter(
            "caravan_kv_prompts_total",
            "Prompts admitted, by where the reused part came from.",
            ["hit"],
            registry=self.registry,
        )
        self.kv_cached_prompt_tokens = Counter(
            "caravan_kv_cached_prompt_tokens_total",
            "Prompt tokens whose state was reused instead of computed.",
            registry=self.registry,
        )
        self.kv_pack_seconds = Histogram(
            "caravan_kv_pack_seconds",
            "Time in which the decode thread packed one block to save it.",
            ["reason"],
            buckets=_STATE_BUCKETS,
            registry=self.registry,
        )
        self.kv_restore_seconds = Histogram(
            "caravan_kv_restore_seconds",
            "Time in which the decode thread restored one block.",
            buckets=_STATE_BUCKETS,
            registry=self.registry,
        )
        self.kv_refused = Counter(
            "caravan_kv_refused_states_total",
            "States that llama.cpp did not take.",
            registry=self.registry,
        )
        self.kv_swapped = Gauge(
            "caravan_kv_swapped_sequences",
            "Sequences that were swapped out and wait to go on.",
            registry=self.registry,
        )
        self.kv_resident_cells = Gauge(
            "caravan_kv_resident_cells",
            "KV cells that only finished sequences hold.",
            registry=self.registry,
        )

    def watch(self, decoder: Decoder) -> None:
        """Reads the gauges from the scheduler whenever they are scraped."""

        def reading(read: Callable[[Scheduler[Job]], int]) -> Callable[[], float]:
            # The scheduler is there once the model is loaded.
            return lambda: read(decoder.scheduler) if decoder.loaded else 0

        self.active_sequences.set_function(reading(lambda scheduler: scheduler.active))
        self.queue_depth.set_function(reading(lambda scheduler: scheduler.waiting))
        self.free_cells.set_function(reading(lambda scheduler: scheduler.free_cells))
        self.registry.register(_SwapCollector(reading(lambda scheduler: scheduler.swapped_out)))
        self.kv_swapped.set_function(reading(lambda scheduler: scheduler.swapped))
        self.kv_resident_cells.set_function(reading(lambda scheduler: scheduler.resident_cells))

    def watch_store(self, store: Callable[[], TieredStore | None]) -> None:
        """Reads the counters of the store, once there is one, whenever they are scraped."""
        self.registry.register(_StoreCollector(store))

    def stepped(self, seconds: float, prefill_tokens: int, generated_tokens: int) -> None:
        """A batch was decoded."""
        self.decode_step_seconds.observe(seconds)
        if prefill_tokens:
            self.prompt_tokens.inc(prefill_tokens)
        if generated_tokens:
            self.generated_tokens.inc(generated_tokens)

    def admitted(self, job: Job, queue_s: float) -> None:
        """A request left the queue; what it reuses is known."""
        self.queue_seconds.observe(queue_s)
        self.kv_prompts.labels(_HITS[job.cache_hit]).inc()
        self.kv_cached_prompt_tokens.inc(job.cached_tokens)

    def resumed(self) -> None:
        """A request goes on with the answer of another engine."""
        self.requests_resumed.inc()

    def moved(self, requests: int) -> None:
        """Requests ended so that others go on with them."""
        self.requests_moved.inc(requests)

    def restored(self, seconds: float) -> None:
        """A piece of saved state was joined."""
        self.kv_restore_seconds.observe(seconds)

    def refused(self) -> None:
        """llama.cpp did not take a piece of saved state."""
        self.kv_refused.inc()

    def packed(self, seconds: float, reason: SaveReason) -> None:
        """A block was packed to be saved."""
        self.kv_pack_seconds.labels(reason.name.lower()).observe(seconds)


class _SwapCollector(Collector):
    """The counter that the scheduler keeps itself."""

    def __init__(self, swap_outs: Callable[[], float]) -> None:
        self._swap_outs = swap_outs

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(
            "caravan_kv_swap_outs_total",
            "Times that a sequence was swapped out.",
            self._swap_outs(),
        )


class _StoreCollector(Collector):
    """The counters that the store keeps itself."""

    def __init__(self, store: Callable[[], TieredStore | None]) -> None:
        self._store = store

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        store = self._store()
        if store is None:
            return
        stats = store.stats
        yield GaugeMetricFamily(
            "caravan_kv_ram_bytes", "Bytes of saved blocks in RAM.", store.ram_bytes
        )
        yield GaugeMetricFamily(
            "caravan_kv_queued_bytes",
            "Bytes of blocks that wait to be written.",
            store.queued_bytes,
        )
        found = CounterMetricFamily(
            "caravan_kv_blocks_found_total", "Blocks found, by where they were.", labels=["source"]
        )
        for source in Source:
            found.add_metric([source.value], stats.blocks_found[source])
        yield found
        saves = CounterMetricFamily(
            "caravan_kv_saves_total", "Files published, by why.", labels=["reason"]
        )
        for reason in SaveReason:
            if reason is not SaveReason.UNSPECIFIED:
                saves.add_metric([reason.name.lower()], stats.saves[reason])
        yield saves
        yield CounterMetricFamily(
            "caravan_kv_ram_evictions_total",
            "Blocks that left RAM for want of room.",
            store.evictions,
        )
        yield CounterMetricFamily(
            "caravan_kv_saves_dropped_total",
            "Blocks that were not published: the queue was full or the cache service was down.",
            stats.saves_dropped,
        )
        yield CounterMetricFamily(
            "caravan_kv_corrupt_total",
            "Blocks that failed their checks and were withdrawn.",
            stats.corrupt_files,
        )
        yield CounterMetricFamily(
            "caravan_kv_lookup_failures_total",
            "Lookups that went on without the cache service.",
            stats.acquire_failures,
        )
