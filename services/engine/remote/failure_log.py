"""What the operator reads of calls that failed: a line for each kind of failure, not for each call. Pure.

A fallback hides from clients what a provider says, and the breaker tells only that something failed. A provider that is away can fail
hundreds of calls a second, so of each kind one is told, and then for a while only counted.
"""

from __future__ import annotations

from typing import Final

from services.engine.remote.failure import RETRYABLE, Failure, ProviderError

QUIET_S: Final = 10.0
"""For so long after a line the same kind of failure is only counted."""
_TOLD: Final = RETRYABLE | {Failure.UNAUTHORIZED, Failure.FORBIDDEN, Failure.NOT_FOUND}
"""Not what the request is to blame for: its client reads that, and the provider may quote the request in it."""


class FailureLog:
    """Which failures are told. Bounded by the kinds that there are."""

    def __init__(self) -> None:
        self._told_at: dict[Failure, float] = {}
        self._untold: dict[Failure, int] = {}

    def line(self, error: ProviderError, now: float) -> str:
        """The line for the log, "" for none; `now` is monotonic, in seconds. The message may hold secrets."""
        kind = error.failure
        if kind not in _TOLD:
            return ""
        if now - self._told_at.get(kind, -QUIET_S) < QUIET_S:
            self._untold[kind] = self._untold.get(kind, 0) + 1
            return ""
        self._told_at[kind] = now
        untold = self._untold.pop(kind, 0)
        # A provider's text must not look like lines of ours, nor command a terminal.
        told = f"{error.message} ({error.detail})" if error.detail else error.message
        text = "".join(one if one.isprintable() else " " for one in told)
        its_id = error.provider_request_id
        named = f" (its id of the request: {its_id})" if its_id else ""
        more = f" ({untold} more of the kind since it was told last)" if untold else ""
        return f"a call failed: {kind.value.lower()}: {text}{named}{more}"
