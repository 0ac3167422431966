"""Faults as words of a command line: `status=429,retry_after=2,times=3`, `cut=5`, `empty`. Pure."""

from __future__ import annotations

from typing import Any, Final

from services.dev.provider.faults import ALWAYS, Fault, FaultError, Kind, fault_of

_MAIN: Final = {
    Kind.STATUS: "status",
    Kind.DELAY: "seconds",
    Kind.DELAY_BODY: "seconds",
    Kind.PAUSE: "seconds",
    Kind.OVERSIZED: "size",
    Kind.CONTENT_TYPE: "",
    Kind.EMPTY: "",
}
_WHOLE: Final = {"after", "status", "size", "times"}


def fault_from_text(text: str) -> Fault:
    """Reads KIND[=VALUE][,FIELD=VALUE]... VALUE is what matters most of the kind: a status, seconds, a size, else `after`.

    Raises FaultError.
    """
    first, *others = text.split(",")
    name, equals, value = first.partition("=")
    named: dict[str, Any] = {"kind": name}
    if equals:
        try:
            field = _MAIN.get(Kind(name), "after")
        except ValueError:
            return fault_of(named)
        if not field:
            raise FaultError(f"`{name}` takes no value")
        named[field] = _value(field, value)
    for other in others:
        field, _, value = other.partition("=")
        if field in named:
            raise FaultError(f"`{field}` is given twice")
        named[field] = _value(field, value)
    return fault_of(named)


def _value(field: str, text: str) -> int | float | str:
    if field == "times" and text == ALWAYS:
        return text
    try:
        if field in _WHOLE:
            return int(text)
        return float(text) if field == "seconds" else text
    except ValueError:
        raise FaultError(f"`{field}` is no number: {text!r}") from None
