"""What a KV state depends on besides the weights and the tokens, as one hash. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

_DOMAIN: Final = b"caravan context 1\0"


def context_hash(identity: Mapping[str, str], salt: bytes = b"") -> bytes:
    """32 bytes that change with any name or value of `identity`, and with the salt; the order does not matter.

    Each part is preceded by its length, so that no two different mappings are read as the same bytes.
    """
    state = hashlib.sha256(_DOMAIN)
    for name in sorted(identity):
        _feed(state, name.encode())
        _feed(state, identity[name].encode())
    _feed(state, salt)
    return state.digest()


def _feed(state: hashlib._Hash, part: bytes) -> None:
    state.update(len(part).to_bytes(8, "little"))
    state.update(part)
