"""What this engine holds: its roots and its RAM, as the session with the cache service needs them. Blocking, except the RAM."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from caravan.cache.v1 import cache_service_pb2 as pb

from services.engine.kv.kvc import KvcError
from services.engine.kv.ram import RamEntry, RamTier
from services.engine.kv.root import Root, RootError
from services.engine.kv.rows import chain_by_chain, row_of_head, row_of_meta, row_of_ram

_LOG = logging.getLogger(__name__)
INVENTORY_ROWS: Final = 256
"""Rows of one inventory message: at most about 2.5 MB where all hold tokens."""


@dataclass(frozen=True)
class MountedRoot:
    """A root with what was configured for it."""

    root: Root
    tier: pb.Tier.ValueType
    quota_bytes: int

    def to_proto(self) -> pb.Root:
        """As it is registered."""
        return pb.Root(
            root_id=self.root.root_id,
            tier=self.tier,
            quota_bytes=self.quota_bytes,
            writable=self.root.writable,
        )


class Holdings:
    """Roots by id, fastest first, and the RAM tier. `on_dropped` is told, on any thread, what leaves a root."""

    def __init__(
        self,
        roots: Sequence[MountedRoot],
        ram: RamTier,
        on_dropped: Callable[[Sequence[bytes]], None] = lambda _: None,
    ) -> None:
        self._on_dropped = on_dropped
        self.roots: Mapping[str, MountedRoot] = {mounted.root.root_id: mounted for mounted in roots}
        self.ram = ram

    def inventory(self, root_id: str) -> Iterator[list[pb.Block]]:
        """The rows of a root in parts. Raises RootError.

        Chains that were saved at the same time are told one by one: so the rows of each lie together in the memory of the
        cache service, which spares a lookup a third of its time.
        """
        rows = (row_of_head(head) for head in self.roots[root_id].root.scan())
        while part := list(itertools.islice(rows, INVENTORY_ROWS)):
            yield chain_by_chain(part)

    def drop(self, root_id: str, keys: Sequence[bytes]) -> list[bytes]:
        """Deletes blocks; returns those that are gone now. An empty root id means the RAM."""
        if not root_id:
            self.ram.drop(keys)
            return list(keys)
        mounted = self.roots.get(root_id)
        if mounted is None:
            return []
        self._on_dropped(keys)
        gone = []
        for key in keys:
            try:
                mounted.root.delete(key)
            except RootError as error:
                _LOG.warning("cannot delete %s: %s", key.hex(), error)
            else:
                gone.append(key)
        return gone

    def settle(self, root_id: str, key: bytes) -> pb.Block | None:
        """The row of a file whose writer was lost, if it passes all checks; one that does not is deleted."""
        mounted = self.roots.get(root_id)
        if mounted is None:
            return None
        try:
            block = mounted.root.read_whole(key)
            return row_of_meta(block.meta, block.file_bytes)
        except FileNotFoundError:
            return None
        except (OSError, KvcError) as error:
            _LOG.warning("the file of a lost writer is deleted: %s: %s", key.hex(), error)
            self.drop(root_id, [key])
            return None


def ram_rows(entries: Sequence[RamEntry]) -> list[pb.Block]:
    """The rows of blocks in RAM."""
    return [row_of_ram(entry.block, entry.created, entry.bytes) for entry in entries]
