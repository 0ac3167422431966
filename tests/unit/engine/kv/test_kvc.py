"""The file format: round trips, its layout byte by byte, and every flaw by name (S2.6-S2.12)."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.kv import kvc
from services.engine.kv.checksum import PIECE_BYTES, crc32c
from services.engine.kv.keys import Namespace, encode_tokens
from services.engine.kv.kvc import BlockMeta, Expected, Flaw, KvcError
from services.engine.kv.quant import KNOWN_BYTES
from services.engine.kv.store import SaveReason
from tests.support.kv import NAMESPACE

META = BlockMeta(
    key=b"\x11" * 32,
    parent=b"\x22" * 32,
    namespace=NAMESPACE,
    start=256,
    end=259,
    token_bytes=encode_tokens([5, 6, 7]),
    partial=True,
    reason=SaveReason.FINISH,
    created=1_700_000_000,
    hits=3,
)


def forge(prefix: bytes) -> bytes:
    """The prefix with a checksum that holds: what a hostile writer would make."""
    blank = bytearray(prefix)
    blank[12:16] = blank[44:48] = bytes(4)
    return prefix[:44] + struct.pack("<I", crc32c(bytes(blank))) + prefix[48:]


def flaw_of(prefix: bytes) -> Flaw:
    with pytest.raises(KvcError) as caught:
        kvc.parse(prefix)
    return caught.value.flaw


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"123456789", 0xE3069283),
        (b"", 0),
        (b"\0", 0x527D5351),
        (bytes(32), 0x8A9136AA),
    ],
)
def test_crc32c_vectors(data: bytes, crc: int) -> None:
    assert crc32c(data) == crc
    assert crc32c(memoryview(bytearray(data))) == crc
    assert crc32c(data[4:], crc32c(data[:4])) == crc


def test_a_checksum_of_many_pieces_is_that_of_the_whole() -> None:
    data = bytes(range(256)) * (PIECE_BYTES // 256 * 2 + 1)
    assert crc32c(data) == crc32c(data[100:], crc32c(data[:100]))


@pytest.mark.parametrize(
    ("reason", "number"),
    [
        (SaveReason.UNSPECIFIED, 0),
        (SaveReason.COLD, 1),
        (SaveReason.CONTINUED, 2),
        (SaveReason.EVICT, 3),
        (SaveReason.SHUTDOWN, 4),
        (SaveReason.FINISH, 5),
    ],
)
def test_save_reasons(reason: SaveReason, number: int) -> None:
    prefix = kvc.build(replace(META, reason=reason), 10, 0)
    assert prefix[5] == number
    assert kvc.parse(prefix).meta.reason is reason


def test_the_layout_is_as_documented() -> None:
    prefix = kvc.build(META, 1000, 0xDEADBEEF)
    assert prefix[:8] == b"KVC\x02\x01\x05\x01\x00"
    assert struct.unpack_from("<IIII", prefix, 8) == (256, 3, 259, len(prefix) - 48)
    assert struct.unpack_from("<QQI", prefix, 24) == (1_700_000_000, 1000, 0xDEADBEEF)
    assert prefix[48:53] == b"\x01\x20\x00\x00\x00"
    assert forge(prefix) == prefix
    assert len(prefix) == kvc.prefix_bytes(META)


metas = st.builds(
    lambda key, parent, quant, start, tokens, partial, reason, created, hits: BlockMeta(
        key=key,
        parent=parent,
        namespace=Namespace(key[::-1], quant, parent[::-1]),
        start=start,
        end=start + len(tokens),
        token_bytes=encode_tokens(tokens),
        partial=partial,
        reason=reason,
        created=created,
        hits=hits,
    ),
    st.binary(min_size=32, max_size=32),
    st.binary(min_size=32, max_size=32),
    st.sampled_from(sorted(KNOWN_BYTES)),
    st.integers(0, 2**31),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=1024),
    st.booleans(),
    st.sampled_from(SaveReason),
    st.integers(0, 2**40),
    st.integers(0, 2**32 - 1),
)


@given(metas, st.integers(0, 2**40), st.integers(0, 2**32 - 1), st.binary(max_size=20))
def test_round_trip(meta: BlockMeta, payload_bytes: int, crc: int, rest: bytes) -> None:
    prefix = kvc.build(meta, payload_bytes, crc)
    assert len(prefix) == kvc.prefix_bytes(meta) <= kvc.PREFIX_BYTES_MAX
    head = kvc.parse(prefix + rest)
    assert head.meta == meta
    assert (head.payload_offset, head.payload_bytes) == (len(prefix), payload_bytes)
    assert head.payload_crc == crc


def test_hits_are_counted_in_place() -> None:
    prefix = kvc.build(META, 10, 0)
    touched = prefix[:12] + struct.pack("<I", 99) + prefix[16:]
    assert kvc.parse(touched).meta == replace(META, hits=99)


def test_unknown_tags_are_ignored() -> None:
    prefix = kvc.build(META, 10, 0)
    extra = b"\x77\x05\x00\x00\x00later"
    longer = struct.pack("<I", len(prefix) - 48 + len(extra))
    prefix = forge(prefix[:20] + longer + prefix[24:] + extra)
    assert kvc.parse(prefix).meta == META


def test_every_bit_of_the_prefix_is_covered_but_the_hits() -> None:
    prefix = kvc.build(META, 1000, 7)
    for position in range(len(prefix) * 8):
        flipped = bytearray(prefix)
        flipped[position // 8] ^= 1 << position % 8
        if 12 <= position // 8 < 16:
            assert replace(kvc.parse(bytes(flipped)).meta, hits=3) == META
        else:
            with pytest.raises(KvcError):
                kvc.parse(bytes(flipped))


def whole_meta(end: int, start: int = 0, tokens: int = 256) -> BlockMeta:
    """A state that cannot be cut."""
    return replace(
        META,
        start=start,
        end=end,
        token_bytes=encode_tokens(range(tokens)),
        partial=False,
        whole=True,
    )


def test_a_whole_state_names_only_its_last_tokens() -> None:
    """However long it is; and it is never taken for a block, nor a block for it."""
    for end, tokens in ((1, 1), (256, 256), (257, 256), (2**31, 256)):
        meta = whole_meta(end, tokens=tokens)
        assert kvc.parse(kvc.build(meta, 10, 0)).meta == meta
    for meta in (whole_meta(0, tokens=0), whole_meta(300, 44), whole_meta(256, tokens=255)):
        assert flaw_of(kvc.build(meta, 10, 0)) is Flaw.MALFORMED
    block = replace(whole_meta(256), whole=False)
    for found, wanted in ((block, True), (whole_meta(256), False)):
        expected = Expected(
            found.key, found.parent, found.namespace, 0, found.token_bytes, whole=wanted
        )
        with pytest.raises(KvcError, match="parent_mismatch"):
            expected.check(found)


def change(at: int, value: bytes) -> bytes:
    prefix = kvc.build(META, 10, 0)
    return forge(prefix[:at] + value + prefix[at + len(value) :])


def without(tag: int) -> bytes:
    """The prefix without one record."""
    prefix = kvc.build(META, 10, 0)
    at = 48
    section = b""
    while at < len(prefix):
        length = 5 + struct.unpack_from("<I", prefix, at + 1)[0]
        if prefix[at] != tag:
            section += prefix[at : at + length]
        at += length
    return forge(prefix[:20] + struct.pack("<I", len(section)) + prefix[24:48] + section)


@pytest.mark.parametrize(
    ("prefix", "flaw"),
    [
        (b"", Flaw.TRUNCATED),
        (b"KV", Flaw.TRUNCATED),
        (b"GGUF", Flaw.BAD_HEADER),
        (kvc.build(META, 10, 0)[:47], Flaw.TRUNCATED),
        (kvc.build(META, 10, 0)[:-1], Flaw.TRUNCATED),
        (change(0, b"GGU"), Flaw.BAD_HEADER),
        (change(3, b"\x01"), Flaw.UNSUPPORTED_VERSION),
        (change(3, b"\x03"), Flaw.UNSUPPORTED_VERSION),
        (change(4, b"\x1e"), Flaw.UNKNOWN_QUANT_BYTE),
        (change(4, b"\x02"), Flaw.MALFORMED),
        (change(5, b"\x06"), Flaw.UNKNOWN_SAVE_REASON),
        (change(6, b"\x02"), Flaw.MALFORMED),
        (change(6, b"\x03"), Flaw.BAD_HEADER),
        (change(6, b"\x04"), Flaw.BAD_HEADER),
        (change(8, b"\xff\xff\xff\xff"), Flaw.MALFORMED),
        (change(16, b"\x00\x01\x00\x00"), Flaw.MALFORMED),
        (change(20, b"\xff\xff\xff\xff"), Flaw.BAD_HEADER),
        (change(49, b"\xff\xff\xff\xff"), Flaw.BAD_TLV),
        (change(49, b"\x1f"), Flaw.BAD_TLV),
        (change(48, b"\x0a"), Flaw.BAD_TLV),
        (without(0x01), Flaw.MISSING_TLV),
        (without(0x09), Flaw.MISSING_TLV),
        (without(0x0B), Flaw.MISSING_TLV),
        (kvc.build(META, 10, 0)[:44] + b"\0\0\0\0" + kvc.build(META, 10, 0)[48:], Flaw.HEADER_CRC_MISMATCH),
    ],
)  # fmt: skip
def test_flaws(prefix: bytes, flaw: Flaw) -> None:
    assert flaw_of(prefix) is flaw


def test_sizes() -> None:
    head = kvc.parse(kvc.build(META, 10, 0))
    kvc.check_size(head, head.payload_offset + 10)
    for size, flaw in ((9, Flaw.TRUNCATED), (11, Flaw.TRAILING_BYTES)):
        with pytest.raises(KvcError) as caught:
            kvc.check_size(head, head.payload_offset + size)
        assert caught.value.flaw is flaw


EXPECTED = Expected(META.key, META.parent, META.namespace, META.start, META.token_bytes)


@pytest.mark.parametrize(
    ("expected", "flaw"),
    [
        (EXPECTED, None),
        (replace(EXPECTED, token_bytes=None), None),
        (replace(EXPECTED, key=bytes(32)), Flaw.KEY_MISMATCH),
        (replace(EXPECTED, parent=bytes(32)), Flaw.PARENT_MISMATCH),
        (replace(EXPECTED, start=0), Flaw.PARENT_MISMATCH),
        (replace(EXPECTED, namespace=NAMESPACE.salted(b"x")), Flaw.NAMESPACE_MISMATCH),
        (replace(EXPECTED, token_bytes=encode_tokens([5, 6, 8])), Flaw.TOKENS_MISMATCH),
        (replace(EXPECTED, token_bytes=encode_tokens([5, 6])), Flaw.TOKENS_MISMATCH),
    ],
)
def test_another_block_is_refused(expected: Expected, flaw: Flaw | None) -> None:
    if flaw is None:
        expected.check(META)
    else:
        with pytest.raises(KvcError) as caught:
            expected.check(META)
        assert caught.value.flaw is flaw
