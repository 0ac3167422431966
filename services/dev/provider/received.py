"""What came to the scripted provider, and what became of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

KEPT_MAX: Final = 4096


@dataclass(slots=True, eq=False)
class Received:
    """A request. Times are of the server's monotonic clock, in seconds; names of headers are in lower case.

    connection: counts the connections, so that two requests with the same number shared one.
    key: the credential that came. fault: what hit it, such as "cut"; "" for nothing.
    pieces: of the answer, that were given to the socket.
    closed_by_client: set when the client closed the connection before the answer had ended.
    """

    number: int
    connection: int
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    started: float
    ended: float | None = None
    status: int | None = None
    key: str = ""
    fault: str = ""
    pieces: int = 0
    closed_by_client: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def json(self) -> Any:
        """The body. Raises ValueError if it is no JSON."""
        return json.loads(self.body)
