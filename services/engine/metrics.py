"""Every series of the engine."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.engine.decoder import Decoder
from services.engine.job import Job
from services.engine.scheduler import Scheduler

# From a step of a tiny model to a prefill on a slow machine.
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_QUEUE_BUCKETS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class EngineMetrics:
    """The series, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.queue_seconds = Histogram(
            "caravan_queue_seconds",
            "From the arrival of a request to its first prefill.",
            buckets=_QUEUE_BUCKETS,
            registry=self.registry,
        )
        self.decode_step_seconds = Histogram(
            "caravan_decode_step_seconds",
            "Time of one batch: decode, sampling and text.",
            buckets=_STEP_BUCKETS,
            registry=self.registry,
        )
        self.active_sequences = Gauge(
            "caravan_engine_active_sequences",
            "Sequences that prefill or generate.",
            registry=self.registry,
        )
        self.queue_depth = Gauge(
            "caravan_queue_depth", "Requests that wait for a sequence.", registry=self.registry
        )
        self.free_cells = Gauge(
            "caravan_engine_free_cells", "KV cells that no sequence holds.", registry=self.registry
        )
        self.prompt_tokens = Counter(
            "caravan_prompt_tokens_total", "Prompt tokens computed.", registry=self.registry
        )
        self.generated_tokens = Counter(
            "caravan_generated_tokens_total", "Tokens generated.", registry=self.registry
        )

    def watch(self, decoder: Decoder) -> None:
        """Reads the gauges from the scheduler whenever they are scraped."""

        def reading(read: Callable[[Scheduler[Job]], int]) -> Callable[[], float]:
            # The scheduler is there once the model is loaded.
            return lambda: read(decoder.scheduler) if decoder.loaded else 0

        self.active_sequences.set_function(reading(lambda scheduler: scheduler.active))
        self.queue_depth.set_function(reading(lambda scheduler: scheduler.waiting))
        self.free_cells.set_function(reading(lambda scheduler: scheduler.free_cells))

    def stepped(self, seconds: float, prefill_tokens: int, generated_tokens: int) -> None:
        """A batch was decoded."""
        self.decode_step_seconds.observe(seconds)
        if prefill_tokens:
            self.prompt_tokens.inc(prefill_tokens)
        if generated_tokens:
            self.generated_tokens.inc(generated_tokens)

    def admitted(self, queue_s: float) -> None:
        """A request left the queue."""
        self.queue_seconds.observe(queue_s)
