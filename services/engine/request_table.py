"""The requests in flight, the one table for lookup, listing, depth and bounds (S0). Pure; lives on the event loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from services.runtime.errors import CaravanError


class _Row(Protocol):
    @property
    def request_id(self) -> str: ...


Row = TypeVar("Row", bound=_Row)


class RequestTable(Generic[Row]):
    """At most `capacity` requests, by id, oldest first. `new_row` makes the record of a request from its id and its time.

    The depth is the length of the table, so it cannot drift from it (W57). Rows are removed by their own record, so a late
    removal cannot take a newer request of the same id.
    """

    def __init__(
        self, model: str, capacity: int, retry_after_s: float, new_row: Callable[[str, float], Row]
    ) -> None:
        self._model = model
        self._capacity = capacity
        self._retry_after_s = retry_after_s
        self._new_row = new_row
        self._rows: dict[str, Row] = {}

    @property
    def depth(self) -> int:
        """Requests in flight. O(1)."""
        return len(self._rows)

    def register(self, request_id: str, now: float) -> Row:
        """Adds a request. Raises DUPLICATE_REQUEST or CAPACITY_EXHAUSTED."""
        if request_id in self._rows:
            raise CaravanError(
                "DUPLICATE_REQUEST",
                f"A request {request_id!r} is already in flight.",
                request_id=request_id,
            )
        if len(self._rows) >= self._capacity:
            raise self.exhausted()
        row = self._new_row(request_id, now)
        self._rows[request_id] = row
        return row

    def unregister(self, row: Row) -> bool:
        """Removes a request; says whether it was there. Doing it twice is harmless."""
        if self._rows.get(row.request_id) is not row:
            return False
        del self._rows[row.request_id]
        return True

    def lookup(self, request_id: str) -> Row | None:
        """The request of this id."""
        return self._rows.get(request_id)

    def oldest_first(self) -> Iterator[Row]:
        """All requests, in the order of their arrival."""
        return iter(tuple(self._rows.values()))

    def exhausted(self) -> CaravanError:
        """The refusal of a request that would be one too many."""
        return CaravanError(
            "CAPACITY_EXHAUSTED",
            f"The engine of {self._model!r} is full.",
            retry_after_s=self._retry_after_s,
            model=self._model,
            active=str(len(self._rows)),
            capacity=str(self._capacity),
        )
