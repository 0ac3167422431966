"""Memory of the host, from /proc/meminfo."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_MEMINFO: Final = Path("/proc/meminfo")


def parse_meminfo(text: str) -> tuple[int, int]:
    """Bytes in use and in all; (0, 0) where the text does not say. Memory that can be reclaimed is not in use."""
    values: dict[str, int] = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        number, _, unit = rest.strip().partition(" ")
        if unit == "kB" and number.isascii() and number.isdigit():
            values[name] = int(number) * 1024
    total, available = values.get("MemTotal", 0), values.get("MemAvailable", 0)
    return (total - available, total) if 0 < available <= total else (0, 0)


def host_memory() -> tuple[int, int]:
    """Bytes in use and in all; (0, 0) where the host does not say."""
    try:
        return parse_meminfo(_MEMINFO.read_text())
    except OSError:
        return 0, 0
