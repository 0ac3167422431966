"""Ends the processes of a parent that died: no kill -9 of `caravan up` leaves an orphan.

Run by path, without site-packages, as `python -I -S lifeline.py MARK`, with standard input a pipe whose other end only the
parent holds. When the parent dies, however it dies, the pipe ends. Then every process whose environment holds MARK
(`NAME=VALUE`) is asked to end, and killed if it does not. The mark is found in /proc, so no list can be out of date.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Final

GRACE_S: Final = 3.0
_POLL_S: Final = 0.05
_PROC: Final = Path("/proc")


def marked(mark: str, proc: Path = _PROC) -> list[int]:
    """Ids of the processes of this user whose environment has the entry `mark`, without this one."""
    wanted = mark.encode()
    found = []
    for folder in proc.iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue  # another user's, or it has just ended
        if wanted in environment.split(b"\0"):
            found.append(int(folder.name))
    return found


def _signal_all(ids: list[int], number: signal.Signals) -> None:
    for process_id in ids:
        try:
            os.kill(process_id, number)
        except ProcessLookupError:
            continue


def end_all(mark: str, grace_s: float = GRACE_S) -> None:
    """Asks the marked processes to end, and kills those that still run after the grace."""
    pause = threading.Event()
    _signal_all(marked(mark), signal.SIGTERM)
    for _ in range(round(grace_s / _POLL_S)):
        if not marked(mark):
            return
        pause.wait(_POLL_S)
    while left := marked(mark):
        _signal_all(left, signal.SIGKILL)
        pause.wait(_POLL_S)


def main() -> None:
    """Waits for the end of standard input; a byte before it says that the parent has ended everything itself."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if not sys.stdin.buffer.read(1):
        end_all(sys.argv[1])


if __name__ == "__main__":
    main()
