"""Events on their way from the provider to the writer."""

from __future__ import annotations

import asyncio

from caravan.core.v1 import chat_pb2, generation_pb2

from services.engine.remote.outbox import WAITING_BYTES_MAX, Ending, Outbox
from services.engine.remote.wire import Piece
from services.runtime.errors import CaravanError

END = Ending(generation_pb2.FINISH_REASON_STOP, generation_pb2.Usage())


async def test_what_waits_comes_together_and_in_order() -> None:
    """A slow reader gets one update with all pieces."""
    outbox = Outbox()
    outbox.start()
    for word in ("a", "b"):
        outbox.add(Piece(text=word))
    outbox.add(Piece(refusal="no"))
    outbox.add(Piece(calls=[chat_pb2.ToolCallDelta(index=0, arguments_json="{}")]))
    outbox.end(END)
    update = await outbox.take()
    assert update.started
    assert (update.text, update.refusal, update.pieces) == (["a", "b"], ["no"], 4)
    assert len(update.calls) == 1
    assert update.ending is END


async def test_nothing_follows_an_end() -> None:
    """One ending (I1): a second one, an error or a late piece changes nothing."""
    outbox = Outbox()
    outbox.fail(CaravanError("DRAINING", "first"))
    outbox.end(END)
    outbox.fail(CaravanError("INTERNAL", "second"))
    outbox.add(Piece(text="late"))
    outbox.start()
    update = await outbox.take()
    assert update.error is not None
    assert update.error.reason == "DRAINING"
    assert update.ending is None
    assert not update.pieces
    assert not update.started
    assert outbox.ended


async def test_a_full_outbox_holds_its_writer_until_it_is_read() -> None:
    """`room` returns when the reader has taken what waits; pieces without text count too."""
    outbox = Outbox()
    while not outbox.is_full:
        outbox.add(Piece(text="x" * 100))
    waiting = asyncio.create_task(outbox.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    update = await outbox.take()
    assert update.pieces <= WAITING_BYTES_MAX / 100 + 1
    await waiting
    for _ in range(WAITING_BYTES_MAX):
        outbox.add(Piece())
        if outbox.is_full:
            return
    raise AssertionError("empty pieces are not bounded")


async def test_a_silence_is_told_once_an_interval() -> None:
    """Only where nothing else was told since the last time; and again in the next interval."""
    outbox = Outbox()
    outbox.add(Piece(text="a"))
    outbox.alive()
    assert not (await outbox.take()).alive
    for _ in range(2):
        outbox.alive()
        assert (await outbox.take()).alive
