"""Keys: the vectors of the definition, one pass, and that every component counts (S2.1-S2.5)."""

from __future__ import annotations

import hashlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.kv.identity import context_hash
from services.engine.kv.keys import (
    BLOCK_TOKENS,
    Namespace,
    block_keys,
    decode_tokens,
    encode_tokens,
)
from services.engine.kv.quant import KNOWN_BYTES, UNKNOWN, quant_byte
from tests.support.kv import NAMESPACE, prompt_of

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=600)


def reference_key(namespace: Namespace, tokens: list[int]) -> bytes:
    data = b"".join(token.to_bytes(4, "little") for token in tokens)
    parts = namespace.fingerprint + bytes([namespace.quant]) + namespace.context_hash + data
    return hashlib.sha256(parts).digest()


@pytest.mark.parametrize(
    ("tokens", "key"),
    [
        ([1, 2, 3], "8cc177adeda2e7c42843eb357ed501d2f979b9a8b4eacf7734740b128e9902c6"),
        ([], "85fc8051287bece2c6c5a9ce4ef6373093360ac0d1a81ffbb28b23b05b049ace"),
    ],
)
def test_vectors(tokens: list[int], key: str) -> None:
    hasher = NAMESPACE.hasher()
    hasher.feed(tokens)
    assert hasher.key().hex() == key


def test_the_root_key_is_that_of_the_empty_prompt() -> None:
    assert NAMESPACE.root_key() == NAMESPACE.hasher().key()


@given(TOKENS, st.lists(st.integers(0, 600), max_size=4))
def test_one_pass_in_any_pieces_gives_the_key_of_the_definition(
    tokens: list[int], cuts: list[int]
) -> None:
    hasher = NAMESPACE.hasher()
    bounds = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    for begin, end in itertools.pairwise(bounds):
        hasher.feed(tokens[begin:end])
        assert hasher.length == end
        assert hasher.key() == reference_key(NAMESPACE, tokens[:end])


@given(st.integers(0, 3 * BLOCK_TOKENS + 5))
def test_block_keys_are_the_keys_at_the_boundaries(length: int) -> None:
    tokens = prompt_of(1, length)
    ends = range(BLOCK_TOKENS, length + 1, BLOCK_TOKENS)
    assert block_keys(NAMESPACE, tokens) == [reference_key(NAMESPACE, tokens[:e]) for e in ends]


def test_a_copy_goes_its_own_way() -> None:
    one = NAMESPACE.hasher()
    one.feed([1, 2])
    other = one.copy()
    other.feed([3])
    assert one.length == 2
    assert one.key() == reference_key(NAMESPACE, [1, 2])
    assert other.key() == reference_key(NAMESPACE, [1, 2, 3])


@pytest.mark.parametrize(
    "other",
    [
        Namespace(b"\xab" * 32, 1, b"\xbb" * 32),
        Namespace(b"\xaa" * 32, 2, b"\xbb" * 32),
        Namespace(b"\xaa" * 32, 1, b"\xbc" * 32),
        NAMESPACE.salted(b"tenant"),
        NAMESPACE.salted(b"another tenant"),
    ],
)
def test_every_component_changes_the_key(other: Namespace) -> None:
    tokens = prompt_of(1, BLOCK_TOKENS)
    assert block_keys(other, tokens) != block_keys(NAMESPACE, tokens)
    assert other.root_key() != NAMESPACE.root_key()


def test_salts() -> None:
    assert NAMESPACE.salted(b"") is NAMESPACE
    assert NAMESPACE.salted(b"a") == NAMESPACE.salted(b"a")
    assert NAMESPACE.salted(b"a") != NAMESPACE.salted(b"b")


@pytest.mark.parametrize(
    ("fingerprint", "quant", "context"),
    [(b"a" * 31, 1, b"b" * 32), (b"a" * 32, 1, b"b" * 33), (b"a" * 32, 256, b"b" * 32)],
)
def test_wrong_components_are_refused(fingerprint: bytes, quant: int, context: bytes) -> None:
    with pytest.raises(ValueError):
        Namespace(fingerprint, quant, context)


@given(TOKENS)
def test_tokens_round_trip(tokens: list[int]) -> None:
    assert decode_tokens(encode_tokens(tokens)) == tuple(tokens)


def test_token_edges() -> None:
    assert encode_tokens([]) == b""
    assert encode_tokens([0, 0xFFFFFFFF]) == b"\0\0\0\0\xff\xff\xff\xff"
    with pytest.raises(ValueError):
        decode_tokens(b"\0\0\0")
    for wrong in (-1, 2**32):
        hasher = NAMESPACE.hasher()
        with pytest.raises(ValueError):
            hasher.feed([1, wrong])
        assert hasher.length == 0


@pytest.mark.parametrize(
    ("name", "byte"),
    [
        ("f32", 0),
        ("f16", 1),
        ("Q8_0", 6),
        ("q4_k_m", 7),
        ("iq4_xs", 28),
        ("bf16", 29),
        ("new", 255),
    ],
)
def test_quant_bytes(name: str, byte: int) -> None:
    assert quant_byte(name) == byte
    assert byte in KNOWN_BYTES


def test_only_the_bytes_of_the_table_are_known() -> None:
    assert frozenset({*range(30), UNKNOWN}) == KNOWN_BYTES


def test_a_context_hash_changes_with_names_values_and_salt_but_not_with_the_order() -> None:
    base = {"type_k": "f16", "type_v": "f16"}
    assert context_hash(base) == context_hash(dict(reversed(base.items())))
    others = [
        {"type_k": "f16"},
        {"type_k": "f16", "type_v": "q8_0"},
        {"type_k": "f16type_v", "": "f16"},
        {},
    ]
    hashes = {context_hash(base), context_hash(base, b"salt"), *map(context_hash, others)}
    assert len(hashes) == 2 + len(others)
