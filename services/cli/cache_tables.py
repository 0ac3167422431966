"""What `caravan cache` prints: tables for people, JSON lines for programs. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from caravan.cache.v1 import cache_service_pb2 as pb

from services.cli.tables import age, aligned, enum_word, share, size

KEY_DIGITS: Final = 12
"""Digits of a key in a table: enough to tell a few million blocks apart."""


def tier_name(tier: pb.Tier.ValueType) -> str:
    """`ram`, `ram_file` or `disk`; a number for a tier that a newer service knows."""
    return enum_word(pb.Tier, "TIER_", tier)


def stats_text(stats: pb.GetStatsResponse) -> str:
    """Where blocks lie, and how often they were of use."""
    head = ("TIER", "PLACE", "COPIES", "BYTES", "QUOTA", "USED", "ENGINES")
    places = "\n".join(aligned([head, *map(_place, stats.places)]))
    found = share(stats.blocks_found, stats.blocks_wanted)
    return f"""\
{places}

blocks    {stats.rows}, {stats.reservations} more being saved, {stats.claims} claims
lookups   {stats.acquires}: {stats.blocks_found} of {stats.blocks_wanted} blocks found ({found}), {stats.partial_hits} more used in part
saves     {stats.saves}, {stats.duplicates} not needed, {stats.refused} without room, {stats.adopted} of lost writers adopted
drops     {stats.evictions} ({size(stats.evicted_bytes)}), {stats.corrupt} corrupt
sessions  {stats.sessions} engines, {stats.waiters} calls that wait for a save"""


def _place(place: pb.PlaceStats) -> tuple[str, ...]:
    return (
        tier_name(place.tier),
        place.root_id or place.engine_id,
        str(place.copies),
        size(place.bytes),
        size(place.quota_bytes),
        share(place.bytes, place.quota_bytes),
        str(place.engines),
    )


def rows_text(rows: Iterable[pb.DumpResponse], now_s: float) -> Iterator[str]:
    """A line for each block; `now_s` is in seconds since the Unix epoch."""
    table = [("KEY", "TOKENS", "WHERE", "SIZE", "HITS", "SAVED", "AGE", "LAST USED")]
    for row in rows:
        block = row.block
        used = max((copy.last_used.ToNanoseconds() for copy in row.copies), default=0) / 1e9
        table.append(
            (
                block.key.hex()[:KEY_DIGITS],
                f"{block.start}-{block.end}",
                ",".join(_where(copy) for copy in sorted(row.copies, key=_speed)),
                size(block.size_bytes),
                str(block.hits),
                enum_word(pb.SaveReason, "SAVE_REASON_", block.save_reason),
                age(now_s - block.created.ToNanoseconds() / 1e9),
                f"{age(now_s - used)} ago" if used else "-",
            )
        )
    return aligned(table)


def _speed(copy: pb.CopyInfo) -> tuple[int, str, str]:
    return copy.tier, copy.root_id, copy.engine_id


def _where(copy: pb.CopyInfo) -> str:
    name = tier_name(copy.tier)
    state = enum_word(pb.CopyState, "COPY_STATE_", copy.state)
    pinned = "*" if copy.claims else ""
    return name + pinned if copy.state == pb.COPY_STATE_AVAILABLE else f"{name}({state})"


def row_object(row: pb.DumpResponse) -> dict[str, Any]:
    """A block for programs; keys are hexadecimal, times in seconds since the Unix epoch."""
    block = row.block
    return {
        "key": block.key.hex(),
        "parent_key": block.parent_key.hex(),
        "start": block.start,
        "end": block.end,
        "size_bytes": block.size_bytes,
        "save_reason": enum_word(pb.SaveReason, "SAVE_REASON_", block.save_reason),
        "hits": block.hits,
        "created": block.created.ToNanoseconds() / 1e9,
        "copies": [
            {
                "tier": tier_name(copy.tier),
                "root_id": copy.root_id,
                "engine_id": copy.engine_id,
                "state": enum_word(pb.CopyState, "COPY_STATE_", copy.state),
                "claims": copy.claims,
                "last_used": copy.last_used.ToNanoseconds() / 1e9,
            }
            for copy in row.copies
        ],
    }
