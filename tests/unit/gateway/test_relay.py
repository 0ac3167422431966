"""The bounded way between a session and the call that shows its events."""

from __future__ import annotations

import asyncio

import pytest

from services.gateway.relay import RELAY_ITEMS_MAX, Relay


async def test_items_come_in_order_and_the_end_last() -> None:
    """What was written before the end is read before it; the first end counts."""
    relay: Relay[int] = Relay()
    await relay.put(1)
    await relay.put(2)
    relay.end(ValueError("first"))
    relay.end(ValueError("second"))
    assert [await relay.get(), await relay.get()] == [1, 2]
    with pytest.raises(ValueError, match="first"):
        await relay.get()


async def test_a_writer_waits_for_its_reader() -> None:
    """No more than the bound is ever unread (I4)."""
    relay: Relay[int] = Relay()
    for number in range(RELAY_ITEMS_MAX):
        await relay.put(number)
    writing = asyncio.create_task(relay.put(99))
    done, _ = await asyncio.wait({writing}, timeout=0.05)
    assert not done
    assert await relay.get() == 0
    await writing


async def test_silence_is_told_again_and_again() -> None:
    """Each silence of the given length is told once; an item in between starts a new one."""
    relay: Relay[int] = Relay()
    assert await relay.get(0.01) is None
    assert await relay.get(0.01) is None
    await relay.put(7)
    assert await relay.get(0.01) == 7
    assert await relay.get(0.01) is None
    relay.close()


async def test_a_reader_that_is_cancelled_loses_nothing() -> None:
    """An item that comes after a reader has gone waits for the next one."""
    relay: Relay[int] = Relay()
    reading = asyncio.create_task(relay.get())
    await asyncio.wait({reading}, timeout=0.01)
    reading.cancel()
    await asyncio.wait({reading})
    await relay.put(5)
    assert await relay.get() == 5


async def test_only_what_is_there_is_taken() -> None:
    """`get_ready` never waits."""
    relay: Relay[int] = Relay()
    assert relay.get_ready() is None
    await relay.put(3)
    assert relay.get_ready() == 3
    assert relay.get_ready() is None
