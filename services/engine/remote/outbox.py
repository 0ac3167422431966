"""Events of one request on their way from the provider to the gRPC writer, merged while the writer is busy."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final

from caravan.core.v1 import chat_pb2, generation_pb2

from services.engine.news import News
from services.engine.remote.wire import Piece
from services.runtime.errors import CaravanError

WAITING_BYTES_MAX: Final = 256 << 10
"""What may wait for a slow reader, about; beyond it nothing is read from the provider (I4)."""
_PIECE_BYTES: Final = 64
_LOGPROB_BYTES: Final = 256


@dataclass(frozen=True, slots=True)
class Ending:
    """How an answer ended: the stop text that was met, the tokens used, times in seconds, and billionths of a US dollar."""

    reason: generation_pb2.FinishReason.ValueType
    usage: generation_pb2.Usage
    stop_text: str = ""
    queue_s: float = 0.0
    first_piece_s: float = 0.0
    pieces_s: float = 0.0
    cost_nanousd: int = 0


@dataclass(slots=True)
class Update:
    """What became known of a request since the update before.

    `started` and `ending` come once; `error` ends the request instead of `ending`. `alive` says that there was nothing to tell
    for a while.
    """

    started: bool = False
    alive: bool = False
    pieces: int = 0
    text: list[str] = field(default_factory=list)
    refusal: list[str] = field(default_factory=list)
    calls: list[chat_pb2.ToolCallDelta] = field(default_factory=list)
    logprobs: list[generation_pb2.TokenLogprob] = field(default_factory=list)
    ending: Ending | None = None
    error: CaravanError | None = None


class Outbox(News[Update]):
    """Lives on the event loop; one writer takes from it. What comes behind an end is not told."""

    __slots__ = ("_ended", "_room", "_waiting_bytes")

    def __init__(self) -> None:
        super().__init__(Update)
        self._waiting_bytes = 0
        self._room: asyncio.Future[None] | None = None
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the request has its end or its error (I1)."""
        return self._ended

    @property
    def is_full(self) -> bool:
        """Whether the reader is so far behind that nothing more should be added before `room`."""
        return self._waiting_bytes > WAITING_BYTES_MAX

    def start(self) -> None:
        """The provider is being called. That is told with what comes next, be it that nothing has come for a while: a message of its
        own would have everybody on the way at work just when the first piece is about to come."""
        if not self._ended:
            self._pending.started = True

    def add(self, piece: Piece) -> None:
        """A piece of the answer."""
        if self._ended:
            return
        pending = self._pending
        pending.pieces += 1
        if piece.text:
            pending.text.append(piece.text)
        if piece.refusal:
            pending.refusal.append(piece.refusal)
        self._waiting_bytes += len(piece.text) + len(piece.refusal) + _PIECE_BYTES
        for call in piece.calls:
            pending.calls.append(call)
            self._waiting_bytes += len(call.arguments_json)
        if piece.logprobs:
            pending.logprobs.extend(piece.logprobs)
            self._waiting_bytes += _LOGPROB_BYTES * len(piece.logprobs)
        self._wake()

    def end(self, ending: Ending) -> None:
        """The answer is complete."""
        if not self._ended:
            self._ended = True
            self._pending.ending = ending
            self._wake()

    def fail(self, error: CaravanError) -> None:
        """The request failed."""
        if not self._ended:
            self._ended = True
            self._pending.error = error
            self._wake()

    def alive(self, _prompt_tokens_done: int = 0) -> None:
        """Called once an interval: where nothing was told since the last time, this is."""
        if self._was_silent():
            self._pending.alive = True
            self._announce()

    async def take(self) -> Update:
        """Waits for news and takes all of them."""
        taken = await super().take()
        self._waiting_bytes = 0
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        return taken

    async def room(self) -> None:
        """Waits until the reader has taken what waits."""
        while self.is_full:
            self._room = asyncio.get_running_loop().create_future()
            try:
                await self._room
            finally:
                self._room = None
