"""The state directory of `caravan up`: one owner, endpoints.json, logs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from services.cli.plan import ProcessPlan


class StateDirError(Exception):
    """The state directory cannot be used; the message says why."""


@contextlib.contextmanager
def owned(path: Path) -> Iterator[None]:
    """Holds the directory for this process. Raises StateDirError if another `caravan up` has it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / "lock").open("a+", encoding="ascii")
    except OSError as error:
        raise StateDirError(f"cannot use the state directory {path}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip()
            raise StateDirError(
                f"the state directory {path} is in use by another `caravan up` (process {owner});"
                " give this one its own with --state-dir"
            ) from None
        # The lock is the kernel's and ends with this process; the number in it only serves the message above.
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


class Endpoints:
    """STATE_DIR/endpoints.json: where each running process is. Replaced as a whole, so a reader never sees half of it."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "endpoints.json"
        self._running: dict[str, dict[str, str | int]] = {}

    def started(self, process: ProcessPlan, process_id: int) -> None:
        """The process runs."""
        self._running[process.name] = {
            "name": process.name,
            "pid": process_id,
            "address": process.address,
            "metrics": process.metrics,
        }
        self._write()

    def ended(self, process: ProcessPlan) -> None:
        """The process does not run."""
        if self._running.pop(process.name, None) is not None:
            self._write()

    def remove(self) -> None:
        """Nothing runs any more: no file."""
        self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        temporary = self._path.with_name(self._path.name + ".new")
        document: Mapping[str, object] = {"processes": list(self._running.values())}
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self._path)


def address_of(state_dir: Path, name: str) -> str:
    """Where a process of the running `caravan up` listens, host:port. Raises StateDirError."""
    return _told_of(state_dir, name, "address")


def metrics_of(state_dir: Path, name: str) -> str:
    """URL of the metrics of a process of the running `caravan up`. Raises StateDirError."""
    return _told_of(state_dir, name, "metrics")


def _told_of(state_dir: Path, name: str, what: str) -> str:
    path = state_dir / "endpoints.json"
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["processes"]
        found = {str(process["name"]): process for process in listed}
        if name in found:
            return str(found[name][what])
    except FileNotFoundError:
        raise StateDirError(f"there is no {path}; is `caravan up` running?") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateDirError(f"{path} cannot be read: {error}") from error
    raise StateDirError(f"no {name} runs, says {path}")
