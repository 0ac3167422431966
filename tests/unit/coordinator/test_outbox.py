"""The outbox of a session: order, no repeats, a bound, one ending."""

from __future__ import annotations

import asyncio

import pytest

from services.coordinator.outbox import OUTBOX_MESSAGES_MAX, Outbox


async def test_messages_come_in_order_without_repeats() -> None:
    """A message that waits already is sent once, when it was put last; one that was sent may be sent again.

    So of drain, undrain and drain again the last command counts.
    """
    outbox = Outbox[str]()
    for key in ("b", "a", "b"):
        assert outbox.put(key)
    assert [await anext(outbox), await anext(outbox)] == ["a", "b"]
    outbox.put("b")
    assert await anext(outbox) == "b"


async def test_a_reader_that_waits_is_woken() -> None:
    """Putting and closing wake the reader."""
    outbox = Outbox[str]()
    waiting = asyncio.ensure_future(anext(outbox))
    await asyncio.sleep(0)
    assert not waiting.done()
    outbox.put("a")
    assert await waiting == "a"
    ended = asyncio.ensure_future(anext(outbox, None))
    await asyncio.sleep(0)
    outbox.close()
    assert await ended is None


async def test_the_first_close_counts() -> None:
    """The error of the first close is raised, what waited is dropped, and later messages are too."""
    outbox = Outbox[str]()
    outbox.put("a")
    outbox.close(RuntimeError("first"))
    outbox.close(RuntimeError("second"))
    assert outbox.put("b")
    with pytest.raises(RuntimeError, match="first"):
        await anext(outbox)


def test_the_outbox_is_bounded() -> None:
    """One message over the limit is refused, unless it waits already (I4)."""
    outbox = Outbox[str]()
    assert all(outbox.put(f"req-{i}") for i in range(OUTBOX_MESSAGES_MAX))
    assert outbox.put("req-0")
    assert not outbox.put("one-more")
