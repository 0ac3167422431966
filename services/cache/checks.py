"""Checks what comes in over the contract, and turns it into values of the core. All raise CaravanError: MISSING_FIELD,
INVALID_VALUE."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final

from caravan.cache.v1 import cache_service_pb2 as pb

from services.cache.core import SAVE_REASONS
from services.cache.rows import KEY_BYTES, Facts, Tier
from services.cache.sessions import Registration, RootDeclaration
from services.runtime.errors import CaravanError
from services.runtime.settings import peer_address

ID_BYTES_MAX: Final = 128
ROOT_ID_BYTES_MAX: Final = 64
ROOTS_MAX: Final = 16
TOKENS_MAX: Final = 1_024
SIZE_MAX: Final = 2**63 - 1
WAIT_S_MAX: Final = 60.0
WAIT_S_DEFAULT: Final = 0.5


def invalid(param: str, text: str) -> CaravanError:
    """INVALID_VALUE for a field."""
    return CaravanError("INVALID_VALUE", f"'{param}' {text}.", param=param)


def checked_id(param: str, value: str, bytes_max: int = ID_BYTES_MAX) -> str:
    """An id of 1 to `bytes_max` bytes."""
    if not value:
        raise CaravanError("MISSING_FIELD", f"'{param}' is missing.", param=param)
    if len(value.encode()) > bytes_max:
        raise invalid(param, f"is longer than {bytes_max} bytes")
    return value


def checked_key(param: str, value: bytes) -> bytes:
    """A key of 32 bytes."""
    if not value:
        raise CaravanError("MISSING_FIELD", f"'{param}' is missing.", param=param)
    if len(value) != KEY_BYTES:
        raise invalid(param, f"has {len(value)} bytes instead of {KEY_BYTES}")
    return value


def checked_keys(param: str, values: Iterable[bytes]) -> tuple[bytes, ...]:
    """Keys of 32 bytes."""
    keys = tuple(values)
    for number, key in enumerate(keys):
        if len(key) != KEY_BYTES:
            raise invalid(f"{param}[{number}]", f"has {len(key)} bytes instead of {KEY_BYTES}")
    return keys


def to_tokens(param: str, tokens: Sequence[int]) -> bytes:
    """At most 1024 tokens, as big-endian u32."""
    if len(tokens) > TOKENS_MAX:
        raise invalid(param, f"has more than {TOKENS_MAX} tokens")
    return struct.pack(f">{len(tokens)}I", *tokens)


def to_facts(param: str, block: pb.Block) -> Facts:
    """A block."""
    key = checked_key(f"{param}.key", block.key)
    parent = checked_key(f"{param}.parent_key", block.parent_key)
    if key == parent:
        raise invalid(f"{param}.parent_key", "is the key of the block itself")
    if block.end <= block.start:
        raise invalid(f"{param}.end", "is not above 'start'")
    if not 0 < block.size_bytes <= SIZE_MAX:
        raise invalid(f"{param}.size_bytes", f"is not within 1 to {SIZE_MAX}")
    tokens = b""
    if block.tokens:
        if len(block.tokens) != block.end - block.start:
            raise invalid(f"{param}.tokens", "are not as many as the block has")
        tokens = to_tokens(f"{param}.tokens", block.tokens)
    return Facts(
        key=key,
        parent=parent,
        end=block.end,
        size=block.size_bytes,
        # A reason of a later version counts as not known.
        reason=block.save_reason if block.save_reason < SAVE_REASONS else 0,
        hits=block.hits,
        tokens=tokens,
        wire=_wire(block),
    )


def _wire(block: pb.Block) -> bytes:
    """The block as Acquire sends it: without its tokens, which only a partly matching block needs."""
    if not block.tokens:
        return pb.Copy(block=block).SerializeToString()
    copy = pb.Copy(block=block)
    copy.block.ClearField("tokens")
    return copy.SerializeToString()


def to_all_facts(param: str, blocks: Sequence[pb.Block]) -> list[Facts]:
    """Blocks."""
    return [to_facts(f"{param}[{number}]", block) for number, block in enumerate(blocks)]


def to_registration(request: pb.JoinRequest) -> Registration:
    """The registration in the first message of a session."""
    if request.WhichOneof("message") != "register":
        raise CaravanError(
            "MISSING_FIELD", "The first message must be 'register'.", param="register"
        )
    message = request.register
    engine_id = checked_id("register.engine_id", message.engine_id)
    address = checked_id("register.address", message.address)
    try:
        peer_address(address)
    except ValueError as error:
        raise invalid("register.address", f"is {error}") from error
    if len(message.roots) > ROOTS_MAX:
        raise invalid("register.roots", f"are more than {ROOTS_MAX}")
    roots = tuple(
        _to_root(f"register.roots[{number}]", root) for number, root in enumerate(message.roots)
    )
    if len({root.root_id for root in roots}) != len(roots):
        raise invalid("register.roots", "name a root twice")
    return Registration(engine_id, address, roots, message.ram_quota_bytes)


def _to_root(param: str, root: pb.Root) -> RootDeclaration:
    root_id = checked_id(f"{param}.root_id", root.root_id, ROOT_ID_BYTES_MAX)
    if root.tier not in {pb.TIER_RAM_FILE, pb.TIER_DISK}:
        raise invalid(f"{param}.tier", "is neither TIER_RAM_FILE nor TIER_DISK")
    if not 0 < root.quota_bytes <= SIZE_MAX:
        raise invalid(f"{param}.quota_bytes", f"is not within 1 to {SIZE_MAX}")
    return RootDeclaration(root_id, Tier(root.tier), root.quota_bytes, root.writable)


def to_tiers(param: str, tiers: Iterable[int]) -> frozenset[Tier]:
    """Tiers; empty means all."""
    try:
        return frozenset(map(Tier, tiers))
    except ValueError as error:
        raise invalid(param, "name a tier that does not exist") from error


def checked_chain(request: pb.AcquireRequest, keys_max: int) -> tuple[bytes, bytes, bytes]:
    """Keys, key of the empty prompt (may be missing where keys are given), and tail of an Acquire."""
    keys = request.keys
    if len(keys) % KEY_BYTES:
        raise invalid("keys", f"are not a multiple of {KEY_BYTES} bytes")
    if len(keys) > keys_max * KEY_BYTES:
        raise invalid("keys", f"are more than {keys_max}")
    if request.skip * KEY_BYTES > len(keys):
        raise invalid("skip", "is above the number of keys")
    root_key = request.root_key
    if root_key or not keys:
        checked_key("root_key", root_key)
    return keys, root_key, to_tokens("tail", request.tail)


def to_timeout_s(request: pb.WaitRequest) -> float:
    """Seconds to wait."""
    if not request.HasField("timeout"):
        return WAIT_S_DEFAULT
    seconds = request.timeout.seconds + request.timeout.nanos / 1e9
    if not 0 <= seconds <= WAIT_S_MAX:
        raise invalid("timeout", f"is not within 0 to {WAIT_S_MAX:g} s")
    return seconds
