"""What the cache's state machine plays with: a few engines, roots and blocks, and what the model remembers of an engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.cache.effects import Drop, Settle
from services.cache.places import Place
from services.cache.rows import Facts, Tier
from services.cache.sessions import RootDeclaration, Session
from tests.support.cache_values import facts

QUOTA = 350
ROOTS = {
    "tmpfs": RootDeclaration("tmpfs", Tier.RAM_FILE, QUOTA, writable=True),
    "disk": RootDeclaration("disk", Tier.DISK, QUOTA, writable=True),
}
ENGINES = {"both": ("tmpfs", "disk"), "disk": ("disk",), "none": ()}
CHAIN = [f"c{number}" for number in range(5)]
# Two prompts that branch off the chain, and tails of which one contains the other.
PARENTS = {
    **{name: CHAIN[at - 1] if at else "empty" for at, name in enumerate(CHAIN)},
    "b2": "c1",
    "b3": "b2",
    "short": "c0",
    "long": "c0",
}
TOKENS = {"short": (1, 2), "long": (1, 2, 3)}
BLOCKS: dict[str, Facts] = {
    name: facts(name, parent, size=60 + 10 * (len(name) % 3), tokens=TOKENS.get(name, ()))
    for name, parent in PARENTS.items()
}
NAMES = {told.key: name for name, told in BLOCKS.items()}
PLACE = tuple[str, str]


def place_id(place: Place) -> PLACE:
    """A place by name."""
    return (place.root_id, place.engine_id)


@dataclass
class Peer:
    """An engine that has joined, and what it holds open."""

    session: Session
    tokens: dict[str, tuple[str, str]] = field(default_factory=dict)  # token -> root, block
    waiting: dict[str, tuple[str, str]] = field(default_factory=dict)  # for room
    claims: dict[str, list[tuple[PLACE, str]]] = field(default_factory=dict)
    waiters: dict[str, str] = field(default_factory=dict)  # id -> block
    drops: list[Drop] = field(default_factory=list)
    settles: list[Settle] = field(default_factory=list)
