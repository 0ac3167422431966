"""The leases of this gateway: asked for, held, and given back, whatever becomes of the coordinator meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from caravan.coordinator.v1 import coordinator_service_pb2 as pb

from services.gateway.asking import Asking
from services.gateway.background import Background
from services.gateway.cache_options import KEY_BYTES
from services.gateway.coordinator import CoordinatorClient
from services.gateway.held import HeldLeases
from services.gateway.membership import Membership
from services.gateway.metrics import Outcome
from services.gateway.routes import Headers, Lease, Wanted
from services.gateway.session_stream import Answer
from services.runtime.clock import Clock
from services.runtime.errors import CaravanError

_CANCEL_AGAIN_S: Final = 0.1
_OUTCOMES: Final = {
    Outcome.FINISHED: pb.OUTCOME_FINISHED,
    Outcome.CANCELLED: pb.OUTCOME_CANCELLED,
    Outcome.REFUSED: pb.OUTCOME_REFUSED,
    Outcome.FAILED: pb.OUTCOME_FAILED,
}


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
        patience_s: float,
    ) -> None:
        self._coordinator = coordinator
        self._membership = membership
        self._held = held
        self._background = background
        self._clock = clock
        self._patience_s = patience_s

    async def take(self, wanted: Wanted, headers: Headers) -> Lease:
        """A lease, when it is the turn of the request. Raises CaravanError.

        Where this is cancelled, a lease that comes all the same is given back, in the background.
        """
        asking = Asking(wanted, self._membership, self._clock, self._patience_s)
        try:
            lease = await asking.lease(headers)
        except asyncio.CancelledError:
            if asking.left is not None:
                self._background.spawn(self._give_up(wanted.request_id, asking.left))
            raise
        self._held.add(lease, wanted, asking.asked_at)
        return lease

    async def _give_up(self, request_id: str, answer: asyncio.Future[Answer]) -> None:
        """Nobody wants the lease any more. The cancel makes the answer come at once, which alone tells whether it is a grant."""
        while not answer.done():
            # Again, because it may overtake the route, which travels on another stream.
            with contextlib.suppress(CaravanError):
                await self._coordinator.cancel(request_id)
            await asyncio.wait({answer}, timeout=_CANCEL_AGAIN_S)
        granted = answer.result()
        if not isinstance(granted, CaravanError):
            self.release(Lease.of(granted), Outcome.CANCELLED, b"")

    def release(self, lease: Lease, outcome: Outcome, finish_key: bytes) -> None:
        """Ends a lease; where the coordinator is away, once it is there again.

        `finish_key` names the KV state that the request left; empty: none.
        """
        # First, so that no coordinator that comes now is told of it.
        self._held.discard(lease)
        # What is no key would end the session, with all that others wait for in it.
        key = finish_key if len(finish_key) == KEY_BYTES else b""
        self._membership.release(
            pb.ReleaseRequest(lease_id=lease.lease_id, outcome=_OUTCOMES[outcome], finish_key=key)
        )
