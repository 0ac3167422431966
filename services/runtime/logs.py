"""Logs: one line per event on stderr, `time level service logger: message`."""

from __future__ import annotations

import logging
import sys


def configure(service: str, level: str) -> None:
    """Sends the logs of this process to stderr. `level` is debug, info, warning or error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(
            f"%(asctime)s.%(msecs)03d %(levelname)s {service} %(name)s: %(message)s",
            "%Y-%m-%dT%H:%M:%S",
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
