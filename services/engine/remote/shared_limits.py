"""Limits that engines share approximately: who may use which part of them, from what all tell each other once a second. Pure.

Every engine counts what it lets through and what it was asked for, reports it to the coordinator, and hears the counters of the
others in return. It keeps to a share of the limit that follows demand. Where all together want more than the limit, a share is what
this engine was asked for within the last seconds, as a part of what all were asked for; where they want less, each has what it was
asked for and an even part of the rest. So the shares of all add up to the limit, and nothing is left unused beside one that is idle.

An engine that has not heard of the others for STALE_S keeps to UNHEARD_SHARE: it may have a share that others have been given
since. One that is not heard is not in service either (its session with the coordinator has ended), so that costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from caravan.coordinator.v1 import coordinator_service_pb2 as pb

from services.engine.remote.lately import Lately
from services.runtime.limit_counters import (
    EPOCH_S,
    NO_USE,
    EngineUse,
    Use,
    to_counters,
    use_of,
)
from services.runtime.rate_limiter import Quota

STALE_S: Final = 5.0
"""Age of news after which they do not count any more."""
UNHEARD_SHARE: Final = 0.1
DEMAND_S: Final = 3.0
"""Demand is what was wanted within this time."""
EVEN: Final = 0.02
"""Part of the limit that is shared evenly, so that demand that is about to rise has something to begin with."""
PEERS_MAX: Final = 1024
FORGET_S: Final = 60.0
"""Time after which a peer of whom nothing was heard is forgotten."""


@dataclass(slots=True)
class _Peer:
    use: EngineUse = field(default_factory=EngineUse)
    demand: Lately = field(default_factory=lambda: Lately(DEMAND_S))
    heard_at: float = -math.inf


@dataclass(frozen=True, slots=True)
class Shares:
    """The part of the limit that is this engine's, within (0, 1], of requests and of tokens."""

    requests: float
    tokens: float


class SharedLimits:
    """This engine's counters of one limit, and what it knows of its peers'."""

    def __init__(self, key: str, incarnation: str, now: float) -> None:
        self._key = key
        self._incarnation = incarnation
        self._epoch = 0
        self._epochs: dict[int, Use] = {}
        self._own = Lately(DEMAND_S)
        self._recounted_at = now
        # Refunds: a counter must not shrink, so what is used next is not counted as long as these last.
        self._credit = NO_USE
        self._peers: dict[str, _Peer] = {}
        self._heard_at = -math.inf
        self.has_heard = False

    # --- what this engine uses -----------------------------------------------------------------------------------

    def want(self, tokens: int, now: float, wall: float) -> None:
        """A request of so many tokens has asked."""
        self._want(1, tokens, now, wall)

    def use(self, requests: int, tokens: int, wall: float) -> None:
        """So much was let through, or has turned out to be needed."""
        used = Use(requests=requests, tokens=tokens)
        counted, self._credit = used.beyond(self._credit), self._credit.beyond(used)
        self._count(counted, wall)

    def give_back(self, requests: int, tokens: int) -> None:
        """So much of what was let through was not used."""
        self._credit += Use(requests=requests, tokens=tokens)

    def throttled(self, wall: float) -> None:
        """The provider has said that there were too many."""
        self._count(Use(throttled=1), wall)

    def counters(
        self, waiting_requests: int, waiting_tokens: int, now: float, wall: float
    ) -> list[pb.LimitCounter]:
        """What to report now. What still waits is wanted again, each time that its demand would be forgotten."""
        if now - self._recounted_at >= DEMAND_S:
            self._recounted_at = now
            self._want(waiting_requests, waiting_tokens, now, wall)
        self._count(NO_USE, wall)
        return to_counters(self._key, self._incarnation, sorted(self._epochs.items()))

    def _want(self, requests: int, tokens: int, now: float, wall: float) -> None:
        self._own.add(requests, tokens, now)
        self._count(Use(wanted_requests=requests, wanted_tokens=tokens), wall)

    def _count(self, use: Use, wall: float) -> None:
        # A clock that is set back must not reopen an epoch that others have put aside: this one just lasts longer.
        self._epoch = max(self._epoch, math.floor(wall / EPOCH_S))
        self._epochs[self._epoch] = self._epochs.get(self._epoch, NO_USE) + use
        if len(self._epochs) > 2:
            del self._epochs[min(self._epochs)]

    # --- what the others use -------------------------------------------------------------------------------------

    def merge(self, counters: Iterable[pb.LimitCounter], now: float) -> Use:
        """Learns what the others have used; returns what is new of it.

        What had been used before this engine heard for the first time is not new: it has drained, or others wait for it.
        """
        told: dict[str, list[pb.LimitCounter]] = {}
        for counter in counters:
            if counter.key == self._key and counter.incarnation != self._incarnation:
                told.setdefault(counter.incarnation, []).append(counter)
        news = NO_USE
        for incarnation, epochs in told.items():
            news += self._hear(incarnation, epochs, now)
        for incarnation in [i for i, p in self._peers.items() if now - p.heard_at > FORGET_S]:
            del self._peers[incarnation]
        first, self.has_heard, self._heard_at = not self.has_heard, True, now
        return NO_USE if first else news

    def _hear(self, incarnation: str, epochs: list[pb.LimitCounter], now: float) -> Use:
        peer = self._peers.get(incarnation)
        is_new = peer is None
        if peer is None:
            if len(self._peers) >= PEERS_MAX:
                return NO_USE
            peer = self._peers[incarnation] = _Peer()
        peer.heard_at = now
        newest = max(counter.epoch for counter in epochs)
        news = NO_USE
        for counter in epochs:
            learned = peer.use.merge(counter.epoch, use_of(counter))
            news += learned
            # What one has wanted before it became known is demand of the last seconds in part only.
            if not is_new or counter.epoch == newest:
                peer.demand.add(learned.wanted_requests, learned.wanted_tokens, now)
        return news

    def peers(self) -> int:
        """How many others share the limit."""
        return sum(self._heard_at - peer.heard_at <= STALE_S for peer in self._peers.values())

    def shares(self, quota: Quota, now: float) -> Shares:
        """Which part of the limit is this engine's now."""
        if now - self._heard_at > STALE_S:
            return Shares(UNHEARD_SHARE, UNHEARD_SHARE)
        requests, tokens = self._own.totals(now)
        demands = [peer.demand.totals(now) for peer in self._peers.values()]
        engines = 1 + self.peers()
        return Shares(
            _share(requests, sum(d[0] for d in demands), engines, quota.requests_per_minute),
            _share(tokens, sum(d[1] for d in demands), engines, quota.tokens_per_minute),
        )


def _share(own: int, peers: int, engines: int, per_minute: int) -> float:
    wanted, even = own + peers, 1 / engines
    if not wanted:
        return even
    most = per_minute * DEMAND_S / 60
    share = own / wanted if wanted >= most else (own + (most - wanted) * even) / most
    return (1 - EVEN) * share + EVEN * even
