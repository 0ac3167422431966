"""Faults as words of a command line."""

from __future__ import annotations

import pytest

from services.dev.provider.fault_text import fault_from_text
from services.dev.provider.faults import Fault, FaultError, Kind


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("empty", Fault(Kind.EMPTY)),
        (
            "status=429,retry_after=2,times=3",
            Fault(Kind.STATUS, status=429, retry_after="2", times=3),
        ),
        ("cut", Fault(Kind.CUT)),
        ("cut=5", Fault(Kind.CUT, after=5)),
        ("hang,times=always", Fault(Kind.HANG, times=None)),
        ("pause=0.5,after=2", Fault(Kind.PAUSE, seconds=0.5, after=2)),
        ("oversized=100,after=1", Fault(Kind.OVERSIZED, size=100, after=1)),
        ("status=400,reason=quota", Fault(Kind.STATUS, status=400, reason="quota")),
    ],
)
def test_words_mean_a_fault(text: str, fault: Fault) -> None:
    assert fault_from_text(text) == fault


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("melt=1", "kind"),
        ("", "kind"),
        ("empty=1", "takes no value"),
        ("cut=soon", "no number"),
        ("pause=", "no number"),
        ("cut=1,after=2", "twice"),
        ("cut,colour=red", "colour"),
        ("cut,times=often", "no number"),
    ],
)
def test_other_words_are_refused(text: str, said: str) -> None:
    with pytest.raises(FaultError, match=said):
        fault_from_text(text)
