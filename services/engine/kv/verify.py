"""Checks block files against their checksums and names: `python -m services.engine.kv.verify FOLDER...`. Reads only.

Engines may run meanwhile: files that they write are not looked at, and one that they drop is not missed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from services.engine.kv.keys import KEY_BYTES
from services.engine.kv.kvc import KvcError
from services.engine.kv.root import Root

ALL_GOOD: Final = 0
SOME_BAD: Final = 1
NO_FOLDER: Final = 2
_PATTERN: Final = "*.kvc"


def flaw_of(path: Path) -> str | None:
    """What is wrong with a block file; None where nothing is, or where it is gone."""
    try:
        key = bytes.fromhex(path.stem)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        return "its name is no key"
    try:
        Root(path.parent, "", writable=False).read_whole(key)
    except FileNotFoundError:
        return None
    except KvcError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
    return None


def verify(folders: Sequence[Path], say: Callable[[str], None]) -> int:
    """Checks every block file of the folders; returns the exit code: 0 all are good, 1 some are not, 2 no such folder."""
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing:
        say(f"there is no folder {missing[0]}")
        return NO_FOLDER
    worst = ALL_GOOD
    for folder in folders:
        files = sorted(folder.glob(_PATTERN))
        bad = 0
        for path in files:
            flaw = flaw_of(path)
            if flaw is not None:
                bad += 1
                say(f"{path}: {flaw}")
        say(f"{folder}: {len(files)} files, {bad} bad")
        worst = max(worst, SOME_BAD if bad else ALL_GOOD)
    return worst


if __name__ == "__main__":
    sys.exit(verify([Path(text) for text in sys.argv[1:]], print))
