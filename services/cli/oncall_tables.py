"""The tables of models, engines and requests that `caravan status`, `engines` and `requests` show. Pure.

Names and ids come from clients and engines, so whatever could command the terminal is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import deployment_pb2
from caravan.core.v1 import generation_pb2, scheduling_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from google.protobuf.duration_pb2 import Duration

from services.cli.tables import aligned, count, enum_word, printable, span

SILENT_S: Final = 2.5
"""Age of an engine's last report from which on it is worth a note; reports come every second."""

_MODEL_HEAD: Final = ("MODEL", "STATE", "READY", "RUNNING", "QUEUED", "CAPACITY")
_ENGINE_HEAD: Final = (
    *("ENGINE", "MODEL", "PHASE", "LEASES", "ACTIVE", "QUEUED", "SWAPPED", "TOK/S"),
    *("FREE CELLS", "LAST HIT"),
)
_REQUEST_HEAD: Final = (
    *("REQUEST", "MODEL", "ENGINE", "PHASE", "AGE", "QUEUED", "PROMPT", "ANSWER"),
    *("PRIORITY", "TENANT"),
)


def seconds(duration: Duration) -> float:
    """A Duration in seconds."""
    return duration.ToNanoseconds() / 1e9


def model_lines(
    models: Sequence[pb.Model], deployments: Sequence[deployment_pb2.DeploymentRecord]
) -> Iterator[str]:
    """A line for each model, and for each deployment that no engine serves; then their notes, which a narrow terminal must
    not cut off."""
    records = {record.deployment.name: record for record in deployments}
    known = {model.name: model for model in models}
    rows = [
        _model_row(known.get(name, pb.Model(name=name)), records.get(name))
        for name in sorted({*known, *records})
    ]
    yield from aligned([_MODEL_HEAD, *rows], right=range(3, 6))
    for name, record in sorted(records.items()):
        if record.note:
            yield _note(name, record.note)


def _note(name: str, text: str) -> str:
    return f"! {printable(name)}: {printable(text)}"


def _model_row(model: pb.Model, record: deployment_pb2.DeploymentRecord | None) -> tuple[str, ...]:
    if record is None:
        state = "serving" if model.ready_engines else "pending"
        ready = str(model.ready_engines)
    else:
        state = enum_word(deployment_pb2.DeploymentState, "DEPLOYMENT_STATE_", record.state)
        ready = f"{model.ready_engines}/{record.deployment.replicas}"
    counts = (model.in_flight, model.queued, model.capacity)
    return (printable(model.name), state, ready, *map(str, counts))


def engine_lines(engines: Sequence[pb.Engine]) -> Iterator[str]:
    """A line for each engine; then their notes."""
    rows = [_engine_row(engine) for engine in engines]
    yield from aligned([_ENGINE_HEAD, *rows], right=range(3, 9))
    for engine in engines:
        for text in _engine_notes(engine):
            yield _note(engine.engine_id, text)


def _engine_row(engine: pb.Engine) -> tuple[str, ...]:
    load = engine.load
    return (
        printable(engine.engine_id),
        _model(engine.model),
        engine_phase(engine),
        str(engine.leases),
        str(load.active_sequences),
        str(load.queued_requests),
        str(load.swapped_sequences),
        f"{load.tokens_per_second:.0f}",
        "-" if engine.model.provider else str(load.free_cells),
        _last_hit(load),
    )


def _model(model: engine_pb.ModelInfo) -> str:
    """Its name, and who runs it where that is not the engine itself."""
    name = printable(model.name)
    return f"{name} ({printable(model.provider)})" if model.provider else name


def engine_phase(engine: pb.Engine) -> str:
    """Such as `idle`, `loading 45%`, or `drained` once nothing runs on an engine that takes nothing new."""
    load = engine.load
    if load.phase == engine_pb.ENGINE_PHASE_LOADING:
        return f"loading {load.load_progress:.0%}"
    if load.phase == engine_pb.ENGINE_PHASE_DRAINING and not engine.leases:
        return "drained"
    return enum_word(engine_pb.EnginePhase, "ENGINE_PHASE_", load.phase)


def _last_hit(load: engine_pb.EngineLoad) -> str:
    if not load.last_hit:
        return "-"
    kind = enum_word(generation_pb2.CacheHit, "CACHE_HIT_", load.last_hit)
    return f"{kind} {load.last_hit_tokens}" if load.last_hit_tokens else kind


def _engine_notes(engine: pb.Engine) -> Iterator[str]:
    if engine.load.failure:
        yield engine.load.failure
    if seconds(engine.report_age) > SILENT_S:
        yield f"silent for {span(seconds(engine.report_age))}"
    if engine.drained and engine.load.phase != engine_pb.ENGINE_PHASE_DRAINING:
        yield "was told to drain, and does not say yet that it does"
    if engine.held_back:
        yield "held back: engines of another revision serve its deployment"
    if engine.written_off:
        yield f"did not end {count(engine.written_off, 'request')} in time"
    if engine.suspect:
        yield "suspect: it failed a request and has finished none since, so it is chosen last"


def request_lines(requests: Sequence[pb.InflightRequest]) -> Iterator[str]:
    """A line for each request, in the order given."""
    rows = [_request_row(request) for request in requests]
    return aligned([_REQUEST_HEAD, *rows], right=range(4, 8))


def _request_row(request: pb.InflightRequest) -> tuple[str, ...]:
    return (
        printable(request.request_id),
        printable(request.model),
        printable(request.engine_id) or "-",
        request_phase(request),
        span(seconds(request.age)),
        span(seconds(request.queued)),
        str(request.prompt_tokens or "-"),
        str(request.completion_tokens),
        enum_word(scheduling_pb2.Priority, "PRIORITY_", request.priority),
        printable(request.tenant) or "-",
    )


_ENGINE_PHASES: Final[Mapping[int, str]] = {
    engine_pb.REQUEST_PHASE_QUEUED: "admitted",
    engine_pb.REQUEST_PHASE_PREFILLING: "prefilling",
    engine_pb.REQUEST_PHASE_GENERATING: "generating",
}


def request_phase(request: pb.InflightRequest) -> str:
    """`queued` or `cancelling`; of one that runs, what its engine last said of it (`admitted`: it waits for a sequence there)."""
    if request.phase == pb.INFLIGHT_PHASE_RUNNING:
        return _ENGINE_PHASES.get(request.engine_phase, "running")
    return enum_word(pb.InflightPhase, "INFLIGHT_PHASE_", request.phase)
