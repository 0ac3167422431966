"""Publishing one block into one root (S2.24-S2.29): the order of steps that makes a crash at any of them harmless.

reserve -> write a temporary file -> check the reservation -> link -> mark published -> read back -> announce. A process that dies
before the link leaves a temporary file that nobody reads; after it, a whole file, which the service lets another engine check, or
the next inventory names. What a step touches is given as two ports, so that a test can stop the world at each of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from caravan.cache.v1 import cache_service_pb2 as pb

from services.engine.kv import kvc
from services.engine.kv.block_file import TemporaryBlock
from services.engine.kv.blocking import RunBlocking
from services.engine.kv.kvc import BlockMeta, Expected, Head, KvcError
from services.engine.kv.ledger import CacheDown, Reservation
from services.engine.kv.root import Linked, RootError
from services.engine.kv.rows import row_of_head, row_of_meta
from services.runtime.server import cancel_all

_LOG = logging.getLogger(__name__)


class Saves(Protocol):
    """The cache service, as far as a save needs it (ledger.py). Every method raises CacheDown."""

    async def reserve(
        self, root_id: str, row: pb.Block
    ) -> tuple[pb.ReserveOutcome.ValueType, Reservation]:
        """Asks to save a block."""
        ...

    async def renew(self, reservation: Reservation) -> None:
        """Prolongs it."""
        ...

    async def check(self, reservation: Reservation) -> bool:
        """Whether it holds."""
        ...

    async def mark_published(self, reservation: Reservation) -> bool:
        """The file has its name."""
        ...

    async def announce(self, reservation: Reservation, row: pb.Block) -> bool:
        """The block can be read."""
        ...

    async def cancel(self, reservation: Reservation) -> None:
        """Gives it back."""
        ...

    def doubt(self, reservation: Reservation, why: str) -> None:
        """It is not known what the service knows of the file."""
        ...


class Files(Protocol):
    """A root, as far as a save needs it (root.py). Blocking."""

    root_id: str

    def write(
        self, key: bytes, writer: str, unique: str, parts: Sequence[bytes | memoryview]
    ) -> TemporaryBlock:
        """Writes and syncs a temporary file."""
        ...

    def link(self, temporary: TemporaryBlock, expected: Expected) -> Linked:
        """Gives it its name."""
        ...

    def head(self, key: bytes) -> Head:
        """Reads its metadata back."""
        ...

    def delete(self, key: bytes) -> None:
        """Removes it."""
        ...


class Published(Enum):
    """How a save ended."""

    SAVED = "saved"
    DUPLICATE = "duplicate"
    REFUSED = "refused"
    EXPIRED = "expired"
    FAILED = "failed"
    DOWN = "down"


@dataclass(frozen=True)
class Publication:
    """A block to publish, and the names of its temporary file: of the writer, and of this attempt."""

    meta: BlockMeta
    state: memoryview
    writer: str
    unique: str

    def expected(self) -> Expected:
        """What a file of this block must be."""
        meta = self.meta
        return Expected(
            meta.key, meta.parent, meta.namespace, meta.start, meta.token_bytes, meta.whole
        )


async def publish(
    publication: Publication,
    saves: Saves,
    files: Files,
    blocking: RunBlocking,
    renew_every_s: float,
) -> Published:
    """Publishes a block into a root. Raises nothing but CancelledError."""
    meta = publication.meta
    file_bytes = kvc.prefix_bytes(meta) + len(publication.state)
    try:
        outcome, reservation = await saves.reserve(files.root_id, row_of_meta(meta, file_bytes))
    except CacheDown:
        return Published.DOWN
    if outcome != pb.RESERVE_OUTCOME_GRANTED:
        return _NOT_GRANTED.get(outcome, Published.FAILED)
    try:
        async with _renewing(saves, reservation, renew_every_s):
            temporary = await _write(publication, files, blocking)
    except RootError as error:
        _LOG.warning("a block is not saved: %s", error)
        return await _give_back(saves, reservation, Published.FAILED)
    try:
        holds = await saves.check(reservation)
    except CacheDown:
        await blocking(temporary.discard)
        return await _give_back(saves, reservation, Published.DOWN)
    except asyncio.CancelledError:
        temporary.discard()
        raise
    if not holds:
        await blocking(temporary.discard)
        return Published.EXPIRED
    return await _name(
        publication,
        temporary,
        saves=saves,
        reservation=reservation,
        files=files,
        blocking=blocking,
    )


_NOT_GRANTED: Final = {
    pb.RESERVE_OUTCOME_ALREADY_PRESENT: Published.DUPLICATE,
    pb.RESERVE_OUTCOME_CONFLICT: Published.DUPLICATE,
    pb.RESERVE_OUTCOME_NO_ROOM: Published.REFUSED,
}


async def _write(publication: Publication, files: Files, blocking: RunBlocking) -> TemporaryBlock:
    """Writes the temporary file. Raises RootError."""
    meta, state = publication.meta, publication.state

    def work() -> TemporaryBlock:
        parts = (kvc.seal(meta, state), state)
        return files.write(meta.key, publication.writer, publication.unique, parts)

    writing = asyncio.ensure_future(blocking(work))
    try:
        return await asyncio.shield(writing)
    except asyncio.CancelledError:
        # The thread goes on; what it makes must not stay.
        writing.add_done_callback(_discard)
        raise


def _discard(written: asyncio.Future[TemporaryBlock]) -> None:
    if not written.cancelled() and written.exception() is None:
        written.result().discard()


async def _name(
    publication: Publication,
    temporary: TemporaryBlock,
    *,
    saves: Saves,
    reservation: Reservation,
    files: Files,
    blocking: RunBlocking,
) -> Published:
    """Gives the file its name and tells the service."""
    expected = publication.expected()
    key = publication.meta.key
    try:
        await blocking(lambda: files.link(temporary, expected))
        held = await saves.mark_published(reservation)
        head = await blocking(lambda: files.head(key))
        expected.check(head.meta)
        held = held and await saves.announce(reservation, row_of_head(head))
    except CacheDown as error:
        # Whether the service took the word is not known, so it must look for itself (S2.29).
        saves.doubt(reservation, f"a save was not answered: {error}")
        return Published.DOWN
    except (RootError, OSError, KvcError) as error:
        _LOG.warning("a block is not saved: %s", error)
        with contextlib.suppress(RootError):
            await blocking(lambda: files.delete(key))
        return await _give_back(saves, reservation, Published.FAILED)
    return Published.SAVED if held else Published.EXPIRED


async def _give_back(saves: Saves, reservation: Reservation, ending: Published) -> Published:
    """Cancels a reservation, so that those who wait for the block need not (W34)."""
    with contextlib.suppress(CacheDown):
        await saves.cancel(reservation)
    return ending


@contextlib.asynccontextmanager
async def _renewing(saves: Saves, reservation: Reservation, every_s: float) -> AsyncIterator[None]:
    """Keeps a reservation alive while its file is written, however long that takes (W36)."""

    async def renew() -> None:
        while True:
            await asyncio.sleep(every_s)
            with contextlib.suppress(CacheDown):  # The check before the link decides.
                await saves.renew(reservation)

    renewer = asyncio.create_task(renew())
    try:
        yield
    finally:
        await cancel_all([renewer])
