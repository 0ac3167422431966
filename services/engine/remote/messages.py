"""What the engine knows of itself and its requests, as messages of its contract. Pure."""

from __future__ import annotations

from caravan.core.v1 import generation_pb2
from caravan.engine.v1 import engine_service_pb2 as pb
from google.protobuf.duration_pb2 import Duration

from services.engine.remote.outbox import Ending, Update
from services.engine.remote.request import Request


def delta(update: Update) -> pb.Delta:
    """All pieces of an update."""
    text = update.text
    return pb.Delta(
        text=text[0] if len(text) == 1 else "".join(text),
        refusal="".join(update.refusal),
        tool_calls=update.calls,
        logprobs=update.logprobs,
        pieces=update.pieces,
    )


def started() -> pb.Started:
    """The first event of an answer. A provider tells the tokens of the prompt with the last one."""
    return pb.Started(cache_hit=generation_pb2.CACHE_HIT_COLD)


def finished(ending: Ending) -> pb.Finished:
    """The last event of an answer."""
    cached = ending.usage.cached_tokens
    return pb.Finished(
        reason=ending.reason,
        usage=ending.usage,
        stop_text=ending.stop_text,
        queue_time=_duration(ending.queue_s),
        prefill_time=_duration(ending.first_piece_s),
        decode_time=_duration(ending.pieces_s),
        cache_hit=generation_pb2.CACHE_HIT_PARTIAL if cached else generation_pb2.CACHE_HIT_COLD,
        cost_nanousd=ending.cost_nanousd,
    )


def inflight_request(request: Request, now: float) -> pb.InflightRequest:
    """A request in flight, as it is at `now`."""
    return pb.InflightRequest(
        request_id=request.request_id,
        phase=request.phase.value,  # type: ignore[arg-type]
        age=_duration(now - request.arrived),
        prompt_tokens=request.usage.prompt_tokens,
        completion_tokens=request.pieces,
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromMicroseconds(max(0, round(seconds * 1_000_000)))
    return duration
