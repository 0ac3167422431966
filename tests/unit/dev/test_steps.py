"""A streamed answer, step by step, with and without a fault."""

from __future__ import annotations

from services.dev.provider.dialect import Frames
from services.dev.provider.faults import Fault, Kind
from services.dev.provider.script import Script
from services.dev.provider.steps import WRITE_BYTES, Ending, Step, ending, steps

FRAMES = Frames(b"[", (b"a", b"b", b"c"), b"]", b".")
PACED = Script(delay_s=2, pace_s=1)


def sent(fault: Fault | None, script: Script | None = None) -> list[Step]:
    return list(steps(FRAMES, script or Script(), fault, b"!"))


def data(fault: Fault | None) -> bytes:
    return b"".join(step.data for step in sent(fault))


def test_an_answer_that_is_not_paced_goes_out_in_few_writes() -> None:
    assert sent(None) == [Step(b"[abc].", 3)]
    many = Frames(b"", (b"x" * 100,) * 1000, b"", b"")
    found = list(steps(many, Script(), None, b""))
    assert len(found) == 7
    assert sum(step.pieces for step in found) == 1000
    assert all(len(step.data) <= WRITE_BYTES + 100 for step in found)


def test_a_paced_answer_has_its_pauses_between_the_pieces() -> None:
    assert sent(None, PACED) == [Step(b"[a", 1, 2), Step(b"b", 1, 1), Step(b"c].", 1, 1)]


def test_a_pause_begins_where_it_is_said_and_adds_to_the_pace() -> None:
    found = sent(Fault(Kind.PAUSE, after=2, seconds=5), PACED)
    assert [step.wait_s for step in found] == [2, 1, 6]
    found = sent(Fault(Kind.PAUSE, seconds=5))
    assert [step.wait_s for step in found] == [0, 5, 5, 5]


def test_a_late_body_waits_once() -> None:
    found = sent(Fault(Kind.DELAY_BODY, seconds=5), PACED)
    assert [step.wait_s for step in found] == [7, 1, 1]


def test_what_ends_an_answer_early_ends_it_there() -> None:
    assert data(Fault(Kind.CUT, after=0)) == b""
    assert data(Fault(Kind.CUT, after=2)) == b"[ab"
    assert data(Fault(Kind.HANG, after=1)) == b"[a"
    assert data(Fault(Kind.HANG, after=9)) == b"[abc"
    assert data(Fault(Kind.ERROR_EVENT, after=1)) == b"[a!"
    assert data(Fault(Kind.ERROR_EVENT)) == b"[!"
    assert data(Fault(Kind.ERROR_EVENT, after=3)) == b"[abc!"


def test_an_unterminated_answer_lacks_the_marker_or_its_end() -> None:
    assert data(Fault(Kind.UNTERMINATED)) == b"[abc]"
    assert data(Fault(Kind.UNTERMINATED, after=2)) == b"[ab"


def test_bad_lines_come_between_the_pieces() -> None:
    before, _, after = data(Fault(Kind.GARBAGE, after=1)).partition(b"data: ")
    assert before == b"[a"
    assert after.endswith(b"bc].")
    assert len(data(Fault(Kind.OVERSIZED, after=3, size=10_000))) > 10_000


def test_how_answers_end() -> None:
    assert ending(None) is Ending.END
    assert ending(Fault(Kind.ERROR_EVENT)) is Ending.END
    assert ending(Fault(Kind.CUT)) is Ending.CUT
    assert ending(Fault(Kind.HANG)) is Ending.HANG
