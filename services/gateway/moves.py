"""The moves of one request from engine to engine, with what is told of them: why, how long, and what became of each."""

from __future__ import annotations

import logging
from collections.abc import Callable

from services.gateway.metrics import GatewayMetrics, MigrationResult, Outcome
from services.gateway.migration import Loss, Migration
from services.gateway.routes import Lease
from services.runtime.clock import Clock
from services.runtime.errors import CaravanError
from services.runtime.telemetry import RequestSpan

_LOG = logging.getLogger(__name__)


class Moves:
    """At most `moves_max`. `fraction` draws a number within [0, 1)."""

    def __init__(
        self,
        moves_max: int,
        fraction: Callable[[], float],
        clock: Clock,
        metrics: GatewayMetrics,
        span: RequestSpan,
    ) -> None:
        self._migration = Migration(moves_max)
        self._fraction = fraction
        self._clock = clock
        self._metrics = metrics
        self._span = span
        self._loss: CaravanError | None = None
        self._lost_at = 0.0

    @property
    def under_way(self) -> bool:
        """Whether it has left an engine, and no other has gone on with it yet."""
        return self._loss is not None

    @property
    def avoided(self) -> tuple[str, ...]:
        """Lives of engines that it must not go to again."""
        return self._migration.avoided

    def leave(
        self,
        error: CaravanError,
        lease: Lease,
        *,
        began: bool,
        resumable: bool,
        remaining_s: float | None,
    ) -> float:
        """Seconds to wait before the next lease is asked for. Raises the error where the request must end.

        `began` and `resumable`: see Loss. `remaining_s` is what is left of the deadline.
        """
        self.end(Outcome.FAILED)
        delay_s = self._migration.after(
            Loss(error.reason, lease.incarnation, began, resumable),
            idempotent=lease.idempotent,
            remaining_s=remaining_s,
            fraction=self._fraction(),
        )
        if delay_s is None:
            raise error
        _LOG.info("a request leaves engine %s: %s", lease.engine_id, error.reason)
        self._span.event(f"left {lease.engine_id}: {error.reason}")
        self._loss, self._lost_at = error, self._clock.monotonic()
        return delay_s

    def arrive(self) -> None:
        """Another engine has gone on with it."""
        if self._loss is not None:
            self._metrics.count_migration(self._loss.reason, MigrationResult.MOVED)
            self._metrics.observe_migration(self._clock.monotonic() - self._lost_at)
            self._span.event("moved")
            self._loss = None

    def end(self, outcome: Outcome) -> None:
        """The request has ended so. If it was under way, that move has come to nothing."""
        if self._loss is not None:
            cancelled = outcome is Outcome.CANCELLED
            result = MigrationResult.CANCELLED if cancelled else MigrationResult.FAILED
            self._metrics.count_migration(self._loss.reason, result)
            self._loss = None

    def cut_off_by(self, refusal: CaravanError) -> CaravanError:
        """The error of an answer that was cut off, and that no engine goes on with: why it was, before why none does."""
        loss = self._loss
        if loss is None or refusal.reason == "CANCELLED":
            return refusal
        return CaravanError(
            loss.reason,
            f"{loss.message} No other goes on with it: {refusal.message}",
            param=loss.param,
            retry_after_s=loss.retry_after_s,
            **{name: value for name, value in loss.metadata.items() if name != "param"},
        )
