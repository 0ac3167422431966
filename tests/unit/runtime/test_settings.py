"""Settings: parsed once, all mistakes at once, closed by default."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, dataclass

import pytest

from services.runtime.settings import (
    SettingsError,
    byte_size,
    choice,
    infos,
    integer,
    load,
    loopback_address,
    number,
    peer_address,
    setting,
    text,
)


@dataclass(frozen=True)
class Sample:
    """Settings of no service."""

    address: str = setting("X_ADDRESS", "127.0.0.1:1", "where", loopback_address)
    count: int = setting("X_COUNT", "3", "how many", integer(1, 10))
    share: float = setting("X_SHARE", "0.5", "what part", number(0, 1))
    level: str = setting("X_LEVEL", "info", "how loud", choice("debug", "info"))
    name: str = setting("X_NAME", "x", "how called", text)
    note: str = setting("X_NOTE", "", "anything")


def test_defaults_are_parsed_like_any_text() -> None:
    """Without an environment, and without load, the defaults hold, with their types."""
    expected = ("127.0.0.1:1", 3, 0.5, "info", "x", "")
    for settings in (Sample(), load(Sample, {})):
        assert (
            settings.address,
            settings.count,
            settings.share,
            settings.level,
            settings.name,
            settings.note,
        ) == expected


def test_the_environment_overrides_and_is_frozen() -> None:
    """Given variables are parsed, others are not looked at, and nobody changes a setting afterwards."""
    settings = load(Sample, {"X_COUNT": "10", "X_SHARE": "1", "PATH": "/bin"})
    assert (settings.count, settings.share) == (10, 1.0)
    with pytest.raises(FrozenInstanceError):
        settings.count = 4  # type: ignore[misc]


def test_all_mistakes_are_told_at_once() -> None:
    """Each wrong variable has its own line with what was given and why it is wrong."""
    environ = {
        "X_ADDRESS": "0.0.0.0:80",
        "X_COUNT": "11",
        "X_SHARE": "much",
        "X_LEVEL": "loud",
        "X_NAME": "",
        "X_NOTE": "fine",
    }
    with pytest.raises(SettingsError) as caught:
        load(Sample, environ)
    lines = str(caught.value).splitlines()
    assert [line.partition("=")[0] for line in lines] == [
        "X_ADDRESS",
        "X_COUNT",
        "X_SHARE",
        "X_LEVEL",
        "X_NAME",
    ]
    assert lines[1:] == [
        "X_COUNT='11': not within 1 to 10",
        "X_SHARE='much': not a number",
        "X_LEVEL='loud': not one of debug, info",
        "X_NAME='': is empty",
    ]


def test_each_setting_is_described() -> None:
    """Documentation can be checked against name, variable, default and meaning."""
    described = {name: (i.env, i.default, i.meaning) for name, i in infos(Sample)}
    assert described["count"] == ("X_COUNT", "3", "how many")
    assert len(described) == 6


@pytest.mark.parametrize("wrong", ["", "x", "1.5", "0", "11", "-1", "1e1"])
def test_whole_numbers_have_a_range(wrong: str) -> None:
    """What is no whole number, or outside its range, is refused."""
    with pytest.raises(ValueError, match="not"):
        integer(1, 10)(wrong)


@pytest.mark.parametrize("wrong", ["", "x", "-0.1", "1.1", "nan", "inf", str(-math.inf)])
def test_numbers_have_a_range(wrong: str) -> None:
    """Neither NaN nor infinity passes a range."""
    with pytest.raises(ValueError, match="not"):
        number(0, 1)(wrong)


@pytest.mark.parametrize("right", ["127.0.0.1:0", "127.8.0.9:65535", "localhost:80", "[::1]:80"])
def test_loopback_listeners_are_taken(right: str) -> None:
    """Every address of this machine's loopback, with port 0 for a free one."""
    assert loopback_address(right) == right


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        ":80",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:x",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "127.0.0.1:²",
        "0.0.0.0:80",
        "[::]:80",
        "::1:80",  # Without brackets nobody knows where the port begins.
        "10.0.0.1:80",
        "192.168.1.1:80",
        "example.com:80",
    ],
)
def test_listeners_beyond_loopback_are_refused(wrong: str) -> None:
    """Closed by default: without authentication no service listens elsewhere (I9)."""
    with pytest.raises(ValueError, match=r"\w"):
        loopback_address(wrong)


@pytest.mark.parametrize("right", ["127.0.0.1:1", "engine-0.engines:7010", "[fd00::1]:7002"])
def test_peers_may_be_anywhere(right: str) -> None:
    """Another service is named by host and port."""
    assert peer_address(right) == right


@pytest.mark.parametrize(
    "wrong", ["", "host", "host:", ":80", "host:0", "host:65536", "fd00::1:80", "host:²"]
)
def test_peers_have_a_host_and_a_port(wrong: str) -> None:
    """A peer without host, or with port 0, cannot be called."""
    with pytest.raises(ValueError, match=r"\w"):
        peer_address(wrong)


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("17", 17), ("2KiB", 2048), ("512MiB", 1 << 29), ("4GiB", 1 << 32)]
)
def test_sizes_have_units(text: str, size: int) -> None:
    """Bytes, or a power of 1024."""
    assert byte_size(text) == size


@pytest.mark.parametrize("wrong", ["", "-1", "1.5GiB", "4GB", "4 GiB", "4gib", "KiB", "²", "1e6"])
def test_sizes_are_whole_numbers_with_known_units(wrong: str) -> None:
    """A unit that could mean two things is refused."""
    with pytest.raises(ValueError, match="not a number of bytes"):
        byte_size(wrong)
