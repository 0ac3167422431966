"""The life of a save: who writes a block, how far it is, and what becomes of it when the writer is lost (S2.24 to S2.29).

Pure. TRANSITIONS is the whole protocol; an event that has no row there is refused: the token does not hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto
from typing import Final

from services.cache.rows import Copy


class Stage(Enum):
    """How far a save is."""

    WAITING = auto()
    """For room. Nothing is written yet, no bytes are held."""
    PRE_LINK = auto()
    """A temporary file is being written."""
    LINKING = auto()
    """The writer was told that it may give the file its name: from now on it may be there."""
    POST_LINK = auto()
    """The file has its name."""
    UNSETTLED = auto()
    """The writer was lost after it might have named the file; nobody has been asked to look yet."""
    SETTLING = auto()
    """An engine was asked to look at the file."""


class End(Enum):
    """How a save ends."""

    PUBLISHED = auto()
    """The copy is available."""
    DROPPED = auto()
    """There is no copy; those who wait for it are told so."""


class Event(Enum):
    """What happens to a save."""

    ROOM = auto()
    """There is room now."""
    RENEW = auto()
    CHECK = auto()
    MARK = auto()
    ANNOUNCE = auto()
    CANCEL = auto()
    """The writer gives up, or the call that waits for room does."""
    LOST = auto()
    """The writer's session ended, or it did not renew in time."""
    FOUND = auto()
    """An inventory names the file: it lay there before, or the writer has just named it."""
    ASK = auto()
    """An engine is asked to look at the file."""
    SETTLER_LOST = auto()
    """That engine's session ended, or it did not answer in time."""
    GOOD = auto()
    """It says that the file passes all checks."""
    BAD = auto()
    """It says that there is no file, or that it deleted it."""


_S, _E = Stage, Event
TRANSITIONS: Final[dict[tuple[Stage, Event], Stage | End]] = {
    (_S.WAITING, _E.ROOM): _S.PRE_LINK,
    (_S.WAITING, _E.CANCEL): End.DROPPED,
    (_S.WAITING, _E.LOST): End.DROPPED,
    (_S.WAITING, _E.FOUND): End.PUBLISHED,
    (_S.PRE_LINK, _E.FOUND): _S.POST_LINK,
    (_S.LINKING, _E.FOUND): _S.POST_LINK,
    (_S.POST_LINK, _E.FOUND): _S.POST_LINK,
    (_S.PRE_LINK, _E.RENEW): _S.PRE_LINK,
    (_S.PRE_LINK, _E.CHECK): _S.LINKING,
    (_S.PRE_LINK, _E.MARK): _S.POST_LINK,
    (_S.PRE_LINK, _E.ANNOUNCE): End.PUBLISHED,
    (_S.PRE_LINK, _E.CANCEL): End.DROPPED,
    (_S.PRE_LINK, _E.LOST): End.DROPPED,
    (_S.LINKING, _E.RENEW): _S.LINKING,
    (_S.LINKING, _E.CHECK): _S.LINKING,
    (_S.LINKING, _E.MARK): _S.POST_LINK,
    (_S.LINKING, _E.ANNOUNCE): End.PUBLISHED,
    (_S.LINKING, _E.CANCEL): End.DROPPED,
    # It may have died between link(2) and MarkPublished: without a look the file would lie there uncounted.
    (_S.LINKING, _E.LOST): _S.UNSETTLED,
    (_S.POST_LINK, _E.RENEW): _S.POST_LINK,
    (_S.POST_LINK, _E.CHECK): _S.POST_LINK,
    (_S.POST_LINK, _E.MARK): _S.POST_LINK,
    (_S.POST_LINK, _E.ANNOUNCE): End.PUBLISHED,
    (_S.POST_LINK, _E.CANCEL): _S.UNSETTLED,
    (_S.POST_LINK, _E.LOST): _S.UNSETTLED,
    (_S.UNSETTLED, _E.ASK): _S.SETTLING,
    (_S.SETTLING, _E.SETTLER_LOST): _S.UNSETTLED,
    (_S.SETTLING, _E.GOOD): End.PUBLISHED,
    (_S.SETTLING, _E.BAD): End.DROPPED,
}
HELD: Final = frozenset({Stage.WAITING, Stage.PRE_LINK, Stage.LINKING, Stage.POST_LINK})
"""Stages in which the save belongs to its writer's session."""


def step(stage: Stage, event: Event) -> Stage | End | None:
    """What comes next; None where the event is refused and changes nothing."""
    return TRANSITIONS.get((stage, event))


class Reservation:
    """A save under way. `owner` is the session that writes or, in SETTLING, the one that was asked to look.

    `expires` is in monotonic seconds; `size` is what is reserved.
    """

    __slots__ = ("copy", "expires", "owner", "size", "stage", "token")

    def __init__(self, token: str, owner: str, copy: Copy, size: int, expires: float) -> None:
        self.token = token
        self.owner = owner
        self.copy = copy
        self.size = size
        self.stage = Stage.WAITING
        self.expires = expires


class ReservationTable:
    """All saves under way, by the copy that they make and, while the writer holds them, by token."""

    def __init__(self) -> None:
        self._by_copy: dict[Copy, Reservation] = {}
        self._by_token: dict[str, Reservation] = {}

    def __len__(self) -> int:
        return len(self._by_copy)

    def __iter__(self) -> Iterator[Reservation]:
        """Oldest first. Copies first, so that what is iterated may change."""
        return iter(tuple(self._by_copy.values()))

    def add(self, reservation: Reservation) -> None:
        """Adds one; its copy and its token are new."""
        assert reservation.copy not in self._by_copy
        assert reservation.token not in self._by_token
        self._by_copy[reservation.copy] = reservation
        self._by_token[reservation.token] = reservation

    def held(self, token: str, session_id: str) -> Reservation | None:
        """The save that this session holds under a token, or None."""
        found = self._by_token.get(token)
        return found if found is not None and found.owner == session_id else None

    def of(self, copy: Copy) -> Reservation:
        """The save that makes a copy which is being written."""
        return self._by_copy[copy]

    def take_from_writer(self, reservation: Reservation) -> None:
        """Its token does not hold any more."""
        self._by_token.pop(reservation.token, None)

    def remove(self, reservation: Reservation) -> None:
        """The save is over."""
        del self._by_copy[reservation.copy]
        self._by_token.pop(reservation.token, None)

    def of_session(self, session_id: str) -> list[Reservation]:
        """What a session writes or was asked to look at. O(saves under way)."""
        return [one for one in self._by_copy.values() if one.owner == session_id]

    def expired(self, now: float) -> list[Reservation]:
        """Those that were neither renewed nor answered in time. O(saves under way)."""
        return [one for one in self._by_copy.values() if one.expires <= now]
