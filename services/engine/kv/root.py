"""A root: a folder of block files with an id of its own, shared by the engines of one host (S2.13-S2.17). Blocking.

A file appears under its name whole or not at all: it is written under a temporary name, synced, then linked. What readers and
scans find broken they remove, so that it can be saved again (W30).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Final

from services.engine.kv import block_file
from services.engine.kv.block_file import LoadedBlock, TemporaryBlock
from services.engine.kv.kvc import Expected, Flaw, Head, KvcError
from services.runtime.clock import IdSource

_LOG = logging.getLogger(__name__)
_SUFFIX: Final = ".kvc"
_TEMPORARY: Final = ".tmp"
_ID_FILE: Final = "root-id"
_ID_BYTES_MAX: Final = 64


class RootTrouble(Enum):
    """Why a root could not be used."""

    FULL = "full"
    READ_ONLY = "read_only"
    FAILED = "failed"


class RootError(Exception):
    """A root could not be used."""

    def __init__(self, trouble: RootTrouble, detail: str) -> None:
        super().__init__(f"{trouble.value}: {detail}")
        self.trouble = trouble


class Linked(Enum):
    """How a file got its name."""

    NEW = "new"
    ADOPTED = "adopted"


_TROUBLES: Final = {
    errno.ENOSPC: RootTrouble.FULL,
    errno.EDQUOT: RootTrouble.FULL,
    errno.EFBIG: RootTrouble.FULL,
    errno.EROFS: RootTrouble.READ_ONLY,
    errno.EACCES: RootTrouble.READ_ONLY,
    errno.EPERM: RootTrouble.READ_ONLY,
}


def _trouble(error: OSError) -> RootError:
    return RootError(_TROUBLES.get(error.errno or 0, RootTrouble.FAILED), str(error))


class Root:
    """An open root. Every method may run on any thread; none keeps state of its own."""

    def __init__(self, path: Path, root_id: str, *, writable: bool) -> None:
        self.path = path
        self.root_id = root_id
        self.writable = writable

    @classmethod
    def open(cls, path: Path, new_id: IdSource) -> Root:
        """Opens a folder, made if it is missing, given an id if it has none. Raises RootError: then the start must fail."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            writable = os.access(path, os.W_OK | os.X_OK)
            id_file = path / _ID_FILE
            if writable and not id_file.exists():
                _make_id(id_file, new_id)
            root_id = id_file.read_text("ascii")
        except OSError as error:
            raise _trouble(error) from error
        except UnicodeDecodeError as error:
            raise RootError(RootTrouble.FAILED, f"{_ID_FILE} is corrupt") from error
        if not 0 < len(root_id) <= _ID_BYTES_MAX:
            raise RootError(RootTrouble.FAILED, f"{_ID_FILE} is corrupt")
        return cls(path, root_id, writable=writable)

    def file_of(self, key: bytes) -> Path:
        """Where the block of a key lies."""
        return self.path / (key.hex() + _SUFFIX)

    # --- reading -------------------------------------------------------------------------------------------------

    def read(self, expected: Expected) -> LoadedBlock:
        """Reads and checks a block. Raises OSError (FileNotFoundError: it is gone), KvcError."""
        path = self.file_of(expected.key)
        block = block_file.read_block(path, expected)
        if self.writable:
            try:
                block_file.count_hit(path, block.meta.hits + 1)
            except OSError as error:
                # The count only helps to choose what to drop.
                _LOG.debug("no hit counted in %s: %s", path.name, error)
        return block

    def head(self, key: bytes) -> Head:
        """Parses the metadata of a block's file. Raises OSError, KvcError."""
        head = block_file.read_head(self.file_of(key))
        if head.meta.key != key:
            raise _misnamed()
        return head

    def read_whole(self, key: bytes) -> LoadedBlock:
        """Reads a block and checks it against itself and its name. Raises OSError, KvcError."""
        meta = self.head(key).meta
        expected = Expected(
            key, meta.parent, meta.namespace, meta.start, meta.token_bytes, meta.whole
        )
        return block_file.read_block(self.file_of(key), expected)

    def scan(self) -> Iterator[Head]:
        """The blocks with valid metadata, one by one; broken files and those of dead writers are removed. Raises RootError.

        About in the order in which they were saved: file systems number files so, and list them by the hash of their names. What
        belongs together comes together then.
        """
        try:
            with os.scandir(self.path) as entries:
                by_number = sorted((entry.inode(), entry.name) for entry in entries)
            for _, name in by_number:
                path = self.path / name
                if f"{_SUFFIX}." in name and name.endswith(_TEMPORARY):
                    self._sweep(path)
                elif name.endswith(_SUFFIX):
                    head = self._scan_block(path)
                    if head is not None:
                        yield head
        except OSError as error:
            raise _trouble(error) from error

    def _scan_block(self, path: Path) -> Head | None:
        try:
            head = block_file.read_head(path)
            if path.name != head.meta.key.hex() + _SUFFIX:
                raise _misnamed()
        except FileNotFoundError:
            return None  # Dropped meanwhile.
        except OSError as error:
            _LOG.warning("%s cannot be read: %s", path.name, error)
            return None
        except KvcError as error:
            _LOG.warning("removing %s: %s", path.name, error)
            if self.writable:
                path.unlink(missing_ok=True)
            return None
        return head

    def _sweep(self, path: Path) -> None:
        """Removes a temporary file whose writer is gone; those of writers that live stay, whoever they are (W43)."""
        try:
            if self.writable and block_file.is_abandoned(path):
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass  # It got its name, or was given up, meanwhile.

    # --- writing -------------------------------------------------------------------------------------------------

    def write(
        self, key: bytes, writer: str, unique: str, parts: Sequence[bytes | memoryview]
    ) -> TemporaryBlock:
        """Writes a block under a temporary name. Raises RootError; nothing is left then."""
        name = f"{key.hex()}{_SUFFIX}.{writer}.{unique}{_TEMPORARY}"
        try:
            return TemporaryBlock(self.path / name, parts)
        except OSError as error:
            raise _trouble(error) from error

    def link(self, temporary: TemporaryBlock, expected: Expected) -> Linked:
        """Gives a temporary file its name, durably, and takes away the temporary one. Raises RootError.

        Where the name is taken, the file there is checked: a valid one is adopted (the first content wins), another is
        replaced (S2.28).
        """
        final = self.file_of(expected.key)
        try:
            linked = self._link(temporary.path, final, expected)
        except OSError as error:
            raise _trouble(error) from error
        finally:
            temporary.discard()
        try:
            self._sync_folder()
        except OSError as error:
            raise _trouble(error) from error
        return linked

    def _link(self, source: Path, final: Path, expected: Expected) -> Linked:
        try:
            final.hardlink_to(source)
        except FileExistsError:
            try:
                block_file.read_block(final, expected)
            except FileNotFoundError:
                pass  # Dropped meanwhile.
            except (OSError, KvcError) as error:
                _LOG.warning("replacing %s: %s", final.name, error)
                final.unlink(missing_ok=True)
            else:
                return Linked.ADOPTED
            final.hardlink_to(source)
        return Linked.NEW

    def _sync_folder(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def delete(self, key: bytes) -> None:
        """Removes a block; one that is gone already counts as removed (S2.17). Raises RootError."""
        try:
            self.file_of(key).unlink(missing_ok=True)
        except OSError as error:
            raise _trouble(error) from error


def _misnamed() -> KvcError:
    return KvcError(Flaw.KEY_MISMATCH, "the file has another block's name")


def _make_id(id_file: Path, new_id: IdSource) -> None:
    """Several engines may open a new root at once: the link makes one of their ids win."""
    # Not a temporary name of blocks, which a scan of the others may sweep.
    temporary = id_file.with_name(f"{_ID_FILE}.{new_id('id')}.new")
    temporary.write_text(new_id("root"), "ascii")
    try:
        id_file.hardlink_to(temporary)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
