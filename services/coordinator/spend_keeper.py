"""Keeps the ledger in a file while the coordinator runs, off the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import Final

from services.coordinator import spend_store
from services.coordinator.spend_ledger import SpendLedger
from services.runtime.settings import SettingsError

_LOG = logging.getLogger(__name__)
SAVE_EVERY_S: Final = 5.0
"""Seconds between two writes, if anything has changed. A crash loses no more, and of engines that live nothing at all."""


def open_ledger(path: Path | None, ledger: SpendLedger, now: float) -> None:
    """Puts what was kept into a ledger; a file that makes no sense is told and set aside, and the ledger starts empty.

    `now` is in monotonic seconds. Raises SettingsError where there is a file that cannot be read: to begin at 0 must be wanted.
    """
    if path is None or not path.exists():
        return
    try:
        try:
            spend_store.load(path, ledger, now)
        except ValueError as error:
            aside = spend_store.set_aside(path)
            _LOG.error(
                "the record of costs %s makes no sense, and is %s now; costs begin at 0: %s",
                path,
                aside,
                error,
            )
    except OSError as error:
        raise SettingsError(f"CARAVAN_COORDINATOR_SPEND_STATE={str(path)!r}: {error}") from error


class SpendKeeper:
    """Writes a ledger to a file when it has changed. `path` None: it is kept in memory only."""

    def __init__(
        self, path: Path | None, ledger: SpendLedger, every_s: float = SAVE_EVERY_S
    ) -> None:
        self._path = path
        self._ledger = ledger
        self._every_s = every_s
        self._saved = ledger.changes
        self._failed = False
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Writes every few seconds until `stop`, and then once more."""
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every_s):
                    await self._stopping.wait()
            await self._save()

    def stop(self) -> None:
        """Ends `run`. To cancel it would leave a write behind that nobody awaits."""
        self._stopping.set()

    async def _save(self) -> None:
        changes = self._ledger.changes
        if self._path is None or changes == self._saved:
            return
        told = spend_store.snapshot(self._ledger)
        try:
            await asyncio.to_thread(spend_store.save, self._path, told)
        except OSError as error:
            # Told once, and tried again the next time.
            if not self._failed:
                _LOG.error("the record of costs %s cannot be written: %s", self._path, error)
            self._failed = True
            return
        self._failed = False
        self._saved = changes
