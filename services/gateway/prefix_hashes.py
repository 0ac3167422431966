"""Hashes of a prompt at its boundaries, by which the coordinator finds the engine that computed a prefix of it. Pure.

A chat has a boundary after each message: a conversation that goes on begins with the chain of its turn before. Texts and tokens
have one after each step of fixed length, and at their end. Model, salt and tools come first: with others nothing can be reused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final

from caravan.engine.v1 import engine_service_pb2 as engine_pb

HASH_BYTES: Final = 16
FIRST_MAX: Final = 8
LAST_MAX: Final = 56
"""Of a longer chain the first are kept, which requests share, and the last, which continue a conversation."""
TEXT_STEP: Final = 1024
TOKEN_STEP: Final = 256


def prefix_hashes(model: str, generate: engine_pb.GenerateRequest) -> tuple[bytes, ...]:
    """The hashes, the longest prefix last; none for a request that bypasses the cache."""
    if generate.cache.bypass:
        return ()
    running = hashlib.sha256()
    for part in _before(model, generate):
        _add(running, part)
    hashes: list[bytes] = []
    for part in _parts(generate):
        _add(running, part)
        hashes.append(running.digest()[:HASH_BYTES])
    if len(hashes) <= FIRST_MAX + LAST_MAX:
        return tuple(hashes)
    return (*hashes[:FIRST_MAX], *hashes[-LAST_MAX:])


def _add(running: hashlib._Hash, part: bytes) -> None:
    # With its length, so that two parts cannot look like one.
    running.update(len(part).to_bytes(8, "little"))
    running.update(part)


def _before(model: str, generate: engine_pb.GenerateRequest) -> Iterator[bytes]:
    yield model.encode()
    yield generate.cache.salt.encode()
    for tool in generate.chat.tools:
        yield tool.SerializeToString(deterministic=True)


def _parts(generate: engine_pb.GenerateRequest) -> Iterator[bytes]:
    for message in generate.chat.messages:
        yield message.SerializeToString(deterministic=True)
    for start in range(0, len(generate.text), TEXT_STEP):
        yield generate.text[start : start + TEXT_STEP].encode()
    ids = generate.tokens.ids
    for start in range(0, len(ids), TOKEN_STEP):
        yield b"".join(token.to_bytes(4, "little") for token in ids[start : start + TOKEN_STEP])
