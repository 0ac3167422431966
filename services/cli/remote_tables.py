"""The table of engines in front of providers. Pure. Names come from elsewhere, so what could command the terminal is replaced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.engine.v1 import remote_service_pb2 as remote_pb

from services.cli.oncall_tables import seconds
from services.cli.tables import aligned, enum_word, printable, span

_HEAD: Final = (
    *("ENGINE", "DEPLOYMENT", "PROVIDER", "MODEL", "BREAKER", "WORKERS", "QUEUE"),
    *("REQ/MIN", "TOK/MIN", "CREDENTIAL"),
)


@dataclass(frozen=True)
class Seen:
    """An engine, and how it stands with its provider; else why it does not say."""

    engine: pb.Engine
    status: remote_pb.GetRemoteStatusResponse | None
    problem: str = ""


def remote_lines(seen: Sequence[Seen]) -> Iterator[str]:
    """A line for each engine that told how it stands; then those that did not, and other notes."""
    rows = [_row(one.engine, one.status) for one in seen if one.status is not None]
    if rows:
        yield from aligned([_HEAD, *rows], right=range(5, 9))
    for one in seen:
        for note in _notes(one):
            yield f"! {printable(one.engine.engine_id)}: {printable(note)}"


def breaker_notes(seen: Sequence[Seen]) -> Iterator[str]:
    """A line for each engine whose breaker keeps calls from its provider."""
    for one in seen:
        breaker = remote_pb.BreakerStatus() if one.status is None else one.status.breaker
        if breaker.state in {remote_pb.BREAKER_STATE_OPEN, remote_pb.BREAKER_STATE_HALF_OPEN}:
            provider = printable(one.engine.model.provider)
            yield f"! {printable(one.engine.engine_id)}: breaker of {provider}: {_breaker(breaker)}"


def _row(engine: pb.Engine, status: remote_pb.GetRemoteStatusResponse) -> tuple[str, ...]:
    limits = status.limits
    return (
        printable(engine.engine_id),
        printable(engine.model.name),
        printable(status.provider),
        printable(status.model),
        _breaker(status.breaker),
        f"{status.busy_workers}/{status.workers}",
        f"{status.queued}/{status.queue_capacity}",
        _used(limits.requests_used, limits.configured.requests_per_minute),
        _used(limits.tokens_used, limits.configured.tokens_per_minute),
        _credential(status.credential),
    )


def _breaker(breaker: remote_pb.BreakerStatus) -> str:
    """Such as `closed`, `closed, 3 failures`, `open for 12.0 s`, `held open`."""
    word = enum_word(remote_pb.BreakerState, "BREAKER_STATE_", breaker.state).replace("_", " ")
    if breaker.forced:
        word = f"held {word}"
    if breaker.HasField("remaining"):
        return f"{word} for {span(seconds(breaker.remaining))}"
    if breaker.failures and not breaker.forced:
        return f"{word}, {breaker.failures} failed"
    return word


def _used(used: int, limit: int) -> str:
    return f"{used}/{limit}" if limit else str(used)


def _credential(credential: remote_pb.CredentialStatus) -> str:
    if not credential.source:
        return "none"
    return f"{printable(credential.source)} #{credential.generation}"


def _notes(one: Seen) -> Iterator[str]:
    if one.status is None:
        yield one.problem
        return
    if one.engine.load.failure:
        yield one.engine.load.failure
    if one.status.replaced_workers:
        yield f"replaced {one.status.replaced_workers} workers after defects: its log has why"
    if not one.status.HasField("price"):
        yield "no price is known of its model: what it costs is counted as 0"
    if one.status.credential.HasField("expires_in"):
        left_s = seconds(one.status.credential.expires_in)
        yield (
            f"its credential expires in {span(left_s)}" if left_s else "its credential has expired"
        )
