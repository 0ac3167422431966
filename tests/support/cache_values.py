"""Values of the cache core for tests: facts of blocks, registrations."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from caravan.cache.v1 import cache_service_pb2 as pb

from services.cache.places import Place
from services.cache.rows import Facts, Tier
from services.cache.sessions import Registration, RootDeclaration, Session

QUOTA = 1_000_000
DISK = RootDeclaration("disk", Tier.DISK, QUOTA, writable=True)
TMPFS = RootDeclaration("tmpfs", Tier.RAM_FILE, QUOTA, writable=True)


def key(name: object) -> bytes:
    """A key that stands for a name; a key stands for itself."""
    return name if isinstance(name, bytes) else hashlib.sha256(repr(name).encode()).digest()


def tokens_of(tokens: Sequence[int]) -> bytes:
    """Tokens as the core keeps them."""
    return struct.pack(f">{len(tokens)}I", *tokens)


def facts(
    name: object,
    parent: object = "the empty prompt",
    *,
    end: int = 256,
    size: int = 1,
    hits: int = 0,
    tokens: Sequence[int] = (),
) -> Facts:
    """What an engine tells of a block."""
    block = pb.Block(
        key=key(name),
        parent_key=key(parent),
        end=end,
        size_bytes=size,
        hits=hits,
        save_reason=pb.SAVE_REASON_COLD,
    )
    wire = pb.Copy(block=block).SerializeToString()
    return Facts(
        key=block.key,
        parent=block.parent_key,
        end=end,
        size=size,
        reason=1,
        hits=hits,
        tokens=tokens_of(tokens),
        wire=wire,
    )


def registration(engine_id: str, *roots: RootDeclaration, ram_quota: int = QUOTA) -> Registration:
    """An engine."""
    return Registration(engine_id, f"{engine_id}:7010", roots, ram_quota)


def disk(session: Session) -> Place:
    """The root of a session that is called `disk`."""
    return session.roots["disk"]
