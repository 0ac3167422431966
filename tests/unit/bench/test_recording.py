"""What was recorded reads the same, however the reads cut it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.recording import Part, data_events, head_and_body

EVENTS = [b"one", b"two", b"three"]
SSE = (
    b": keepalive\n\n" + b"".join(b"data: %b\n\n" % event for event in EVENTS) + b"data: [DONE]\n\n"
)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def chunked(body: bytes, size: int) -> bytes:
    """The body in chunks of `size` bytes."""
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def cut(wire: bytes, places: list[int]) -> list[Part]:
    """The wire cut at places; part i came at second i."""
    ends = [*sorted({place % (len(wire) - 1) + 1 for place in places}), len(wire)]
    starts = [0, *ends[:-1]]
    return [Part(float(i), wire[a:b]) for i, (a, b) in enumerate(zip(starts, ends, strict=True))]


@given(st.lists(st.integers(0, 10_000), max_size=12), st.integers(1, 60))
def test_events_do_not_depend_on_the_cuts(places: list[int], size: int) -> None:
    """Each event has the time of the read that completed its chunk."""
    parts = cut(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(SSE, size), places)
    head, body = head_and_body(parts)
    assert head.startswith("http/1.1 200 ok")
    found = list(data_events(body))
    assert [event.data for event in found] == EVENTS
    times = [event.at for event in found]
    assert times == sorted(times)
    assert set(times) <= {part.at for part in parts}


def test_a_time_is_that_of_the_read_that_brought_the_event() -> None:
    """One event per read."""
    chunks = [b"%x\r\ndata: %b\n\n\r\n" % (len(event) + 8, event) for event in EVENTS]
    wire = [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n"]
    _, body = head_and_body([Part(float(i), data) for i, data in enumerate(wire)])
    assert [event.at for event in data_events(body)] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("end", [10, len(HEAD) + 30, -6])
def test_a_cut_answer_is_an_error(end: int) -> None:
    """Half an answer is not measured as a whole one."""
    wire = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(SSE, 20)
    with pytest.raises(EOFError):
        head_and_body([Part(0.0, wire[:end])])
