"""What is taken from an engine's messages."""

from __future__ import annotations

import math

import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator import checks, messages


def test_free_text_is_cut_at_whole_characters() -> None:
    """A description or failure text of any length takes a bounded place (I4)."""
    load = engine_pb.EngineLoad(failure="€" * 5000)
    report = checks.checked_report(
        pb.JoinEngineRequest(
            report=pb.EngineReport(
                load=load, model=engine_pb.ModelInfo(name="m", description="d" * 5000)
            )
        )
    )
    assert report.load.failure == "€" * (checks.TEXT_BYTES_MAX // 3)
    assert len(report.model.description) == checks.TEXT_BYTES_MAX


@pytest.mark.parametrize(
    ("told", "taken"), [(math.nan, 0.0), (-1.0, 0.0), (7.0, 1.0), (math.inf, 1.0), (0.5, 0.5)]
)
def test_progress_is_a_share(told: float, taken: float) -> None:
    """Whatever an engine tells, progress is within 0 and 1."""
    load = engine_pb.EngineLoad(load_progress=told)
    report = checks.checked_report(pb.JoinEngineRequest(report=pb.EngineReport(load=load)))
    assert report.load.load_progress == taken


def test_durations_are_never_negative() -> None:
    """An age is not below zero."""
    assert messages.to_duration(-1e-9).ToMicroseconds() == 0
    assert messages.to_duration(1.5).ToMilliseconds() == 1500
