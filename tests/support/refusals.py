"""Doing something that may be refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from services.runtime.errors import CaravanError

T = TypeVar("T")


def attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result and None, or None and the reason of the refusal."""
    try:
        return action(), None
    except CaravanError as error:
        return None, error.reason
