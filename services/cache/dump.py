"""The rows in the order of their keys, in pages, without holding the event loop for the time of sorting a million keys."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import nsmallest
from typing import Final

from services.cache.index import Index

PAGE: Final = 4_096
"""Keys that one step looks at."""


def key_pages(index: Index, prefix: bytes, limit: int) -> Iterator[list[bytes]]:
    """Keys with a prefix, in order, in pages (some of them empty); at most `limit`, or all for 0.

    The keys are those of the moment of the first page. Other work may be done between pages. Keys are hashes, so one pass
    spreads them evenly over buckets that are each sorted at once.
    """
    keys = list(index.rows)
    buckets: list[list[bytes]] = [[] for _ in range(256)]
    depth = len(prefix)
    for at in range(0, len(keys), PAGE):
        for key in keys[at : at + PAGE]:
            if key.startswith(prefix):
                buckets[key[depth] if depth < len(key) else 0].append(key)
        yield []
    left = limit or len(keys)
    for bucket in buckets:
        page = nsmallest(left, bucket) if left < len(bucket) else sorted(bucket)
        left -= len(page)
        yield page
        if left <= 0:
            return
