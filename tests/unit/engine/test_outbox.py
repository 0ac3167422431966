"""The outbox of a request, the mailbox of the loop, and the rate of tokens."""

from __future__ import annotations

import asyncio

from services.engine.mailbox import Mailbox
from services.engine.outbox import Ending, Outbox
from services.engine.rate import Rate

ENDING = Ending(1, "", 3, 2, 0.0, 0.0, 0.0)


async def test_a_slow_reader_gets_fewer_and_larger_updates() -> None:
    """What happens while the writer is busy is merged, in order, with nothing lost."""
    outbox = Outbox()
    outbox.start()
    for token in range(100):
        outbox.add(token, f"{token} ")
    outbox.end(ENDING)
    update = await outbox.take()
    assert update.started
    assert update.token_ids == list(range(100))
    assert "".join(update.text) == "".join(f"{token} " for token in range(100))
    assert update.ending is ENDING


async def test_a_reader_that_waits_is_woken() -> None:
    """The first news wakes the writer; a cancelled writer can come again."""
    outbox = Outbox()
    waiting = asyncio.ensure_future(outbox.take())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    again = asyncio.ensure_future(outbox.take())
    await asyncio.sleep(0)
    outbox.add(1, "a")
    outbox.add(2, "b")
    update = await again
    assert (update.token_ids, update.text) == ([1, 2], ["a", "b"])


async def test_deltas_that_gather_are_told_together() -> None:
    """The first at once, the others so long after each other; whatever else is to be told takes them along."""
    outbox = Outbox()
    outbox.gather(0.05)
    loop = asyncio.get_running_loop()
    outbox.add(0, "0")
    assert (await outbox.take()).token_ids == [0]
    began = loop.time()
    taking = asyncio.ensure_future(outbox.take())
    for token in range(1, 4):
        outbox.add(token, str(token))
        await asyncio.sleep(0.001)
    assert not taking.done()
    assert (await taking).token_ids == [1, 2, 3]
    assert loop.time() - began >= 0.045
    outbox.gather(600)
    outbox.add(4, "4")
    await outbox.take()
    outbox.add(5, "5")
    outbox.end(ENDING)
    last = await asyncio.wait_for(outbox.take(), 10)
    assert (last.token_ids, last.ending) == ([5], ENDING)


async def test_a_delta_that_gathers_is_no_silence() -> None:
    """Progress is told of requests about which there is nothing else to tell."""
    outbox = Outbox()
    outbox.gather(600)
    outbox.add(0, "0")
    await outbox.take()
    outbox.alive(1)
    outbox.add(1, "1")
    outbox.alive(1)
    taking = asyncio.ensure_future(outbox.take())
    await asyncio.sleep(0)
    assert not taking.done()
    outbox.alive(1)
    assert (await taking).token_ids == [1]


async def test_calls_posted_while_the_loop_is_busy_cost_one_wake_up() -> None:
    """Order is kept, and the loop is woken once for all of them."""

    class Counting:
        def __init__(self) -> None:
            self.wakes = 0
            self.loop = asyncio.get_running_loop()

        def call_soon_threadsafe(self, call: object) -> None:
            self.wakes += 1
            self.loop.call_soon(call)  # type: ignore[arg-type]

    loop, seen = Counting(), list[int]()
    mailbox = Mailbox(loop)  # type: ignore[arg-type]
    for value in range(10):
        mailbox.post(seen.append, value)
        mailbox.flush()
    await asyncio.sleep(0)
    assert seen == list(range(10))
    assert loop.wakes == 1
    mailbox.post(seen.append, 10)
    mailbox.flush()
    await asyncio.sleep(0)
    assert seen[-1] == 10


async def test_posting_to_a_closed_loop_is_harmless() -> None:
    """At the end of the process the decode thread may outlive the loop."""
    loop = asyncio.new_event_loop()
    loop.close()
    mailbox = Mailbox(loop)
    mailbox.post(print, "never")
    mailbox.flush()


def test_a_rate_is_growth_over_its_window() -> None:
    """Sampled more often than its window, the rate stays; sampled later, it is the growth per second."""
    rate = Rate()
    assert rate.sample(10.0, 100) == 0
    assert rate.sample(10.5, 150) == 0
    assert rate.sample(12.0, 300) == 100
    assert rate.sample(12.5, 900) == 100
