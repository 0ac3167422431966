"""The leases of this gateway: asked for, held, and given back, whatever becomes of the coordinator meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from dataclasses import dataclass
from typing import Final

from services.gateway.asking import Asking
from services.gateway.background import Background
from services.gateway.coordinator import CoordinatorClient, Headers
from services.gateway.held import HeldLeases
from services.gateway.membership import Membership
from services.gateway.metrics import GatewayMetrics, Outcome
from services.gateway.routes import Lease, Wanted
from services.runtime.clock import Clock
from services.runtime.errors import CaravanError

_LOG = logging.getLogger(__name__)

UNRELEASED_MAX: Final = 4096
"""Leases that wait to be released again. Beyond it the oldest end with this gateway's session."""
_PAUSE_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class _Unreleased:
    lease: Lease
    outcome: Outcome
    finish_key: bytes


class Leases:
    """All of them. `patience_s` is the longest time that a route waits for a coordinator that is away, in seconds."""

    def __init__(
        self,
        coordinator: CoordinatorClient,
        membership: Membership,
        held: HeldLeases,
        background: Background,
        *,
        clock: Clock,
        metrics: GatewayMetrics,
        patience_s: float,
    ) -> None:
        self._coordinator = coordinator
        self._membership = membership
        self._held = held
        self._background = background
        self._clock = clock
        self._metrics = metrics
        self._patience_s = patience_s
        self._unreleased: deque[_Unreleased] = deque(maxlen=UNRELEASED_MAX)
        self._some_unreleased = asyncio.Event()

    def ask(self, wanted: Wanted, headers: Headers) -> Asking:
        """Asks for a lease, in the background."""
        asking = Asking(wanted, self._coordinator, self._membership, self._clock, self._patience_s)
        asking.task = self._background.spawn(self._take(asking, headers))
        return asking

    async def _take(self, asking: Asking, headers: Headers) -> Lease:
        lease = await asking.lease(headers)
        self._held.add(lease, asking.wanted, asking.asked_at)
        return lease

    async def give_up(self, asking: Asking) -> None:
        """Nobody wants the lease any more: one that comes all the same is given back."""
        asking.give_up()
        if asking.by_call:
            # Without the answer nobody could tell whether a grant is on its way; the cancel makes it come at once.
            with contextlib.suppress(CaravanError):
                await self._coordinator.cancel(asking.wanted.request_id)
        await asyncio.wait({asking.task})
        if not asking.task.cancelled() and asking.task.exception() is None:
            await self.release(asking.task.result(), Outcome.CANCELLED, b"")

    async def release(self, lease: Lease, outcome: Outcome, finish_key: bytes) -> None:
        """Ends a lease; where the coordinator is away, once it is there again."""
        # First, so that no coordinator that comes now is told of it.
        self._held.discard(lease)
        try:
            await self._coordinator.release(lease, outcome, finish_key)
        except CaravanError as error:
            self._metrics.count_failed_release()
            _LOG.warning("lease %s was not released: %s", lease.lease_id, error)
            self._unreleased.append(_Unreleased(lease, outcome, finish_key))
            self._some_unreleased.set()

    async def run(self) -> None:
        """Repeats releases that have failed, until it is cancelled."""
        while True:
            await self._some_unreleased.wait()
            self._some_unreleased.clear()
            await asyncio.sleep(_PAUSE_S)
            with contextlib.suppress(CaravanError):
                await self._membership.session(self._patience_s)
            for _ in range(len(self._unreleased)):
                await self._release_again(self._unreleased.popleft())

    async def _release_again(self, unreleased: _Unreleased) -> None:
        try:
            await self._coordinator.release(
                unreleased.lease, unreleased.outcome, unreleased.finish_key
            )
        except CaravanError as error:
            if error.reason in {"SERVICE_UNAVAILABLE", "DEADLINE_EXCEEDED"}:
                self._unreleased.append(unreleased)
                self._some_unreleased.set()
            else:
                lease_id = unreleased.lease.lease_id
                _LOG.warning("lease %s ends with the session: %s", lease_id, error)
