"""Log files of the processes: opened for appending, rotated at start and when they grow."""

from __future__ import annotations

import os
import shutil
from collections import deque
from pathlib import Path


def open_log(path: Path) -> int:
    """A descriptor that appends to a new file; the file of the run before becomes NAME.1. The caller closes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    put_aside(path)
    return reopen_log(path)


def put_aside(path: Path) -> None:
    """Makes the file, if there is one, NAME.1."""
    if path.exists():
        path.replace(_older(path))


def reopen_log(path: Path) -> int:
    """A descriptor that appends to the file as it is, for a process that is started again."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)


def cap(path: Path, bytes_max: int) -> bool:
    """Moves the content of a file that is too long to NAME.1; tells whether it did.

    The file is copied and cut, not renamed: its writers keep it open, and append to whatever length it has. A line written
    between the two steps is lost; a log that fills the disk loses more.
    """
    try:
        if path.stat().st_size <= bytes_max:
            return False
        shutil.copyfile(path, _older(path))
        os.truncate(path, 0)
    except OSError:
        return False
    return True


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines that are not empty."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return list(deque((line.rstrip() for line in file if line.strip()), maxlen=count))
    except OSError:
        return []


def _older(path: Path) -> Path:
    return path.with_name(path.name + ".1")
