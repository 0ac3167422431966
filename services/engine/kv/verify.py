"""Checks block files against their checksums, their names and each other: `python -m services.engine.kv.verify FOLDER...`.

Reads only. Engines may run meanwhile: files that they write are not looked at, and one that they drop is not missed. A block
whose parent is in none of the folders is unreachable: no prompt finds it there. It takes room, but is not bad.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.engine.kv.keys import KEY_BYTES
from services.engine.kv.kvc import KvcError
from services.engine.kv.root import Root

NONE_BAD: Final = 0
SOME_BAD: Final = 1
NO_FOLDER: Final = 2
_SUFFIX: Final = ".kvc"


class BadFileError(Exception):
    """A block file is bad; the message says how."""


@dataclass(frozen=True, slots=True)
class Link:
    """A good file, and what its block follows: a key, or None at the start of a prompt."""

    path: Path
    key: bytes
    parent: bytes | None


def check(path: Path) -> Link | None:
    """Checks a block file against itself; None where it is gone. Raises BadFileError."""
    try:
        key = bytes.fromhex(path.stem)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise BadFileError("its name is no key")
    try:
        meta = Root(path.parent, "", writable=False).read_whole(key).meta
    except FileNotFoundError:
        return None
    except KvcError as error:
        raise BadFileError(str(error)) from error
    except OSError as error:
        raise BadFileError(error.strerror or str(error)) from error
    return Link(path, key, meta.parent if meta.start else None)


def unreachable(links: Iterable[Link]) -> list[Link]:
    """Those from which the parents do not lead to the start of a prompt. O(links)."""
    links = list(links)
    parents = {link.key: link.parent for link in links}
    reached: dict[bytes, bool] = {}
    for key in parents:
        _settle(key, parents, reached)
    return [link for link in links if not reached[link.key]]


def _settle(key: bytes, parents: Mapping[bytes, bytes | None], reached: dict[bytes, bool]) -> None:
    """Finds out for a block, and for all before it, whether they are reached."""
    trail: list[bytes] = []
    at: bytes | None = key
    while at is not None and at in parents and at not in reached:
        reached[at] = (
            False  # Until the start is seen: parents that go round in a circle lead nowhere.
        )
        trail.append(at)
        at = parents[at]
    is_reached = at is None or reached.get(at, False)
    reached.update(dict.fromkeys(trail, is_reached))


def verify(folders: Sequence[Path], say: Callable[[str], None]) -> int:
    """Checks every block file of the folders; returns the exit code: 0 none is bad, 1 some are, 2 no such folder."""
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing:
        say(f"there is no folder {missing[0]}")
        return NO_FOLDER
    links: list[Link] = []
    files: Counter[Path] = Counter()
    bad: Counter[Path] = Counter()
    for folder in folders:
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            files[folder] += 1
            try:
                link = check(path)
            except BadFileError as error:
                bad[folder] += 1
                say(f"{path}: {error}")
            else:
                links += [link] if link else []
    links += _saved_meanwhile(links, folders)
    # What was dropped meanwhile is gone together with what came before it.
    lost = [link for link in unreachable(links) if link.path.exists()]
    for link in lost:
        say(f"{link.path}: unreachable: a block before it is missing")
    behind = Counter(link.path.parent for link in lost)
    for folder in folders:
        note = f", {behind[folder]} unreachable" if behind[folder] else ""
        say(f"{folder}: {files[folder]} files, {bad[folder]} bad{note}")
    return SOME_BAD if bad.total() else NONE_BAD


def _saved_meanwhile(links: Sequence[Link], folders: Sequence[Path]) -> list[Link]:
    """Good files that were not listed, of blocks that those which were listed follow."""
    known = {link.key for link in links}
    wanted = {link.parent for link in links if link.parent is not None} - known
    found: list[Link] = []
    while wanted:
        known |= wanted
        paths = [folder / f"{key.hex()}{_SUFFIX}" for key in wanted for folder in folders]
        more: list[Link] = []
        for path in paths:
            with contextlib.suppress(BadFileError):  # Named already, or as good as missing.
                link = check(path)
                more += [link] if link else []
        found += more
        wanted = {link.parent for link in more if link.parent is not None} - known
    return found


if __name__ == "__main__":
    sys.exit(verify([Path(text) for text in sys.argv[1:]], print))
