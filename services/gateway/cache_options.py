"""What a request may want of the KV cache, by the same rules in both public APIs. Pure."""

from __future__ import annotations

import re
from typing import Final

from caravan.core.v1 import generation_pb2

from services.gateway.openai_schema import ChatCompletion, Completion
from services.gateway.rules import Path, invalid

KEY_BYTES: Final = 32
SESSION_ID_BYTES_MAX: Final = 128
SALT_BYTES_MAX: Final = 256

_KEY: Final = re.compile(r"[0-9a-fA-F]{64}")


def check_cache(cache: generation_pb2.CacheOptions, at: Path) -> None:
    """Refuses sizes that no engine takes; `at` gives the path of a field. Empty fields count as unset."""
    if len(cache.parent_key) not in {0, KEY_BYTES}:
        raise invalid(at("parent_key"), f"a key has {KEY_BYTES} bytes.")
    if cache.session_id:
        check_session_id(cache.session_id, at("session_id"))
    check_salt(cache.salt, at("salt"))


def check_session_id(session_id: str, param: str) -> None:
    """Refuses an id that no conversation can have."""
    if not 1 <= len(session_id.encode()) <= SESSION_ID_BYTES_MAX:
        raise invalid(param, f"an id has 1 to {SESSION_ID_BYTES_MAX} bytes.")


def check_salt(salt: str, param: str) -> None:
    """Refuses a salt that no engine takes; the empty one is the common space."""
    if len(salt.encode()) > SALT_BYTES_MAX:
        raise invalid(param, f"a salt has at most {SALT_BYTES_MAX} bytes.")


def from_openai(given: ChatCompletion | Completion) -> generation_pb2.CacheOptions | None:
    """The options of an OpenAI body; None if it has none. Raises CaravanError."""
    cache = generation_pb2.CacheOptions()
    _add_salt(given, cache)
    options = given.caravan
    if options is not None:
        if options.parent_key is not None:
            if not _KEY.fullmatch(options.parent_key):
                raise invalid("caravan.parent_key", "a key has 64 hexadecimal digits.")
            cache.parent_key = bytes.fromhex(options.parent_key)
        if options.session_id is not None:
            check_session_id(options.session_id, "caravan.session_id")
            cache.session_id = options.session_id
        cache.bypass = options.cache is False
    return cache if cache.ByteSize() else None


def _add_salt(given: ChatCompletion | Completion, cache: generation_pb2.CacheOptions) -> None:
    """The salt may stand in `caravan` or, as other servers have it, at the top; two different ones contradict each other."""
    inner = None if given.caravan is None else given.caravan.cache_salt
    for param, salt in (("cache_salt", given.cache_salt), ("caravan.cache_salt", inner)):
        if salt is None:
            continue
        if not 1 <= len(salt.encode()) <= SALT_BYTES_MAX:
            raise invalid(param, f"a salt has 1 to {SALT_BYTES_MAX} bytes.")
        if cache.salt not in {"", salt}:
            raise invalid(param, "'cache_salt' says something else.")
        cache.salt = salt
