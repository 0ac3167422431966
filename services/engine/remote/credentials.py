"""The credential that calls are made with, and its replacement while calls run (S3.15, S3.16; W21, W29).

A call takes a snapshot and finishes with it. Whoever is refused with a 401 asks for another credential than the one it had: of a hundred
at the same time the first reads it again, and the others get what it read. What cannot be read leaves the old credential in place.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

from caravan.engine.v1 import remote_service_pb2 as pb

from services.engine.remote.credential_sources import (
    FileSource,
    Reading,
    Source,
    SourceError,
    checked,
)
from services.engine.remote.failure import Failure, ProviderError
from services.runtime.clock import Clock

T = TypeVar("T")

_log = logging.getLogger(__name__)

CHECK_S: Final = 1.0
"""How often a file is looked at."""
READ_S: Final = 5.0
"""Longest wait for the place where a credential is: a file may be on a disk that hangs."""
REFRESH_AHEAD_S: Final = 60.0
"""So long before it expires a credential is read again, until a newer one is found."""


class CredentialError(ProviderError):
    """No credential can be read. `detail` says why and names the place: it is for the operator, not for the caller."""

    def __init__(self, detail: str) -> None:
        super().__init__(
            Failure.UNAUTHORIZED, "The credential for the provider of the model cannot be read."
        )
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Credential:
    """A snapshot; its text does not show the secret. `expires_at` is in seconds since the epoch, `read_at` monotonic."""

    generation: int
    secret: str = field(repr=False)
    """Empty: none is sent."""
    expires_at: float | None
    read_at: float


class CredentialSession:
    """The present credential of one engine. Lives on the event loop; files are read on other threads."""

    def __init__(
        self,
        source: Source | None,
        clock: Clock,
        environ: Mapping[str, str],
        on_change: Callable[[Credential], None],
    ) -> None:
        """Without a source no credential is sent. `on_change` hears of each credential before it is used."""
        self._source = source
        self._clock = clock
        self._environ = environ
        self._on_change = on_change
        self._current = Credential(0, "", None, clock.monotonic())
        self._rotated = False
        self._reading = asyncio.Lock()
        # One thread of its own: a disk that hangs takes this one, and not those that the loop resolves names with.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="credential")
        self._failures = 0
        self._failure: CredentialError | None = None
        self._signature: tuple[int, ...] | None = None

    @property
    def snapshot(self) -> Credential:
        """The credential for a call that begins now."""
        return self._current

    async def open(self) -> None:
        """Reads the first credential. Raises CredentialError."""
        async with self._reading:
            if self._source is None:
                self._adopt(Reading("", None))
            else:
                await self._read(self._source)

    async def rebuild(self, failed_generation: int) -> Credential:
        """Another credential than the one that the provider refused. Raises CredentialError; then the old one stays.

        Many who ask at once cause one reading, and share its failure.
        """
        failures = self._failures
        async with self._reading:
            if self._current.generation != failed_generation:
                return self._current
            if self._failures != failures and self._failure is not None:
                raise self._failure
            if self._source is not None and not self._rotated:
                await self._read(self._source)
            return self._current

    async def reread(self) -> Credential:
        """What stands where the credential comes from, also after `rotate`. Raises CredentialError; then the old one stays."""
        async with self._reading:
            if self._source is None:
                raise CredentialError("no place is configured that a credential could be read from")
            await self._read(self._source)
            self._rotated = False
            return self._current

    async def rotate(self, secret: str) -> Credential:
        """Uses this secret until the process ends, `reread` or the next `rotate`. Raises CredentialError for what is none."""
        try:
            reading = Reading(checked(secret), None)
        except SourceError as error:
            raise CredentialError(str(error)) from None
        async with self._reading:  # A reading that has begun before must not replace it.
            self._rotated = True
            self._adopt(reading)
            return self._current

    async def watch(self, every_s: float = CHECK_S) -> None:
        """Looks after the credential until it is cancelled; returns at once where it cannot change by itself."""
        while isinstance(self._source, FileSource):
            await asyncio.sleep(every_s)
            await self.check()

    async def check(self) -> None:
        """Reads a file again that has changed, or whose credential expires soon. A failure is logged, once until it changes."""
        source = self._source
        if not isinstance(source, FileSource):
            return
        async with self._reading:
            if self._rotated:
                return
            try:
                signature = await self._in_thread(source.signature)
                if signature != self._signature or self._expires_soon():
                    await self._read(source, only_news=True)
            except SourceError as error:
                self._note(source, error)
            except CredentialError:
                return  # It is noted.

    def close(self) -> None:
        """Lets its thread go, without waiting for a disk that hangs."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def status(self) -> pb.CredentialStatus:
        """What an operator may see."""
        current = self._current
        status = pb.CredentialStatus(
            source="" if self._source is None else str(self._source), generation=current.generation
        )
        if self._rotated:
            status.source = "rotated by hand"
        status.age.FromMicroseconds(round((self._clock.monotonic() - current.read_at) * 1e6))
        if current.expires_at is not None:
            left_s = max(0.0, current.expires_at - self._clock.wall())
            status.expires_in.FromMicroseconds(round(left_s * 1e6))
        return status

    def _expires_soon(self) -> bool:
        expires_at = self._current.expires_at
        ahead_s = math.inf if expires_at is None else expires_at - self._clock.wall()
        return ahead_s <= REFRESH_AHEAD_S

    async def _read(self, source: Source, *, only_news: bool = False) -> None:
        """Reads and adopts, with the lock held. `only_news`: not what is known already."""
        try:
            # Also where nothing blocks: one path for all sources.
            reading = await self._in_thread(partial(source.read, self._environ))
        except SourceError as error:
            raise self._note(source, error) from None
        else:
            self._failure = None
            self._signature = reading.signature
            known = (self._current.secret, self._current.expires_at)
            if not only_news or (reading.secret, reading.expires_at) != known:
                self._adopt(reading)

    async def _in_thread(self, look: Callable[[], T]) -> T:
        """What `look` returns or raises; SourceError if it takes too long."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(READ_S):
                return await loop.run_in_executor(self._thread, look)
        except TimeoutError:
            raise SourceError(f"the place does not answer within {READ_S:g} s") from None

    def _note(self, source: Source, error: SourceError) -> CredentialError:
        failure = CredentialError(f"{source}: {error}")
        if self._failure is None or self._failure.detail != failure.detail:
            _log.warning("the credential cannot be read, the old one stays: %s", failure.detail)
        self._failures += 1
        self._failure = failure
        return failure

    def _adopt(self, reading: Reading) -> None:
        credential = Credential(
            self._current.generation + 1,
            reading.secret,
            reading.expires_at,
            self._clock.monotonic(),
        )
        self._on_change(credential)
        self._current = credential
