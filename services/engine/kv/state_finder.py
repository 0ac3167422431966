"""What it takes to find the state that a prompt can start from, however the state of its model is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from services.engine.kv.keys import Namespace
from services.engine.kv.known import KnownKeys
from services.engine.kv.ledger import Ledger
from services.engine.kv.ram import RamTier
from services.engine.kv.restore import Restorer
from services.engine.kv.stats import KvStats
from services.engine.kv.store import Asked, FoundBlock
from services.engine.kv.withdrawals import Withdrawals
from services.runtime.clock import Clock


class StateFinder(Protocol):
    """Finds what a prompt can start from: block_finder.py and whole_finder.py. Lives on the event loop."""

    async def find(self, asked: Asked, found: list[FoundBlock]) -> None:
        """Adds to `found`, in order. Raises CacheDown; what is found until then counts."""
        ...


@dataclass(frozen=True)
class FindingParts:
    """What every finder works with.

    `namespace` is the model's, without a salt; `ledger` is None where there is no cache service; `wait_seconds` is how long a
    save in flight is waited for, and for how long what is shorter is looked for.
    """

    namespace: Namespace
    ram: RamTier
    ledger: Ledger | None
    restorer: Restorer
    withdrawals: Withdrawals
    known: KnownKeys
    stats: KvStats
    clock: Clock
    wait_seconds: float
