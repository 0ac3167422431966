"""The order in which rows are told."""

from __future__ import annotations

from caravan.cache.v1 import cache_service_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from services.engine.kv.rows import chain_by_chain

ROOT = b"root"


def row(chain: int, place: int) -> pb.Block:
    """A block of 256 tokens, of a chain of its own."""
    parent = f"{chain}.{place - 1}".encode() if place else ROOT
    key = f"{chain}.{place}".encode()
    return pb.Block(key=key, parent_key=parent, start=256 * place, end=256 * (place + 1))


@given(st.permutations([row(chain, place) for chain in range(4) for place in range(6)]))
def test_chains_come_one_by_one(rows: list[pb.Block]) -> None:
    """Whatever the order of their files was."""
    told = [block.key.decode() for block in chain_by_chain(rows)]
    first = [key.split(".")[0] for key in told[::6]]
    assert sorted(first) == ["0", "1", "2", "3"]
    assert told == [f"{chain}.{place}" for chain in first for place in range(6)]


@given(
    st.lists(
        st.builds(
            pb.Block,
            key=st.sampled_from([b"a", b"b", b"c", b"d"]),
            parent_key=st.sampled_from([b"a", b"b", b"c", b"d", ROOT]),
            start=st.integers(0, 5),
        )
    )
)
def test_no_row_is_lost(rows: list[pb.Block]) -> None:
    """Not where chains begin in another part, fork, or make no sense."""
    told = chain_by_chain(rows)
    assert sorted(map(_text, told)) == sorted(map(_text, rows))


def _text(block: pb.Block) -> bytes:
    return block.SerializeToString(deterministic=True)
