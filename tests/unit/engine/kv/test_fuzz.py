"""Ten thousand broken files: never a crash, never a state that is not exactly the one that was saved."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.engine.kv import block_file, kvc
from services.engine.kv.block_file import LoadedBlock
from services.engine.kv.checksum import crc32c
from services.engine.kv.fetch import _Incoming
from services.engine.kv.kvc import Expected, KvcError
from services.engine.kv.rows import meta_of
from tests.support.kv import NAMESPACE, chain_of, prompt_of

ROUNDS = 2_500
Mutation = Callable[[random.Random, bytearray], bytes]


def file_of(seed: int) -> tuple[Expected, bytes, bytes]:
    """What is expected, a valid file, and its state."""
    block = chain_of(prompt_of(seed, 40), state_bytes=1_500)[0]
    meta = meta_of(block, NAMESPACE, 1_700_000_000)
    expected = Expected(meta.key, meta.parent, meta.namespace, meta.start, meta.token_bytes)
    return expected, kvc.seal(meta, block.state) + bytes(block.state), bytes(block.state)


EXPECTED, FILE, STATE = file_of(1)
FOREIGN = [file_of(seed)[1] for seed in range(2, 6)]
PREFIX = len(FILE) - len(STATE)


def flip_bits(rng: random.Random, data: bytearray) -> bytes:
    for _ in range(rng.randint(1, 8)):
        position = rng.randrange(len(data) * 8)
        data[position // 8] ^= 1 << position % 8
    return bytes(data)


def cut_or_extend(rng: random.Random, data: bytearray) -> bytes:
    if rng.random() < 0.7:
        return bytes(data[: rng.randrange(len(data))])
    return bytes(data) + rng.randbytes(rng.randint(1, 300))


def swap_ranges(rng: random.Random, data: bytearray) -> bytes:
    length = rng.randint(1, 64)
    one, other = (rng.randrange(len(data) - length) for _ in range(2))
    data[one : one + length], data[other : other + length] = (
        data[other : other + length],
        data[one : one + length],
    )
    return bytes(data)


def splice_a_foreign_file(rng: random.Random, data: bytearray) -> bytes:
    foreign = rng.choice(FOREIGN)
    begin, end = sorted(rng.randrange(len(data)) for _ in range(2))
    data[begin:end] = foreign[begin : max(begin, end + rng.choice((0, 0, -1, 7)))]
    return bytes(data)


def forge_the_header(rng: random.Random, data: bytearray) -> bytes:
    """Hostile numbers under a checksum that holds."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(4, PREFIX - 8)
        value = rng.choice((0, 1, 255, 2**31, 2**32 - 1, rng.getrandbits(32)))
        data[at : at + 4] = struct.pack("<I", value)
    section = struct.unpack_from("<I", data, 20)[0]
    prefix = bytearray(data[: 48 + section])
    prefix[12:16] = prefix[44:48] = bytes(4)
    data[44:48] = struct.pack("<I", crc32c(bytes(prefix)))
    return bytes(data)


def read_file(descriptor: int, data: bytes) -> LoadedBlock:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, data, 0)
    return block_file.read_block(Path(f"/proc/self/fd/{descriptor}"), EXPECTED)


@pytest.fixture
def memory_file() -> Iterator[int]:
    """A file in memory: twelve thousand on a disk would take a minute."""
    descriptor = os.memfd_create("block")
    yield descriptor
    os.close(descriptor)


def receive(rng: random.Random, data: bytes) -> LoadedBlock:
    """The same bytes as another engine would send them, in pieces of any size."""
    incoming = _Incoming(EXPECTED)
    at = 0
    while at < len(data):
        size = rng.choice((1, 40, 1_000, 9_000))
        incoming.feed(data[at : at + size], last=at + size >= len(data))
        at += size
    return incoming.finish()


@pytest.mark.parametrize(
    ("name", "mutate"),
    [
        ("flips", flip_bits),
        ("lengths", cut_or_extend),
        ("swaps", swap_ranges),
        ("splices", splice_a_foreign_file),
        ("forgeries", forge_the_header),
    ],
)
def test_broken_files(memory_file: int, mutate: Mutation, name: str) -> None:
    rng = random.Random(name)
    refused = 0
    for _ in range(ROUNDS):
        data = mutate(rng, bytearray(FILE))
        for fetched in (False, True):
            try:
                block = receive(rng, data) if fetched else read_file(memory_file, data)
            except KvcError:
                refused += 1
                continue
            assert bytes(block.state) == STATE
            EXPECTED.check(block.meta)
    assert refused > ROUNDS  # Most of what was done to the file was damage.


def test_the_whole_file_is_read_and_received() -> None:
    assert bytes(receive(random.Random(1), FILE).state) == STATE
