"""Server-sent events out of the bytes of an answer, as they come (S3.18; the HTML standard, 9.2.6). Pure.

Own, because what libraries offer for it reads line by line without a limit: here a whole read is cut at once, and an event that never
ends is an error. Ids and retry times are not read: an answer is never picked up again.
"""

from __future__ import annotations

from typing import Final, NamedTuple

EVENT_BYTES_MAX: Final = 1024 * 1024
"""Of one event, its lines together."""
_BOM: Final = b"\xef\xbb\xbf"


class Event(NamedTuple):
    """One event: its name ("" for none) and its data."""

    event: str
    data: str


class EventError(Exception):
    """The bytes are no events: too long, or no UTF-8."""


class EventReader:
    """Reads one stream. Any cut of the bytes into pieces gives the same events."""

    def __init__(self) -> None:
        self._rest = b""
        self._started = False
        self._name = b""
        self._data: list[bytes] = []
        self._event_bytes = 0

    def feed(self, data: bytes) -> list[Event]:
        """The events that are complete with these bytes. Raises EventError."""
        data = self._rest + data
        if not self._started:
            if len(data) < len(_BOM) and _BOM.startswith(data):
                self._rest = data  # May become a byte order mark.
                return []
            self._started = True
            data = data.removeprefix(_BOM)
        if b"\r" in data:
            # A return at the end may be half of a line's end.
            held = b"\r" if data.endswith(b"\r") else b""
            kept = data[: len(data) - len(held)]
            data = kept.replace(b"\r\n", b"\n").replace(b"\r", b"\n") + held
        lines = data.split(b"\n")
        self._rest = lines.pop()
        events: list[Event] = []
        for line in lines:
            if line:
                self._add(line)
            elif self._data:
                events.append(self._event())
            else:  # Without data there is no event.
                self._name = b""
                self._event_bytes = 0
        if self._event_bytes + len(self._rest) > EVENT_BYTES_MAX:
            raise EventError("an event is too long")
        return events

    def finish(self) -> list[Event]:
        """The event that the end of the stream completes: not every server ends its last one with an empty line."""
        return self.feed(b"\n\n")

    def _add(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        elif name == b"event":
            self._name = value.removeprefix(b" ")
        else:
            return  # A comment, such as a sign of life, or a field that means nothing here.
        self._event_bytes += len(line)
        if self._event_bytes > EVENT_BYTES_MAX:
            raise EventError("an event is too long")

    def _event(self) -> Event:
        data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
        try:
            event = Event(self._name.decode(), data.decode())
        except UnicodeDecodeError:
            raise EventError("an event is no UTF-8") from None
        self._name = b""
        self._data = []
        self._event_bytes = 0
        return event
