"""Ports for tests: free ones below the range of outgoing connections."""

from __future__ import annotations

import itertools
import os

from services.cli import ports

_FIRST = 30_000 + os.getpid() % 1000 * 2
_NEXT = itertools.count()


def free_port() -> int:
    """A loopback port that is free now, never the same twice in one test run."""
    while True:
        port = 30_000 + (_FIRST - 30_000 + next(_NEXT)) % 2_700
        if ports.is_free(port):
            return port
