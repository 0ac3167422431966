"""What `caravan up` prints."""

from __future__ import annotations

import io

from services.cli.display import Display


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_pipes_get_plain_lines_once() -> None:
    """Without a terminal there are no control characters, and a progress that did not change is not repeated."""
    out = io.StringIO()
    display = Display(out)
    for line in ("10%", "10%", "20%"):
        display.progress(line)
    display.say("note")
    display.progress("20%")
    display.done()
    display.say("ready")
    assert out.getvalue() == "10%\n20%\nnote\nready\n"


def test_terminals_get_one_line_that_changes() -> None:
    """The progress is rewritten in place, cut to the width, stays below other lines and goes away at the end."""
    out = _Terminal()
    display = Display(out, columns=lambda: 21)
    display.progress("x" * 50)
    display.say("note")
    display.done()
    display.say("ready")
    wipe = "\r\x1b[2K"
    line = "x" * 20
    assert out.getvalue() == f"{line}{wipe}note\n{line}{wipe}ready\n"


def test_a_reader_that_left_does_no_harm() -> None:
    """Printing to a closed pipe must not keep `caravan up` from stopping its processes."""
    display = Display(_Gone())
    display.progress("10%")
    display.say("note")
    display.done()
