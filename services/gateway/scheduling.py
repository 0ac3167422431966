"""When a request may start relative to others, by the same rules in both public APIs. Pure."""

from __future__ import annotations

from typing import Final

from caravan.core.v1 import scheduling_pb2

from services.gateway.openai_schema import ChatCompletion, Completion
from services.gateway.rules import Path, Range, invalid

PRIORITIES: Final = {
    "critical": scheduling_pb2.PRIORITY_CRITICAL,
    "high": scheduling_pb2.PRIORITY_HIGH,
    "normal": scheduling_pb2.PRIORITY_NORMAL,
    "background": scheduling_pb2.PRIORITY_BACKGROUND,
}
_MAX_WAIT_S: Final = Range(0, 3600)


def check_scheduling(scheduling: scheduling_pb2.Scheduling, at: Path) -> None:
    """Refuses what is not known or out of range; `at` gives the path of a field."""
    if scheduling.priority not in scheduling_pb2.Priority.values():
        raise invalid(at("priority"), "it is not known.")
    if scheduling.HasField("max_wait"):
        _check_max_wait(scheduling.max_wait.ToNanoseconds() / 1e9, at("max_wait"))


def from_openai(given: ChatCompletion | Completion) -> scheduling_pb2.Scheduling:
    """What an OpenAI body says in `caravan`. Raises CaravanError."""
    scheduling = scheduling_pb2.Scheduling()
    if given.caravan is None:
        return scheduling
    if given.caravan.priority is not None:
        if given.caravan.priority not in PRIORITIES:
            raise invalid("caravan.priority", f"it is not one of {', '.join(PRIORITIES)}.")
        scheduling.priority = PRIORITIES[given.caravan.priority]
    if given.caravan.max_wait is not None:
        _check_max_wait(given.caravan.max_wait, "caravan.max_wait")
        scheduling.max_wait.FromNanoseconds(round(given.caravan.max_wait * 1e9))
    return scheduling


def _check_max_wait(seconds: float, param: str) -> None:
    if seconds not in _MAX_WAIT_S:
        raise invalid(param, f"it must be {_MAX_WAIT_S} seconds.")
