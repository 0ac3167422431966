"""What the engine knows of itself and its requests, as messages of its contract. Pure."""

from __future__ import annotations

from caravan.core.v1 import generation_pb2
from caravan.engine.v1 import engine_service_pb2 as pb
from google.protobuf import duration_pb2

from services.engine.backend import ModelFacts
from services.engine.inflight import Inflight
from services.engine.outbox import Ending, Update


def model_info(name: str, facts: ModelFacts) -> pb.ModelInfo:
    """What the engine runs."""
    return pb.ModelInfo(
        name=name,
        description=facts.description,
        context_tokens=facts.context_tokens,
        vocabulary_tokens=facts.vocabulary_tokens,
        max_sequences=facts.max_sequences,
        weight_bytes=facts.weight_bytes,
        cache_support=facts.cache_support.value,  # type: ignore[arg-type]
        cache_note=facts.cache_note,
    )


def inflight_request(row: Inflight, now: float) -> pb.InflightRequest:
    """A request in flight, as it is at `now`."""
    return pb.InflightRequest(
        request_id=row.request_id,
        phase=row.phase.value,  # type: ignore[arg-type]
        age=_duration(now - row.arrived),
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
    )


def started(row: Inflight, update: Update) -> pb.Started:
    """The first event of an answer."""
    return pb.Started(
        prompt_tokens=row.prompt_tokens,
        cached_tokens=update.cached_tokens,
        # A request that is cancelled while it waits has reused nothing.
        cache_hit=update.cache_hit or generation_pb2.CACHE_HIT_COLD,  # type: ignore[arg-type]
    )


def finished(ending: Ending) -> pb.Finished:
    """The last event of an answer."""
    return pb.Finished(
        reason=ending.reason,  # type: ignore[arg-type]
        usage=generation_pb2.Usage(
            prompt_tokens=ending.prompt_tokens,
            completion_tokens=ending.completion_tokens,
            cached_tokens=ending.cached_tokens,
        ),
        stop_text=ending.stop_text,
        queue_time=_duration(ending.queue_s),
        prefill_time=_duration(ending.prefill_s),
        decode_time=_duration(ending.decode_s),
        finish_key=ending.finish_key,
        cache_hit=ending.cache_hit,  # type: ignore[arg-type]
        restore_time=_duration(ending.restore_s),
    )


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromMicroseconds(max(0, round(seconds * 1_000_000)))
    return duration
