"""Counters of the KV cache of one engine, by the names of S2.42 where it has them."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.engine.kv.store import SaveReason, Source


def _by_source() -> dict[Source, int]:
    return dict.fromkeys(Source, 0)


def _by_reason() -> dict[SaveReason, int]:
    return dict.fromkeys(SaveReason, 0)


@dataclass(slots=True)
class KvStats:
    """Counts since the start. Written on the event loop, except where a field says otherwise; read anywhere."""

    finds: int = 0
    """Calls of find."""
    misses: int = 0
    """Finds that found nothing."""
    blocks_found: dict[Source, int] = field(default_factory=_by_source)
    """Blocks that finds gave, by where they were."""
    partial_hits: int = 0
    """Finds whose last block is used in part or is an answer's end."""
    load_total_ns: int = 0
    """Spent in finds."""
    acquire_failures: int = 0
    """Finds that went on without the cache service: it was down, slow or refused."""
    waits: int = 0
    """Finds that waited for a save in flight."""
    saves: dict[SaveReason, int] = field(default_factory=_by_reason)
    """Files published, by why."""
    saved_bytes: int = 0
    """Their bytes."""
    duplicate_dropped: int = 0
    """Saves that were not needed: the root had the block, or somebody else was saving it."""
    saves_refused: int = 0
    """Saves for which a root had no room within its quota."""
    saves_dropped: int = 0
    """Blocks that were not published: the queue was full or the cache service was down. Under the publisher's lock."""
    saves_failed: int = 0
    """Saves that failed in a root, full, read-only or broken, or were not tried because one just had."""
    saves_expired: int = 0
    """Saves given up because their reservation no longer held."""
    corrupt_files: int = 0
    """Blocks that failed their checks and were withdrawn."""
    missing_files: int = 0
    """Blocks whose file was gone."""
    read_failures: int = 0
    """Blocks that could not be read in time or at all."""
    refused_states: int = 0
    """Blocks that llama.cpp refused."""
