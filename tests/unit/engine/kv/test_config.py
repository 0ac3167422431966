"""What the KV cache can be told, and what it reads from the host."""

from __future__ import annotations

from pathlib import Path

import pytest
from caravan.cache.v1 import cache_service_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from services.engine.kv.config import RootConfig, parse_roots
from services.engine.kv.host_memory import host_memory, parse_meminfo
from services.engine.kv.known import KnownKeys
from services.engine.kv.session import BACKOFF_MOST_S, backoff_s


def test_roots() -> None:
    assert parse_roots("") == ()
    assert parse_roots("ram_file:/dev/shm/kv:512MiB,disk:/var/a:b:4GiB") == (
        RootConfig(pb.TIER_RAM_FILE, Path("/dev/shm/kv"), 512 << 20),
        RootConfig(pb.TIER_DISK, Path("/var/a:b"), 4 << 30),
    )


@pytest.mark.parametrize(
    "text",
    ["disk", "disk:/a", "tape:/a:1GiB", "disk::1GiB", "disk:/a:0", "disk:/a:4GB", "disk:/a:"],
)
def test_wrong_roots(text: str) -> None:
    with pytest.raises(ValueError):
        parse_roots(text)


@pytest.mark.parametrize(("text", "size"), [("7", 7), ("2KiB", 2048), ("1TiB", 1 << 40)])
def test_sizes(text: str, size: int) -> None:
    assert parse_roots(f"disk:/a:{text}")[0].quota_bytes == size


@pytest.mark.parametrize("text", ["", "-1", "1.5GiB", "٣", "1 GiB"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(ValueError):
        parse_roots(f"disk:/a:{text}")


def test_meminfo() -> None:
    assert parse_meminfo("MemTotal:  100 kB\nMemFree: 1 kB\nMemAvailable: 40 kB\n") == (
        60 * 1024,
        100 * 1024,
    )
    for broken in ("", "MemTotal: 100 kB", "MemTotal: x kB\nMemAvailable: 1 kB", "MemTotal"):
        assert parse_meminfo(broken) == (0, 0)
    used, total = host_memory()
    assert 0 <= used <= total


@given(st.integers(0, 100), st.floats(0, 1, exclude_max=True))
def test_backoff_is_bounded_and_never_zero(attempt: int, share: float) -> None:
    assert 0.05 <= backoff_s(attempt, share) <= BACKOFF_MOST_S


def test_known_keys_forget_the_oldest() -> None:
    known = KnownKeys(3)
    for key in (b"a", b"b", b"c", b"a", b"d"):
        known.add(key)
    assert [key in known for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    known.discard([b"a", b"x"])
    assert b"a" not in known
