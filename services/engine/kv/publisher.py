"""The queue before the files: bounded in blocks and bytes, filled by any thread, emptied into every writable root (W39, I4)."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from services.engine.kv.blocking import RunBlocking
from services.engine.kv.keys import Namespace
from services.engine.kv.publish import Files, Publication, Published, Saves, publish
from services.engine.kv.root_pauses import RootPauses
from services.engine.kv.rows import meta_of
from services.engine.kv.stats import KvStats
from services.engine.kv.store import SavedBlock
from services.runtime.clock import Clock, IdSource
from services.runtime.server import cancel_all

_LOG = logging.getLogger(__name__)
BLOCKS_MAX: Final = 4096
"""Blocks that wait or are being written."""
RENEWALS_PER_TTL: Final = 3


class Publisher:
    """Blocks on their way to the roots. Every method but `offer` and `has` belongs to the event loop.

    `on_published` is told the key of each block that a root has from now on.
    """

    def __init__(
        self,
        saves: Saves,
        roots: Sequence[Files],
        namespace: Namespace,
        blocking: RunBlocking,
        *,
        writers: int,
        queue_bytes: int,
        ttl_s: Callable[[], float],
        stats: KvStats,
        clock: Clock,
        new_id: IdSource,
        on_published: Callable[[bytes], None],
    ) -> None:
        self._saves = saves
        self._roots = roots
        self._namespace = namespace
        self._blocking = blocking
        self._writers = writers
        self._bytes_max = queue_bytes
        self._ttl_s = ttl_s
        self._stats = stats
        self._clock = clock
        self._new_id = new_id
        self._on_published = on_published
        self._writer_id = new_id("writer")
        self._pauses = RootPauses()
        self._lock = threading.Lock()
        self._queue: deque[SavedBlock] = deque()
        self._held: dict[bytes, int] = {}
        self._bytes = 0
        self._open = bool(roots)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work = asyncio.Semaphore(0)
        self._idle = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def queued_bytes(self) -> int:
        """Bytes of the blocks that wait or are being written."""
        return self._bytes

    def start(self) -> None:
        """Begins to write."""
        self._loop = asyncio.get_running_loop()
        self._tasks = [asyncio.create_task(self._run()) for _ in range(self._writers)]

    async def close(self, seconds: float) -> None:
        """Takes nothing more; writes what it has, for `seconds` at most."""
        with self._lock:
            self._open = False
            # From here on the number of held blocks only falls.
            is_idle = not self._held
            self._idle.clear()
        try:
            async with asyncio.timeout(seconds):
                if not is_idle:
                    await self._idle.wait()
        except TimeoutError:
            with self._lock:
                self._stats.saves_dropped += len(self._held)
            _LOG.warning("%d blocks were not saved in %g s", len(self._held), seconds)
        await cancel_all(self._tasks)

    # --- any thread ----------------------------------------------------------------------------------------------

    def offer(self, block: SavedBlock) -> bool:
        """Takes a block to publish; False where there is no root, no room, or it is here already. Never blocks."""
        size = len(block.state)
        with self._lock:
            if not self._open or self._loop is None or block.key in self._held:
                return False
            if len(self._held) >= BLOCKS_MAX or self._bytes + size > self._bytes_max:
                self._stats.saves_dropped += 1
                return False
            self._held[block.key] = size
            self._bytes += size
            self._queue.append(block)
            self._loop.call_soon_threadsafe(self._work.release)
        return True

    def has(self, key: bytes) -> bool:
        """Whether the block waits or is being written."""
        return key in self._held

    # --- writing -------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await self._work.acquire()
            with self._lock:
                block = self._queue.popleft()
            try:
                await self._publish(block)
            except Exception:
                # A defect, but not one that may end all saving.
                _LOG.exception("a block is not saved")
            finally:
                self._forget(block.key)

    def _forget(self, key: bytes) -> None:
        with self._lock:
            self._bytes -= self._held.pop(key)
            if not self._held:
                self._idle.set()

    async def _publish(self, block: SavedBlock) -> None:
        meta = meta_of(block, self._namespace, self._clock.wall())
        for root in self._roots:
            if self._pauses.is_paused(root.root_id, self._clock.monotonic()):
                self._count(block, Published.FAILED)
                continue
            publication = Publication(meta, block.state, self._writer_id, self._new_id("save"))
            ending = await publish(
                publication, self._saves, root, self._blocking, self._ttl_s() / RENEWALS_PER_TTL
            )
            self._count(block, ending)
            if ending is Published.FAILED:
                self._pauses.failed(root.root_id, self._clock.monotonic())
            elif ending is Published.SAVED:
                self._pauses.worked(root.root_id)
            if ending in {Published.SAVED, Published.DUPLICATE}:
                self._on_published(block.key)

    def _count(self, block: SavedBlock, ending: Published) -> None:
        stats = self._stats
        match ending:
            case Published.SAVED:
                stats.saves[block.reason] += 1
                stats.saved_bytes += len(block.state)
            case Published.DUPLICATE:
                stats.duplicate_dropped += 1
            case Published.REFUSED:
                stats.saves_refused += 1
            case Published.EXPIRED:
                stats.saves_expired += 1
            case Published.FAILED:
                stats.saves_failed += 1
            case Published.DOWN:
                with self._lock:
                    stats.saves_dropped += 1
