"""Keys of KV blocks (S2.1, S2.5, W37).

The key of a prefix is SHA-256(model fingerprint, 32 bytes | quant byte | context hash, 32 bytes | tokens as u32 little-endian).
SHA-256 is fed from left to right once and copied at each block boundary, so all keys of a prompt cost one pass. Pure.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

BLOCK_TOKENS: Final = 256
"""Tokens of a full block."""
KEY_BYTES: Final = 32
"""Bytes of a key, a fingerprint and a context hash."""
TOKEN_BYTES: Final = 4
"""Bytes of a token wherever tokens are hashed or stored."""
_SALT_DOMAIN: Final = b"caravan context salt\0"
# The C type of array's "I" is an unsigned int: four bytes on every platform that llama.cpp runs on.
assert array("I").itemsize == TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class Namespace:
    """What a KV state depends on besides its tokens: two states with different namespaces never share a key (W46).

    `fingerprint` identifies the model file and its adapters, `quant` is its byte in quant.py's table, and `context_hash`
    covers the shape of the context. Raises ValueError where a size or range is wrong.
    """

    fingerprint: bytes
    quant: int
    context_hash: bytes

    def __post_init__(self) -> None:
        if len(self.fingerprint) != KEY_BYTES or len(self.context_hash) != KEY_BYTES:
            raise ValueError("fingerprint and context hash are 32 bytes each")
        if not 0 <= self.quant <= 255:
            raise ValueError(f"quant {self.quant} is not a byte")

    def salted(self, salt: bytes) -> Namespace:
        """The namespace of one tenant: what it caches is invisible to others. An empty salt changes nothing."""
        if not salt:
            return self
        mixed = hashlib.sha256(_SALT_DOMAIN + self.context_hash + salt).digest()
        return Namespace(self.fingerprint, self.quant, mixed)

    def hasher(self) -> KeyHasher:
        """A hasher that was fed nothing."""
        return KeyHasher(_begin(self), 0)

    def root_key(self) -> bytes:
        """Key of the empty prompt: the parent of every first block."""
        return _begin(self).digest()


def _begin(namespace: Namespace) -> hashlib._Hash:
    return hashlib.sha256(
        namespace.fingerprint + bytes((namespace.quant,)) + namespace.context_hash
    )


class KeyHasher:
    """Keys of a growing prefix, in one pass."""

    __slots__ = ("_hash", "length")

    def __init__(self, state: hashlib._Hash, length: int) -> None:
        self._hash = state
        self.length = length
        """Tokens fed so far."""

    def feed(self, tokens: Sequence[int]) -> None:
        """Appends tokens. Raises ValueError where one is outside [0, 2^32); nothing is fed then."""
        self._hash.update(encode_tokens(tokens))
        self.length += len(tokens)

    def key(self) -> bytes:
        """Key of all tokens fed so far, 32 bytes."""
        return self._hash.digest()

    def copy(self) -> KeyHasher:
        """An independent hasher with the same past."""
        return KeyHasher(self._hash.copy(), self.length)


def encode_tokens(tokens: Sequence[int]) -> bytes:
    """Tokens as u32 little-endian. Raises ValueError where one is outside [0, 2^32)."""
    try:
        words = array("I", tokens)
    except OverflowError as error:
        raise ValueError("a token is outside [0, 2^32)") from error
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def decode_tokens(data: bytes | memoryview) -> tuple[int, ...]:
    """Tokens from u32 little-endian. Raises ValueError where the length is no multiple of four."""
    if len(data) % TOKEN_BYTES:
        raise ValueError(f"{len(data)} bytes are not whole tokens")
    words = array("I")
    words.frombytes(data)
    if sys.byteorder == "big":
        words.byteswap()
    return tuple(words)


def prefix_keys(namespace: Namespace, tokens: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    """Keys of the first `lengths` tokens, which ascend, in one pass."""
    hasher = namespace.hasher()
    keys = []
    for length in lengths:
        hasher.feed(tokens[hasher.length : length])
        keys.append(hasher.key())
    return keys


def block_keys(namespace: Namespace, tokens: Sequence[int]) -> list[bytes]:
    """Keys at 256, 512, ... tokens, up to the length of `tokens`."""
    # Encoded once and hashed through views: slicing the sequence per block would cost as much as the hashing.
    data = memoryview(encode_tokens(tokens))
    step = BLOCK_TOKENS * TOKEN_BYTES
    state = _begin(namespace)
    keys = []
    for end in range(step, len(data) + 1, step):
        state.update(data[end - step : end])
        keys.append(state.digest())
    return keys
