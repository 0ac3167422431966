"""Envoy's configuration for given ports, from the template deploy/envoy/envoy.yaml."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Final

LOCAL_ORIGINS: Final = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
"""Web pages of this machine may call the API; RE2, whole match."""


@dataclass(frozen=True)
class EnvoySettings:
    """What the template leaves open. `folder` holds the template, its Lua and the descriptors."""

    folder: Path
    public_port: int
    admin_port: int
    gateway_port: int
    access_log: Path
    cors_origins: str = LOCAL_ORIGINS


def render(template: str, settings: EnvoySettings) -> str:
    """The configuration. Raises ValueError for a text that has no place in a quoted line of YAML."""
    texts = {
        "folder": str(settings.folder),
        "access_log": str(settings.access_log),
        "cors_origins": settings.cors_origins,
    }
    for name, text in texts.items():
        if not text.isprintable():
            raise ValueError(
                f"{name} {text!r} has characters that Envoy's configuration cannot hold"
            )
    return string.Template(template).substitute(
        public_port=settings.public_port,
        admin_port=settings.admin_port,
        gateway_port=settings.gateway_port,
        **{name: text.replace("'", "''") for name, text in texts.items()},
    )
