"""Reading and writing one block file: plain reads into one buffer (S2.16), vectored writes (S2.27). Blocking."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from services.engine.kv import kvc
from services.engine.kv.checksum import PIECE_BYTES, crc32c
from services.engine.kv.kvc import BlockMeta, Expected, Flaw, Head, KvcError

_MODE: Final = 0o600
_PARTS_AT_ONCE: Final = 16
"""Buffers of one vectored write, far below every system's limit."""


@dataclass(frozen=True, slots=True)
class LoadedBlock:
    """A block whose bytes are in memory and passed all checks. `file_bytes` is the size of its file."""

    meta: BlockMeta
    state: memoryview
    file_bytes: int


def read_head(path: Path) -> Head:
    """Parses a file's metadata with one small read and checks its size (W43). Raises OSError, KvcError."""
    descriptor = _open(path)
    try:
        return _read_head(descriptor)[0]
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    # Without waiting, so that a pipe that somebody left in the folder does not hold up a thread for ever.
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def _read_head(descriptor: int) -> tuple[Head, bytes]:
    first = os.pread(descriptor, kvc.PREFIX_BYTES_MAX, 0)
    head = kvc.parse(first)
    kvc.check_size(head, os.fstat(descriptor).st_size)
    return head, first


def read_block(path: Path, expected: Expected) -> LoadedBlock:
    """Reads and checks a whole file. Raises OSError, KvcError."""
    descriptor = _open(path)
    try:
        head, first = _read_head(descriptor)
        expected.check(head.meta)
        # Allocated only now that the size is known to be the file's: a hostile length reserves nothing.
        payload = np.empty(head.payload_bytes, dtype=np.uint8).data
        kvc.check_payload(head, _read_payload(descriptor, head, first, payload))
    finally:
        os.close(descriptor)
    return LoadedBlock(head.meta, payload.toreadonly(), head.file_bytes)


def _read_payload(descriptor: int, head: Head, first: bytes, payload: memoryview) -> int:
    """Fills the payload; returns its checksum, computed piece by piece while the piece is in the processor's cache."""
    at = min(len(first) - head.payload_offset, len(payload))
    payload[:at] = first[head.payload_offset : head.payload_offset + at]
    crc = crc32c(payload[:at])
    while at < len(payload):
        piece = payload[at : at + PIECE_BYTES]
        count = os.preadv(descriptor, [piece], head.payload_offset + at)
        if count == 0:  # Cut while it was read.
            raise KvcError(Flaw.TRUNCATED)
        crc = crc32c(piece[:count], crc)
        at += count
    return crc


class TemporaryBlock:
    """A block's file before it has its name. The lock on it tells sweepers that its writer lives, and ends with it."""

    def __init__(self, path: Path, parts: Iterable[bytes | memoryview]) -> None:
        """Creates, locks, writes and syncs the file. Raises OSError; nothing is left then."""
        self.path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, _MODE)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            _write_all(self._descriptor, parts)
            os.fdatasync(self._descriptor)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Removes the temporary name and the lock. Doing it twice is harmless."""
        if self._descriptor >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


def _write_all(descriptor: int, parts: Iterable[bytes | memoryview]) -> None:
    left = [memoryview(part).cast("B") for part in parts if len(part)]
    while left:
        count = os.writev(descriptor, left[:_PARTS_AT_ONCE])
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]


def is_abandoned(path: Path) -> bool:
    """Whether the writer of a temporary file is gone: its lock is free. Raises OSError."""
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def count_hit(path: Path, hits: int) -> None:
    """Notes in a file how often it was read; lost races do no harm, and a missing file is not made (W31). Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(descriptor, min(hits, 2**32 - 1).to_bytes(4, "little"), kvc.HITS_OFFSET)
    finally:
        os.close(descriptor)
