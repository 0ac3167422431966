"""KVC version 2, the format of a block's file (S2.6-S2.12, W42). Pure; little-endian throughout.

```
offset  size  field
     0     3  magic "KVC"
     3     1  version: 2
     4     1  quant byte (quant.py)
     5     1  save reason (S2.9)
     6     2  flags: bit 0: the block may be used in part; bit 1: a state that cannot be cut; the others are 0
     8     4  start: position of the block's first token
    12     4  hits, counted in place while the file lives; the header checksum takes them for 0
    16     4  end: position after its last token
    20     4  bytes of the TLV section
    24     8  creation time, seconds since the Unix epoch
    32     8  bytes of the payload
    40     4  CRC32C of the payload
    44     4  CRC32C of all before the payload, with hits and this field taken for 0
    48     .  TLV section: records of tag (1), length (4), value
     .     .  payload, to the end of the file
```

TLVs: 01 fingerprint (32), 03 quant (1), 04 context hash (32), 09 tokens [start, end) as u32, 0A key (32), 0B parent key (32);
each exactly once. Unknown tags are ignored. Left out of version 1: the prompt's text and the hostname, which tell more than a
cache needs, and the token count, which `end` gives.

A state that cannot be cut starts at 0 and stands for all tokens [0, end); its file names only the last of them, as many as a
block has at most, and its parent is the empty prefix.

The key covers tokens [0, end), the file holds [start, end): so the key is bound by the header checksum, the file's name, the
parent key, and the reader's comparison of the tokens with those of its prompt.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from services.engine.kv.checksum import crc32c
from services.engine.kv.keys import BLOCK_TOKENS, KEY_BYTES, TOKEN_BYTES, Namespace
from services.engine.kv.quant import KNOWN_BYTES
from services.engine.kv.store import SaveReason

VERSION: Final = 2
BLOCK_TOKENS_MAX: Final = 1024
"""Most tokens of a block."""
PREFIX_BYTES_MAX: Final = 8192
"""Most bytes before the payload: one read of this size has all metadata (W43)."""
HITS_OFFSET: Final = 12
_PARTIAL: Final = 1
_WHOLE: Final = 2
_HEADER: Final = struct.Struct("<3sBBBHIIIIQQII")
_CRC_OFFSET: Final = 44
_RECORD: Final = struct.Struct("<BI")
_FINGERPRINT, _QUANT, _CONTEXT, _TOKENS, _KEY, _PARENT = 0x01, 0x03, 0x04, 0x09, 0x0A, 0x0B
_LENGTHS: Final = {
    _FINGERPRINT: KEY_BYTES,
    _QUANT: 1,
    _CONTEXT: KEY_BYTES,
    _KEY: KEY_BYTES,
    _PARENT: KEY_BYTES,
}
_REQUIRED: Final = frozenset({*_LENGTHS, _TOKENS})
_REASONS: Final = frozenset(SaveReason)
assert _HEADER.size == 48


class Flaw(Enum):
    """What is wrong with a file (S2.12)."""

    BAD_HEADER = "bad_header"
    UNSUPPORTED_VERSION = "unsupported_version"
    HEADER_CRC_MISMATCH = "header_crc_mismatch"
    BAD_TLV = "bad_tlv"
    MISSING_TLV = "missing_tlv"
    UNKNOWN_QUANT_BYTE = "unknown_quant_byte"
    UNKNOWN_SAVE_REASON = "unknown_save_reason"
    MALFORMED = "malformed"
    TRUNCATED = "truncated"
    TRAILING_BYTES = "trailing_bytes"
    CRC_MISMATCH = "crc_mismatch"
    KEY_MISMATCH = "key_mismatch"
    PARENT_MISMATCH = "parent_mismatch"
    NAMESPACE_MISMATCH = "namespace_mismatch"
    TOKENS_MISMATCH = "tokens_mismatch"


class KvcError(ValueError):
    """A file is not what it should be; `flaw` says how."""

    def __init__(self, flaw: Flaw, detail: str = "") -> None:
        super().__init__(f"{flaw.value}: {detail}" if detail else flaw.value)
        self.flaw = flaw


@dataclass(frozen=True, slots=True)
class BlockMeta:
    """What a file says of its block.

    `token_bytes` are the tokens [start, end) as u32 little-endian, of a `whole` state only the last of them; `created` is in
    seconds since the Unix epoch; `hits` says how often the file was read.
    """

    key: bytes
    parent: bytes
    namespace: Namespace
    start: int
    end: int
    token_bytes: bytes
    partial: bool
    reason: SaveReason
    created: int
    hits: int = 0
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Head:
    """A parsed prefix: the block, and where its payload lies."""

    meta: BlockMeta
    payload_offset: int
    payload_bytes: int
    payload_crc: int

    @property
    def file_bytes(self) -> int:
        """The size that the file must have."""
        return self.payload_offset + self.payload_bytes


@dataclass(frozen=True, slots=True)
class Expected:
    """What a reader needs a block to be. `token_bytes` is None where the block may differ from the prompt in part."""

    key: bytes
    parent: bytes
    namespace: Namespace
    start: int
    token_bytes: bytes | None
    whole: bool = False

    def check(self, meta: BlockMeta) -> None:
        """Raises KvcError where the block is another one."""
        if meta.key != self.key:
            raise KvcError(Flaw.KEY_MISMATCH)
        if (meta.parent, meta.start, meta.whole) != (self.parent, self.start, self.whole):
            raise KvcError(Flaw.PARENT_MISMATCH)
        if meta.namespace != self.namespace:
            raise KvcError(Flaw.NAMESPACE_MISMATCH)
        if self.token_bytes is not None and meta.token_bytes != self.token_bytes:
            raise KvcError(Flaw.TOKENS_MISMATCH)


def build(meta: BlockMeta, payload_bytes: int, payload_crc: int) -> bytes:
    """The prefix of a file; the payload follows it and is never copied together with it (S2.11)."""
    namespace = meta.namespace
    section = b"".join(
        _RECORD.pack(tag, len(value)) + value
        for tag, value in (
            (_FINGERPRINT, namespace.fingerprint),
            (_QUANT, bytes((namespace.quant,))),
            (_CONTEXT, namespace.context_hash),
            (_TOKENS, meta.token_bytes),
            (_KEY, meta.key),
            (_PARENT, meta.parent),
        )
    )
    fields = (
        *(b"KVC", VERSION, namespace.quant, meta.reason),
        _PARTIAL * meta.partial | _WHOLE * meta.whole,
        *(meta.start, meta.hits, meta.end, len(section)),
        *(meta.created, payload_bytes, payload_crc),
    )
    unsealed = _HEADER.pack(*fields, 0) + section
    return _HEADER.pack(*fields, _prefix_crc(unsealed)) + section


def prefix_bytes(meta: BlockMeta) -> int:
    """Bytes before the payload of a block's file."""
    fixed = sum(_LENGTHS.values()) + _RECORD.size * len(_REQUIRED)
    return _HEADER.size + fixed + len(meta.token_bytes)


def parse(head: bytes) -> Head:
    """Parses a file's first bytes: all of the prefix; more does no harm. Raises KvcError. The payload is not checked."""
    if len(head) < _HEADER.size:
        raise KvcError(Flaw.TRUNCATED if head[:3] == b"KVC"[: len(head)] else Flaw.BAD_HEADER)
    magic, version, quant, reason, flags, start, hits, end, section_bytes, *rest = _HEADER.unpack(
        head[: _HEADER.size]
    )
    created, payload_bytes, payload_crc, prefix_crc = rest
    if magic != b"KVC":
        raise KvcError(Flaw.BAD_HEADER, "magic")
    if version != VERSION:
        raise KvcError(Flaw.UNSUPPORTED_VERSION, str(version))
    offset = _HEADER.size + section_bytes
    if offset > PREFIX_BYTES_MAX:
        raise KvcError(Flaw.BAD_HEADER, "TLV section too long")
    if offset > len(head):
        raise KvcError(Flaw.TRUNCATED)
    if _prefix_crc(head[:offset]) != prefix_crc:
        raise KvcError(Flaw.HEADER_CRC_MISMATCH)
    if flags not in {0, _PARTIAL, _WHOLE}:
        raise KvcError(Flaw.BAD_HEADER, "flags")
    if quant not in KNOWN_BYTES:
        raise KvcError(Flaw.UNKNOWN_QUANT_BYTE, str(quant))
    if reason not in _REASONS:
        raise KvcError(Flaw.UNKNOWN_SAVE_REASON, str(reason))
    records = _records(head[_HEADER.size : offset])
    if records[_QUANT][0] != quant:
        raise KvcError(Flaw.MALFORMED, "two quants")
    token_bytes = records[_TOKENS]
    if len(token_bytes) != TOKEN_BYTES * _named_tokens(start, end, whole=flags == _WHOLE):
        raise KvcError(Flaw.MALFORMED, "tokens do not match start and end")
    meta = BlockMeta(
        key=records[_KEY],
        parent=records[_PARENT],
        namespace=Namespace(records[_FINGERPRINT], quant, records[_CONTEXT]),
        start=start,
        end=end,
        token_bytes=token_bytes,
        partial=bool(flags & _PARTIAL),
        reason=SaveReason(reason),
        created=created,
        hits=hits,
        whole=flags == _WHOLE,
    )
    return Head(meta, offset, payload_bytes, payload_crc)


def _named_tokens(start: int, end: int, *, whole: bool) -> int:
    """How many tokens a file names. Raises KvcError where there is no such block."""
    length = end - start
    if whole and start == 0 < end:
        return min(length, BLOCK_TOKENS)
    if whole or not 0 < length <= BLOCK_TOKENS_MAX:
        raise KvcError(Flaw.MALFORMED, "start and end")
    return length


def check_size(head: Head, file_bytes: int) -> None:
    """Raises KvcError where the file is shorter or longer than its header says."""
    if file_bytes < head.file_bytes:
        raise KvcError(Flaw.TRUNCATED, f"{file_bytes} of {head.file_bytes} bytes")
    if file_bytes > head.file_bytes:
        raise KvcError(Flaw.TRAILING_BYTES, f"{file_bytes} for {head.file_bytes} bytes")


def check_payload(head: Head, crc: int) -> None:
    """Raises KvcError where the payload's checksum is another than the header's."""
    if crc != head.payload_crc:
        raise KvcError(Flaw.CRC_MISMATCH, f"expected {head.payload_crc:08x}, found {crc:08x}")


def seal(meta: BlockMeta, payload: memoryview) -> bytes:
    """The prefix for a payload, whose checksum is computed here. The hits start anew."""
    return build(replace(meta, hits=0), len(payload), crc32c(payload))


def _prefix_crc(prefix: bytes) -> int:
    crc = crc32c(prefix[:HITS_OFFSET])
    crc = crc32c(bytes(4), crc)
    crc = crc32c(prefix[HITS_OFFSET + 4 : _CRC_OFFSET], crc)
    crc = crc32c(bytes(4), crc)
    return crc32c(prefix[_HEADER.size :], crc)


def _records(section: bytes) -> dict[int, bytes]:
    """The known records of a TLV section. Raises KvcError."""
    records: dict[int, bytes] = {}
    at = 0
    while at < len(section):
        if at + _RECORD.size > len(section):
            raise KvcError(Flaw.BAD_TLV, "cut off")
        tag, length = _RECORD.unpack_from(section, at)
        at += _RECORD.size
        value = section[at : at + length]
        if len(value) != length:
            raise KvcError(Flaw.BAD_TLV, f"record {tag} is cut off")
        at += length
        if tag not in _REQUIRED:
            continue
        if tag in records or len(value) != _LENGTHS.get(tag, length):
            raise KvcError(Flaw.BAD_TLV, f"record {tag}")
        records[tag] = value
    missing = _REQUIRED - records.keys()
    if missing:
        raise KvcError(Flaw.MISSING_TLV, str(min(missing)))
    return records
