"""A streamed answer as steps to take: what to send, after which wait, and how it ends. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from services.dev.provider.dialect import Frames
from services.dev.provider.faults import Fault, Kind
from services.dev.provider.script import Script

WRITE_BYTES: Final = 1 << 14
"""Frames between which nothing is waited for go out in writes of about so many bytes."""
_GARBAGE: Final = b'data: {"choices": [{"delta": \n\n'


class Ending(Enum):
    """What follows the last step."""

    END = "end"
    """The body ends as HTTP wants it."""
    HANG = "hang"
    """Nothing, while the client stays."""
    CUT = "cut"
    """The connection is closed."""


@dataclass(frozen=True, slots=True)
class Step:
    """Waits so many seconds, then sends. `pieces` of the answer are in the data."""

    data: bytes
    pieces: int = 0
    wait_s: float = 0.0


def ending(fault: Fault | None) -> Ending:
    """How an answer with this fault ends."""
    if fault is not None and fault.kind is Kind.HANG:
        return Ending.HANG
    if fault is not None and fault.kind is Kind.CUT:
        return Ending.CUT
    return Ending.END


def steps(
    frames: Frames, script: Script, fault: Fault | None, error_event: bytes
) -> Iterator[Step]:
    """The steps of an answer, gathered into few writes where nothing is waited for."""
    data: list[bytes] = []
    size = pieces = 0
    wait_s = 0.0
    for step in _single(frames, script, fault, error_event):
        if data and (step.wait_s or size >= WRITE_BYTES):
            yield Step(b"".join(data), pieces, wait_s)
            data, size, pieces, wait_s = [], 0, 0, 0.0
        wait_s += step.wait_s
        data.append(step.data)
        size += len(step.data)
        pieces += step.pieces
    if data:
        yield Step(b"".join(data), pieces, wait_s)


def _single(
    frames: Frames, script: Script, fault: Fault | None, error_event: bytes
) -> Iterator[Step]:
    kind = fault.kind if fault is not None else None
    after = (fault.after or 0) if fault is not None else 0
    late_s = script.delay_s
    if fault is not None and kind is Kind.DELAY_BODY:
        late_s += fault.seconds
    if kind in {Kind.HANG, Kind.CUT} and after == 0:
        return
    yield Step(frames.opening, wait_s=late_s)
    for place, piece in enumerate(frames.pieces):
        if place == after and fault is not None:
            yield from _extra(fault, error_event)
            if _ends(fault):
                return
        pause_s = script.pace_s if place else 0.0
        if fault is not None and kind is Kind.PAUSE and place >= after:
            pause_s += fault.seconds
        yield Step(piece, 1, pause_s)
    if fault is not None and after >= len(frames.pieces):
        yield from _extra(fault, error_event)
        if _ends(fault):
            return
    yield Step(frames.closing)
    if kind is not Kind.UNTERMINATED:
        yield Step(frames.terminal)


def _extra(fault: Fault, error_event: bytes) -> Iterator[Step]:
    """What a fault puts between two pieces."""
    if fault.kind is Kind.GARBAGE:
        yield Step(_GARBAGE)
    elif fault.kind is Kind.OVERSIZED:
        yield Step(b'data: {"padding": "' + b"x" * fault.size + b'"}\n\n')
    elif fault.kind is Kind.ERROR_EVENT:
        yield Step(error_event)


def _ends(fault: Fault) -> bool:
    """Whether a fault ends the answer where it stands."""
    if fault.kind is Kind.UNTERMINATED:
        return fault.after is not None
    return fault.kind in {Kind.HANG, Kind.CUT, Kind.ERROR_EVENT}
