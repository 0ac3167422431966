"""From values of the core to the messages of the contract."""

from __future__ import annotations

import struct
from typing import Final

from caravan.cache.v1 import cache_service_pb2 as pb
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from services.cache.core import Core, Counters
from services.cache.effects import Change, Drop, Settle
from services.cache.lookup import Found
from services.cache.places import Place
from services.cache.rows import Copy, Row
from services.cache.siblings import TOKEN_BYTES

_BLOCKS_TAG: Final = b"\x12"
"""Field 2 of AcquireResponse, `blocks`, with its length before it."""
_LENGTHS_MAX: Final = 1_024


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


_LENGTHS: Final = tuple(_BLOCKS_TAG + _varint(number) for number in range(_LENGTHS_MAX))
"""What stands before a block of so many bytes. Ids and addresses are bounded, so no block is longer."""


def to_acquire_response(found: Found) -> bytes:
    """A chain, as a serialized AcquireResponse: building 128 messages to serialize them would take most of the call.

    Its blocks and places are kept as they are sent. Serialized messages of one type can be joined: the block of one and the
    place of the other make one Copy, and what is not a block stands before the blocks.
    """
    response = pb.AcquireResponse(
        claim_id=found.claim_id, pending_key=found.pending, parts_follow=found.parts_follow
    )
    if found.partial is not None:
        row = found.partial.copy.row
        response.partial.MergeFromString(row.wire + found.partial.reach.wire)
        tokens = struct.unpack(f">{len(row.tokens) // TOKEN_BYTES}I", row.tokens)
        response.partial.block.tokens.extend(tokens)
        response.partial_tokens = found.partial.matched
    parts = [response.SerializeToString()]
    for copy, reach in zip(found.copies, found.reaches, strict=True):
        block, place = copy.row.wire, reach.wire
        parts += (_LENGTHS[len(block) + len(place)], block, place)
    return b"".join(parts)


def to_duration(seconds: float) -> Duration:
    """Seconds, not below zero, as a Duration of whole microseconds."""
    duration = Duration()
    duration.FromMicroseconds(max(0, round(seconds * 1e6)))
    return duration


def to_timestamp(wall: float) -> Timestamp:
    """Seconds since the epoch as a Timestamp of whole microseconds."""
    timestamp = Timestamp()
    timestamp.FromMicroseconds(round(wall * 1e6))
    return timestamp


def to_drop(drop: Drop) -> pb.JoinResponse:
    """A command to delete copies."""
    return pb.JoinResponse(drop=pb.Drop(root_id=drop.place.root_id, keys=drop.keys))


def to_settle(settle: Settle) -> pb.JoinResponse:
    """A command to look at a file."""
    return pb.JoinResponse(settle=pb.Settle(root_id=settle.place.root_id, key=settle.key))


def to_change(change: Change) -> pb.WatchResponse:
    """What happened to a copy."""
    copy = change.copy
    place = copy.place
    message = pb.CopyChange(
        key=copy.row.key,
        parent_key=copy.row.parent,
        end=copy.row.end,
        tier=place.tier.value,
        root_id=place.root_id,
        # The session of an engine that went has left its RAM already when the change is told.
        engine_ids=[place.engine_id]
        if place.engine_id
        else [session.engine_id for session in place.readers],
    )
    if change.published:
        return pb.WatchResponse(published=message)
    return pb.WatchResponse(evicted=message)


def to_dump(row: Row, now: float, wall: float) -> pb.DumpResponse:
    """A row. `now` (monotonic) and `wall` are the same moment: times are kept in the former and shown in the latter."""
    response = pb.DumpResponse(block=pb.Copy.FromString(row.wire).block)
    response.block.hits += row.uses
    response.copies.extend(_to_copy_info(copy, now, wall) for copy in row.copies)
    return response


def _to_copy_info(copy: Copy, now: float, wall: float) -> pb.CopyInfo:
    return pb.CopyInfo(
        tier=copy.place.tier.value,
        root_id=copy.place.root_id,
        engine_id=copy.place.engine_id,
        state=copy.state.value,
        claims=copy.claims,
        last_used=to_timestamp(wall - now + copy.last_used),
    )


def to_stats(core: Core) -> pb.GetStatsResponse:
    """Counters and sizes."""
    counters: Counters = core.counters
    return pb.GetStatsResponse(
        rows=len(core.index),
        claims=sum(len(session.claims) for session in core.sessions),
        reservations=len(core.reservations),
        waiters=len(core.waiters),
        sessions=len(core.sessions),
        places=[_to_place(place) for place in core.places],
        acquires=counters.acquires,
        blocks_wanted=counters.blocks_wanted,
        blocks_found=counters.blocks_found,
        partial_hits=counters.partial_hits,
        saves=sum(counters.saves),
        duplicates=counters.duplicates,
        refused=counters.refused,
        evictions=counters.evictions,
        evicted_bytes=counters.evicted_bytes,
        corrupt=counters.corrupt,
        adopted=counters.adopted,
    )


def _to_place(place: Place) -> pb.PlaceStats:
    return pb.PlaceStats(
        tier=place.tier.value,
        root_id=place.root_id,
        engine_id=place.engine_id,
        copies=len(place.copies),
        bytes=place.ledger.held,
        quota_bytes=place.ledger.quota,
        engines=len(place.readers),
    )
