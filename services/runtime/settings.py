"""Settings: one frozen dataclass per service, parsed once from the environment, bad values stop the process.

A field is declared with `setting(...)`, which holds its environment variable, default, unit and meaning together.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, TypeVar, cast

T = TypeVar("T")
_META = "caravan"
_UNITS: Final = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


class SettingsError(ValueError):
    """Some settings are wrong; the message lists all of them, a line each."""


@dataclass(frozen=True)
class SettingInfo:
    """What is known of one setting."""

    env: str
    default: str
    meaning: str
    parse: Callable[[str], object]
    secret: bool = False


def setting(
    env: str,
    default: str,
    meaning: str,
    parse: Callable[[str], object] = str,
    *,
    secret: bool = False,
) -> Any:
    """A dataclass field read from the variable `env`; `default` is parsed like any other text.

    The value of a `secret` one is never shown, also where it is wrong; its `parse` must not repeat it either.
    """
    info = SettingInfo(env, default, meaning, parse, secret)
    return field(default_factory=lambda: parse(default), metadata={_META: info}, repr=not secret)


def infos(settings_class: type) -> Iterator[tuple[str, SettingInfo]]:
    """Name and description of each setting of a class, in the order of declaration."""
    for item in fields(settings_class):
        if _META in item.metadata:
            yield item.name, cast(SettingInfo, item.metadata[_META])


def load(settings_class: type[T], environ: Mapping[str, str]) -> T:
    """Parses the settings. Raises SettingsError, which names every wrong variable."""
    values: dict[str, object] = {}
    mistakes: list[str] = []
    for name, info in infos(settings_class):
        text = environ.get(info.env, info.default)
        try:
            values[name] = info.parse(text)
        except ValueError as error:
            told = info.env if info.secret else f"{info.env}={text!r}"
            mistakes.append(f"{told}: {error}")
    if mistakes:
        raise SettingsError("\n".join(mistakes))
    return settings_class(**values)


def integer(minimum: int, maximum: int) -> Callable[[str], int]:
    """A whole number within [minimum, maximum]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError("not a whole number") from None
        if not minimum <= value <= maximum:
            raise ValueError(f"not within {minimum} to {maximum}")
        return value

    return parse


def number(minimum: float, maximum: float) -> Callable[[str], float]:
    """A number within [minimum, maximum]."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError("not a number") from None
        if not minimum <= value <= maximum:
            raise ValueError(f"not within {minimum} to {maximum}")
        return value

    return parse


def byte_size(text: str) -> int:
    """A number of bytes, with KiB, MiB, GiB or TiB behind it or nothing."""
    found = re.fullmatch(r"(\d{1,15})([KMGT]iB)?", text, re.ASCII)
    if found is None:
        raise ValueError("not a number of bytes such as 512MiB")
    return int(found[1]) * _UNITS[found[2] or ""]


def choice(*options: str) -> Callable[[str], str]:
    """One of the given words."""

    def parse(text: str) -> str:
        if text not in options:
            raise ValueError(f"not one of {', '.join(options)}")
        return text

    return parse


def text(text: str) -> str:
    """Any text that is not empty."""
    if not text:
        raise ValueError("is empty")
    return text


def loopback_address(text: str) -> str:
    """host:port on this machine (port 0: a free one).

    Listeners are closed by default (invariant I9): without authentication no service listens beyond loopback, so another
    host is refused. Behind Envoy nothing else needs to be reached from outside.
    """
    host, port = _host_and_port(text)
    if not 0 <= port <= 65535:
        raise ValueError("not host:port")
    if host == "localhost":
        return text
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        raise ValueError("the host is neither an IP address nor localhost") from None
    if not address.is_loopback:
        raise ValueError("listening beyond loopback needs authentication, which this version lacks")
    return text


def peer_address(text: str) -> str:
    """host:port of another service."""
    _, port = _host_and_port(text)
    if not 0 < port <= 65535:
        raise ValueError("not host:port")
    return text


def _host_and_port(text: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    if not separator or not host or not (port.isascii() and port.isdigit()):
        raise ValueError("not host:port")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError("an IPv6 address needs brackets: [::1]:7002")
    return host, int(port)


@dataclass(frozen=True)
class ProcessSettings:
    """What every service can be told; its own settings extend these."""

    log_level: str = setting(
        "CARAVAN_LOG_LEVEL",
        "info",
        "debug, info, warning or error",
        choice("debug", "info", "warning", "error"),
    )
    otlp_endpoint: str = setting(
        "CARAVAN_OTLP_ENDPOINT",
        "",
        "OTLP endpoint for traces over gRPC, such as http://127.0.0.1:4317; empty: off",
    )
    drain_grace_s: float = setting(
        "CARAVAN_DRAIN_GRACE_S",
        "10",
        "Seconds that running requests get to end after SIGTERM",
        number(0, 3_600),
    )
