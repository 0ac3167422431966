"""The fingerprint of a model file: SHA-256 of all its bytes, remembered so that a file is read for it only once (W46).

The memory is a small JSON file. It is trusted only while path, size, modification time and inode are the same; a memory
that cannot be read is made anew. Blocking: call it on a worker thread.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Final

from services.runtime.clock import IdSource

_LOG = logging.getLogger(__name__)
_READ_BYTES: Final = 4 << 20
_MEMORY_ENTRIES_MAX: Final = 256
_Entry = tuple[str, int, int, int, str]
"""Path, size, modification time in ns, inode, fingerprint in hex."""


def file_fingerprint(model: Path, memory: Path | None, new_id: IdSource) -> bytes:
    """SHA-256 of the file, 32 bytes; `memory` is the JSON file to remember it in, None for none. Raises OSError."""
    path = model.resolve()
    status = path.stat()
    state = (str(path), status.st_size, status.st_mtime_ns, status.st_ino)
    remembered = _recall(memory) if memory is not None else []
    for entry in remembered:
        if entry[:4] == state:
            return bytes.fromhex(entry[4])
    digest = _hash_file(path)
    if memory is not None:
        others = [entry for entry in remembered if entry[0] != state[0]]
        _remember(memory, [*others[-_MEMORY_ENTRIES_MAX + 1 :], (*state, digest.hex())], new_id)
    return digest


def text_fingerprint(script: str) -> bytes:
    """The fingerprint of a scripted model, 32 bytes."""
    return hashlib.sha256(b"caravan script\0" + script.encode()).digest()


def _hash_file(path: Path) -> bytes:
    state = hashlib.sha256()
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while (count := file.readinto(buffer)) > 0:
            state.update(buffer[:count])
    return state.digest()


def _recall(memory: Path) -> list[_Entry]:
    try:
        entries = json.loads(memory.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        _LOG.warning("the memory of fingerprints cannot be read and is made anew: %s", error)
        return []
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        _LOG.warning("the memory of fingerprints is corrupt and is made anew")
        return []
    return [tuple(entry) for entry in entries]


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, list) or [type(part) for part in entry] != [str, int, int, int, str]:
        return False
    try:
        return len(bytes.fromhex(entry[4])) == 32
    except ValueError:
        return False


def _remember(memory: Path, entries: list[_Entry], new_id: IdSource) -> None:
    """Replaces the memory as a whole: a reader sees the old one or the new one."""
    temporary = memory.with_name(f"{memory.name}.{new_id('memory')}.tmp")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(entries))
        temporary.replace(memory)
    except OSError as error:
        # Not fatal: the next start hashes the file again.
        _LOG.warning("the fingerprint cannot be remembered: %s", error)
        temporary.unlink(missing_ok=True)
