"""The engines that have joined: what each reaches, reads and was asked to do.

Pure. A session is the life of one Join stream; its id is never used twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from services.cache.claims import Claims
from services.cache.places import Place, Reach
from services.cache.rows import Copy, Tier


@dataclass(frozen=True, slots=True)
class RootDeclaration:
    """A root as an engine declares it. `quota` is in bytes, at least 1."""

    root_id: str
    tier: Tier
    quota: int
    writable: bool


@dataclass(frozen=True, slots=True)
class Registration:
    """Who an engine is: its id, where it serves FetchBlocks (host:port), its roots, and the bytes of its RAM tier."""

    engine_id: str
    address: str
    roots: tuple[RootDeclaration, ...]
    ram_quota: int


class Session:
    """One engine in one session.

    `own` tells how it gets at what it has itself; `scanning` are roots whose inventory is not complete yet; `dropping` are
    copies that it was told to delete; `epoch` numbers the joins.
    """

    __slots__ = (
        "address",
        "claims",
        "dropping",
        "engine_id",
        "epoch",
        "heard_at",
        "own",
        "pressed_at",
        "ram",
        "roots",
        "scanning",
        "session_id",
    )

    def __init__(
        self, session_id: str, engine_id: str, address: str, ram: Place, *, epoch: int, now: float
    ) -> None:
        self.session_id = session_id
        self.engine_id = engine_id
        self.address = address
        self.ram = ram
        self.epoch = epoch
        self.heard_at = now
        self.pressed_at: float | None = None
        self.roots: dict[str, Place] = {}
        self.own: dict[Place, Reach] = {}
        self.scanning: dict[Place, None] = {}
        self.claims = Claims()
        self.dropping: dict[Copy, None] = {}

    def reach(self, place: Place) -> Reach | None:
        """How it gets at the copies of a place; None where nobody is there to give them."""
        return self.own.get(place) or place.remote


class SessionTable:
    """Sessions by id and by engine."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._engines: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        """In the order of their joining. Copies first, so that the metrics thread may iterate too."""
        return iter(tuple(self._sessions.values()))

    def find(self, session_id: str) -> Session | None:
        """The session, or None where it is over."""
        return self._sessions.get(session_id)

    def of_engine(self, engine_id: str) -> Session | None:
        """The session of an engine, or None where it has not joined."""
        return self._engines.get(engine_id)

    def add(self, session: Session) -> None:
        """Adds a session. The engine's session before, if any, has been removed."""
        assert session.engine_id not in self._engines
        assert session.session_id not in self._sessions
        self._sessions[session.session_id] = self._engines[session.engine_id] = session

    def remove(self, session: Session) -> None:
        """Removes a session."""
        del self._sessions[session.session_id]
        del self._engines[session.engine_id]
