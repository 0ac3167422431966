"""Processes that a bench starts: each in a session of its own, with a log, ended whatever happens."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

FOLDER = Path(__file__).parent / ".peers"
END_GRACE_S = 20.0
# Two processes in a session of their own: with autogroups, which are on by default on Linux, a session is what the
# scheduler shares the processors between, so this is one competitor with two busy threads, as the server is one.
BUSY_PAIR = """
import ctypes, os, signal
if os.fork() == 0:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
while True:
    pass
"""
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class StartError(RuntimeError):
    """A process did not become ready; the message holds the end of its log."""


def end_with_parent() -> None:
    """Run in a child before its program: the kernel sends it SIGTERM when the bench dies, however it dies."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running(
    name: str, argv: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a program in a session of its own, its output in bench/.peers/NAME.log, until the block ends."""
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            argv,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - there are no threads
        )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Asks a process to end, then ends its whole group."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def log_tail(name: str) -> str:
    """The last lines of a process's log."""
    return "\n".join((FOLDER / f"{name}.log").read_text(errors="replace").splitlines()[-15:])


def wait_until_answers(
    name: str, process: subprocess.Popen[bytes], url: str, timeout_s: float = 120.0
) -> None:
    """Waits until GET `url` is answered with 200. Raises StartError if the process ends or the time is over."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StartError(f"{name} ended with {process.returncode}:\n{log_tail(name)}")
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.1)
    raise StartError(f"{name} did not answer {url} within {timeout_s:.0f} s:\n{log_tail(name)}")


@contextlib.contextmanager
def busy_pair() -> Iterator[None]:
    """Keeps two processes of default priority busy until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY_PAIR],
        start_new_session=True,
        preexec_fn=end_with_parent,  # noqa: PLW1509 - there are no threads
    )
    try:
        time.sleep(0.3)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
