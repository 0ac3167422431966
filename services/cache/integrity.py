"""Asserts that everything that is counted is what a recount says (I4, I6), for tests. O(n)."""

from __future__ import annotations

from collections import Counter

from services.cache.core import Core
from services.cache.places import Place
from services.cache.reservations import HELD, Stage
from services.cache.rows import CopyState


def check_integrity(core: Core) -> None:
    """Raises AssertionError where an index, a count or a bound does not hold."""
    for place in core.places:
        _check_place(core, place)
    _check_rows(core)
    _check_sessions(core)
    limits = core.limits
    assert len(core.sessions) <= limits.sessions_max
    assert len(core.index) <= limits.rows_max
    assert len(core.waiters) <= limits.waiters_max


def _check_place(core: Core, place: Place) -> None:
    ledger, copies = place.ledger, list(place.copies)
    assert ledger.held == sum(copy.size for copy in copies)
    assert ledger.evicting == sum(c.size for c in copies if c.state is CopyState.EVICTING)
    assert ledger.pinned == sum(copy.size for copy in copies if copy.claims)
    waiting = [one for one in core.reservations if one.stage is Stage.WAITING]
    assert list(place.waiting) == [one for one in waiting if one.copy.place is place]
    assert ledger.wanted == sum(one.size for one in place.waiting)
    children = Counter(c.row.parent for c in copies if c.state is not CopyState.EVICTING)
    for copy in copies:
        assert copy.children == children.pop(copy.row.key, 0)
        assert copy in core.index.rows[copy.row.key].copies
        if copy.may_go:
            assert copy.queued >= 0, "it would never be dropped"
    assert place.orphans == children
    assert place.scans == sum(place in session.scanning for session in core.sessions)
    assert len(place.order) <= 2 * len(copies) + 128


def _check_rows(core: Core) -> None:
    copies = [copy for row in core.index.rows.values() for copy in row.copies]
    assert len(copies) == sum(len(place.copies) for place in core.places)
    writing = {copy for copy in copies if copy.state is CopyState.WRITING}
    assert {reservation.copy for reservation in core.reservations} == writing
    with_tokens = sum(bool(row.tokens) for row in core.index.rows.values())
    assert len(core.index.siblings) == with_tokens
    assert all(row.copies for row in core.index.rows.values())
    for row in core.index.rows.values():
        if row.follower is not None:
            assert core.index.rows[row.follower.key] is row.follower
            assert row.follower.parent == row.key
    claims: Counter[object] = Counter()
    for session in core.sessions:
        for claim in session.claims:
            claims.update(copy for copy in claim.copies if copy.state is not CopyState.GONE)
    assert {copy: copy.claims for copy in copies if copy.claims} == claims


def _check_sessions(core: Core) -> None:
    """Every claim, reservation, waiter and command belongs to a live session, or waits for one that can take it."""
    live = {session.session_id: session for session in core.sessions}
    dropping = [copy for session in live.values() for copy in session.dropping]
    stranded = [copy for place in core.places for copy in place.stranded]
    evicting = [
        copy for place in core.places for copy in place.copies if copy.state is CopyState.EVICTING
    ]
    assert len(dropping) == len(set(dropping))
    told = [copy for copy in dropping + stranded if copy.state is CopyState.EVICTING]
    assert sorted(map(id, told)) == sorted(map(id, evicting))
    assert all(copy.state is CopyState.EVICTING for copy in dropping)
    unsettled = [one for place in core.places for one in place.unsettled]
    for reservation in core.reservations:
        if reservation.stage is Stage.UNSETTLED:
            assert reservation in unsettled
            assert reservation.copy.place.writer() is None
        else:
            assert reservation.owner in live
        token_holds = core.reservations.held(reservation.token, reservation.owner) is not None
        assert token_holds == (reservation.stage in HELD)
    assert len(unsettled) == sum(one.stage is Stage.UNSETTLED for one in core.reservations)
    for session in live.values():
        assert len(session.claims) <= core.limits.claims_per_session_max
        assert len(core.waiters.of_session(session.session_id)) <= len(core.waiters)
    waiting = [w for s in live for w in core.waiters.of_session(s)]
    assert len(waiting) == len(core.waiters)
    for place in core.places:
        assert all(reader.session_id in live for reader in place.readers)
        assert place.readers or place.copies, "an empty place that nobody reaches"
