"""The scripted provider: a server on loopback that knows the wires, what to go wrong, and what came."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Final, Self

from services.dev.provider.anthropic_dialect import AnthropicDialect
from services.dev.provider.connection import Connection, target_parts
from services.dev.provider.control import PREFIX, answer_control
from services.dev.provider.dialect import Dialect
from services.dev.provider.exchange import Behaviour, Sink, answer, send_json
from services.dev.provider.faults import FaultPlan
from services.dev.provider.gemini_dialect import GeminiDialect
from services.dev.provider.openai_dialect import CREATED, OpenAIDialect
from services.dev.provider.received import KEPT_MAX, Received
from services.dev.provider.script import Script
from services.runtime.clock import Clock, SystemClock

HOST: Final = "127.0.0.1"
DIALECTS: Final[tuple[Dialect, ...]] = (OpenAIDialect(), AnthropicDialect(), GeminiDialect())


class ScriptedProvider:
    """Serves from entering to leaving the block.

    `script`, `faults` and `accepted_keys` may be changed at any time; requests that come afterwards see it. `requests` holds what
    came, oldest first, at most KEPT_MAX. With port 0 any free one is taken. Raises OSError for a port that is taken.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        accepted_keys: Collection[str] = (),
        port: int = 0,
        clock: Clock | None = None,
    ) -> None:
        self.script = script or Script()
        self.faults = FaultPlan()
        self.accepted_keys = set(accepted_keys)
        self.requests: deque[Received] = deque(maxlen=KEPT_MAX)
        self.clock: Clock = clock or SystemClock()
        self.port = port
        self._count = 0
        self._connections_count = 0
        self._connections: set[Connection] = set()
        self._changed = asyncio.Event()
        self._server: asyncio.Server | None = None

    @property
    def origin(self) -> str:
        """Where it is, without a path."""
        return f"http://{HOST}:{self.port}"

    @property
    def base_url(self) -> str:
        """What clients of every wire can take for the root of the API: only the end of a path is looked at."""
        return f"{self.origin}/v1"

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connection, HOST, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._server is not None:
            self._server.close()
            for connection in list(self._connections):
                connection.close()
            await self._server.wait_closed()
            self._server = None
        while self._connections:
            await self._changed.wait()

    async def wait_for_requests(self, count: int) -> None:
        """Waits until so many requests have come since the start."""
        while self._count < count:
            await self._changed.wait()

    def opened(self, connection: Connection) -> int:
        """Counts a connection; returns its number."""
        self._connections.add(connection)
        self._connections_count += 1
        return self._connections_count

    def closed(self, connection: Connection) -> None:
        """Forgets a connection."""
        self._connections.discard(connection)
        self._notify()

    def received(
        self, connection: int, target: str, method: str, headers: Mapping[str, str], body: bytes
    ) -> Received:
        """Remembers a request."""
        path, query = target_parts(target)
        started = self.clock.monotonic()
        if not path.startswith(PREFIX):
            self._count += 1
        request = Received(
            self._count, connection, method, path, query, headers, body, started=started
        )
        if not path.startswith(PREFIX):
            self.requests.append(request)
            self._notify()
        return request

    def _connection(self) -> Connection:
        return Connection(self, self._answer)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _answer(self, request: Received, sink: Sink) -> None:
        if request.path.startswith(PREFIX):
            await answer_control(request, sink, self)
            return
        if request.method == "GET" and request.path.endswith("/models"):
            await send_json(sink, 200, _models(self.script))
            return
        for dialect in DIALECTS:
            if request.method == "POST" and dialect.serves(request.path):
                request.key = dialect.key(request.headers, request.query)
                behaviour = Behaviour(self.script, self.accepted_keys, self.faults.take())
                await answer(request, sink, dialect, behaviour)
                return
        await send_json(sink, 404, {"error": {"message": f"no such path: {request.path}"}})


def _models(script: Script) -> dict[str, object]:
    listed = [
        {"id": name, "object": "model", "created": CREATED, "owned_by": "scripted"}
        for name in script.models or ("scripted",)
    ]
    return {"object": "list", "data": listed}
