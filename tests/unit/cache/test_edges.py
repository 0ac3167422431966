"""The small parts at the edge: outboxes, pages of keys, what Acquire sends, claims, garbage."""

from __future__ import annotations

import asyncio
import gc

import pytest
from caravan.cache.v1 import cache_service_pb2 as pb

from services.cache import checks, messages
from services.cache.claims import Claim, Claims
from services.cache.core import Limits
from services.cache.dump import key_pages
from services.cache.index import Index
from services.cache.lookup import Found
from services.cache.outbox import Outbox
from services.cache.places import Place, address_reach, root_reach
from services.cache.rows import Copy, CopyState, Row, Tier
from services.cache.sessions import RootDeclaration
from services.cache.state import CacheState
from services.runtime.errors import CaravanError
from tests.support.cache import block, key
from tests.support.cache_values import disk, facts, registration


async def test_an_outbox_keeps_the_order_and_its_bound() -> None:
    """Messages come out in order; one too many is refused; what waits at the close is dropped."""
    box: Outbox[int] = Outbox(2)
    assert [box.put(n) for n in range(3)] == [True, True, False]
    assert await anext(box) == 0
    box.close(CaravanError("DRAINING", "over"))
    box.close()
    assert box.put(9)
    with pytest.raises(CaravanError, match="over"):
        await anext(box)


async def test_an_outbox_wakes_its_reader() -> None:
    """A reader that waits gets what comes, and the end."""
    box: Outbox[int] = Outbox(2)
    reading = asyncio.create_task(_all(box))
    await asyncio.sleep(0)
    box.put(1)
    await asyncio.sleep(0)
    box.close()
    assert await reading == [1]


async def _all(box: Outbox[int]) -> list[int]:
    return [message async for message in box]


@pytest.mark.parametrize("limit", [0, 1, 7, 5000])
@pytest.mark.parametrize("prefix", [b"", key(3)[:1], key(3)])
def test_pages_are_a_sorted_listing(limit: int, prefix: bytes) -> None:
    """All pages together are what sorting at once would give."""
    index, place = Index(), Place(Tier.DISK, 9999, root_id="disk")
    for number in range(5000):
        index.add(facts(number), place, CopyState.AVAILABLE, seen=1, size=1, now=0)
    listed = [name for page in key_pages(index, prefix, limit) for name in page]
    expected = sorted(name for name in index.rows if name.startswith(prefix))
    assert listed == expected[: limit or None]


def test_acquire_sends_what_the_block_and_the_place_are() -> None:
    """The joined bytes are the message that building it field by field gives, at all lengths of names."""
    for root_id, address in (("d", "h:1"), ("d" * 64, "a" * 120 + ":65535")):
        told = block("a", "p", start=2**31, size=2**62, hits=2**31)
        told.created.FromMilliseconds(1_790_000_000_123)
        row = Row(checks.to_facts("block", told), told.parent_key)
        place = Place(Tier.DISK, 1, root_id=root_id)
        copy = Copy(row, place, 1, CopyState.AVAILABLE, seen=1, now=0)
        reaches = [root_reach(Tier.DISK, root_id), address_reach(Tier.RAM, address)]
        sent = messages.to_acquire_response(Found("c", [copy, copy], reaches, None, b""))
        response = pb.AcquireResponse.FromString(sent)
        assert response == pb.AcquireResponse(
            claim_id="c",
            blocks=[
                pb.Copy(block=told, tier=pb.TIER_DISK, root_id=root_id),
                pb.Copy(block=told, tier=pb.TIER_RAM, address=address),
            ],
        )


def test_tokens_are_kept_apart_from_the_block() -> None:
    """What Acquire sends of a chain holds no tokens; the order of tokens is that of their bytes."""
    told = block("a", tokens=[1, 256, 2**32 - 1])
    taken = checks.to_facts("block", told)
    assert taken.tokens == bytes.fromhex("0000000100000100ffffffff")
    assert not pb.Copy.FromString(taken.wire).block.tokens
    assert len(told.tokens) == 3


def test_a_claim_is_given_back_once() -> None:
    """The second release finds nothing; old claims are taken oldest first."""
    claims = Claims()
    for number in range(3):
        claims.add(str(number), Claim((), float(number)))
    assert claims.remove("1") is not None
    assert claims.remove("1") is None
    assert [claim.since for claim in claims.remove_until(0.5)] == [0.0]
    assert len(claims) == 1


def test_the_dead_are_freed_without_the_collector() -> None:
    """Rows, copies and places of RAM form no cycles once they are gone: the process freezes them (see __main__)."""
    gc.collect()
    gc.disable()
    try:
        state = CacheState(Limits())
        for life in range(3):
            root = RootDeclaration("disk", Tier.DISK, 1000, writable=True)
            session, _ = state.join(registration("e", root), session_id=str(life), now=0.0)
            state.take_inventory(session, disk(session), [], complete=True, now=0.0)
            added = [facts((life, number)) for number in range(200)]
            state.change_ram(session, added, [added[0].key], 0.0)
            for number in range(50):
                token = str((life, number))
                state.reserve(session.session_id, "disk", facts(number), token=token, now=0.0)
                state.announce(session.session_id, token, facts(number), 0.0)
            state.acquire(session.session_id, key(7), 0, b"", b"", claim_id="c", now=0.0)
            state.evict(10, frozenset(), "disk")
        state.end_session(session.session_id, 0.0)
        alive = len(state.core.index)
        assert alive == 50
        del session, _
        counted = [
            sum(isinstance(o, kind) for o in gc.get_objects()) for kind in (Row, Copy, Place)
        ]
        assert counted == [alive, alive, 1]
    finally:
        gc.enable()
