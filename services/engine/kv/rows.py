"""Blocks as the cache service knows them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from caravan.cache.v1 import cache_service_pb2 as pb

from services.engine.kv.keys import Namespace, decode_tokens, encode_tokens
from services.engine.kv.kvc import BlockMeta, Head
from services.engine.kv.store import SavedBlock


def row_of_meta(meta: BlockMeta, size_bytes: int) -> pb.Block:
    """The row of a file; its tokens only where it may be used in part."""
    row = pb.Block(
        key=meta.key,
        parent_key=meta.parent,
        start=meta.start,
        end=meta.end,
        size_bytes=size_bytes,
        save_reason=pb.SaveReason.ValueType(meta.reason),
        tokens=decode_tokens(meta.token_bytes) if meta.partial else (),
        hits=meta.hits,
    )
    row.created.seconds = meta.created
    return row


def row_of_head(head: Head) -> pb.Block:
    """The row of a file whose metadata was read."""
    return row_of_meta(head.meta, head.file_bytes)


def row_of_ram(block: SavedBlock, created: float, size_bytes: int) -> pb.Block:
    """The row of a block in RAM."""
    tokens: Sequence[int] = block.tokens if block.partial else ()
    row = pb.Block(
        key=block.key,
        parent_key=block.parent,
        start=block.start,
        end=block.end,
        size_bytes=size_bytes,
        save_reason=pb.SaveReason.ValueType(block.reason),
        tokens=tokens,
    )
    row.created.seconds = int(created)
    return row


def chain_by_chain(rows: Sequence[pb.Block]) -> list[pb.Block]:
    """The same rows, those of each chain together and from its beginning on; where chains fork, both branches are one."""
    chain_of: dict[bytes, int] = {}
    for number, row in enumerate(sorted(rows, key=_start)):
        chain_of[row.key] = chain_of.get(row.parent_key, number)
    return sorted(rows, key=lambda row: (chain_of[row.key], row.start))


def _start(row: pb.Block) -> int:
    return row.start


def meta_of(block: SavedBlock, namespace: Namespace, created: float) -> BlockMeta:
    """What a file of the block says."""
    return BlockMeta(
        key=block.key,
        parent=block.parent,
        namespace=namespace,
        start=block.start,
        end=block.end,
        token_bytes=encode_tokens(block.tokens),
        partial=block.partial,
        reason=block.reason,
        created=int(created),
        whole=block.whole,
    )


def block_of(meta: BlockMeta, state: memoryview) -> SavedBlock:
    """A block that was read from a file."""
    return SavedBlock(
        key=meta.key,
        parent=meta.parent,
        start=meta.start,
        end=meta.end,
        tokens=decode_tokens(meta.token_bytes),
        partial=meta.partial,
        reason=meta.reason,
        state=state,
        whole=meta.whole,
    )
