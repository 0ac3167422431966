"""Checking block files from outside: what is bad is named, nothing is changed."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from services.engine.kv import kvc
from services.engine.kv.rows import meta_of
from services.engine.kv.store import SavedBlock
from services.engine.kv.verify import NO_FOLDER, NONE_BAD, SOME_BAD, Link, unreachable, verify
from tests.support.kv import NAMESPACE, chain_of, prompt_of

BLOCKS = chain_of(prompt_of(1, 600))


def _write(folder: Path, block: SavedBlock) -> Path:
    path = folder / f"{block.key.hex()}.kvc"
    prefix = kvc.seal(meta_of(block, NAMESPACE, 1_700_000_000), block.state)
    path.write_bytes(prefix + bytes(block.state))
    return path


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Three good files, beside what a root has too."""
    (tmp_path / "root-id").write_text("root-1")
    (tmp_path / f"{BLOCKS[0].key.hex()}.kvc.writer.save-1.tmp").write_bytes(b"being written")
    return [_write(tmp_path, block) for block in BLOCKS]


def _verify(*folders: Path) -> tuple[int, list[str]]:
    said: list[str] = []
    return verify(folders, said.append), said


def test_good_files_pass(paths: list[Path]) -> None:
    """Temporary files of writers are none of its business."""
    folder = paths[0].parent
    assert _verify(folder) == (NONE_BAD, [f"{folder}: 3 files, 0 bad"])


@pytest.mark.parametrize(
    ("harm", "flaw"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "crc_mismatch"),
        (lambda data: data[:8] + b"\xff" + data[9:], "header_crc_mismatch"),
        (lambda data: data[:-7], "truncated"),
        (lambda data: data + b"x", "trailing_bytes"),
        (lambda _: b"", "truncated"),
    ],
    ids=["payload", "header", "short", "long", "empty"],
)
def test_a_bad_file_is_named_and_stays(paths: list[Path], harm: object, flaw: str) -> None:
    """Only looking: whoever uses the root decides what becomes of the file."""
    assert callable(harm)
    bad = harm(paths[1].read_bytes())
    paths[1].write_bytes(bad)
    code, said = _verify(paths[1].parent)
    assert code == SOME_BAD
    assert said[0].startswith(f"{paths[1]}: {flaw}")
    assert said[1:] == [
        f"{paths[2]}: unreachable: a block before it is missing",
        f"{paths[1].parent}: 3 files, 1 bad, 1 unreachable",
    ]
    assert paths[1].read_bytes() == bad


def test_names_count(paths: list[Path]) -> None:
    """A block under another's name, and a name that is no key."""
    paths[0].rename(paths[0].with_name("00" * 32 + ".kvc"))
    paths[1].rename(paths[1].with_name("notes.kvc"))
    code, said = _verify(paths[0].parent)
    assert code == SOME_BAD
    assert [line.rpartition("/")[2] for line in said[:2]] == [
        f"{'00' * 32}.kvc: key_mismatch: the file has another block's name",
        "notes.kvc: its name is no key",
    ]


def test_what_no_prompt_finds_is_unreachable_but_not_bad(paths: list[Path], tmp_path: Path) -> None:
    """Without the first block, the two behind it; where the first is in another folder that is given, none."""
    other = tmp_path / "other"
    other.mkdir()
    paths[0].rename(other / paths[0].name)
    code, said = _verify(tmp_path)
    assert code == NONE_BAD
    assert sorted(said[:2]) == sorted(
        f"{path}: unreachable: a block before it is missing" for path in paths[1:]
    )
    assert said[2:] == [f"{tmp_path}: 2 files, 0 bad, 2 unreachable"]
    assert _verify(tmp_path, other) == (
        NONE_BAD,
        [f"{tmp_path}: 2 files, 0 bad", f"{other}: 1 files, 0 bad"],
    )


def test_a_circle_leads_nowhere() -> None:
    """Of blocks that name each other as parents none is reached, nor what follows them; each is looked at once."""
    names = [bytes([number]) * 32 for number in range(5)]
    circle = [Link(Path(), names[0], names[1]), Link(Path(), names[1], names[0])]
    behind = Link(Path(), names[2], names[1])
    good = [Link(Path(), names[3], None), Link(Path(), names[4], names[3])]
    assert unreachable([behind, *circle, *good]) == [behind, *circle]
    deep = [Link(Path(), bytes([n // 256, n % 256]) * 16, None) for n in range(5_000)]
    chain = [Link(Path(), after.key, before.key) for before, after in pairwise(deep)]
    assert unreachable(chain) == chain
    assert unreachable([deep[0], *reversed(chain)]) == []


def test_what_an_engine_saves_meanwhile_is_not_missed(paths: list[Path], tmp_path: Path) -> None:
    """The listing came too early for the first two blocks: before anything is called unreachable, they are looked for."""
    late = tmp_path / "late"
    late.mkdir()
    hidden = [path.rename(late / path.name) for path in paths[:2]]
    said: list[str] = []
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "notes.kvc").write_text("bad: what is said of it lets the others appear")

    def say(line: str) -> None:
        said.append(line)
        for path in hidden:
            if path.exists():
                path.rename(tmp_path / path.name)

    assert verify([tmp_path, folder], say) == SOME_BAD
    assert said == [
        f"{folder / 'notes.kvc'}: its name is no key",
        f"{tmp_path}: 1 files, 0 bad",
        f"{folder}: 1 files, 1 bad",
    ]


def test_it_runs_as_a_process(paths: list[Path], tmp_path: Path) -> None:
    """All folders are checked; the worst gives the code; a folder that is not there is a mistake."""
    empty = tmp_path / "empty"
    empty.mkdir()
    paths[2].write_bytes(b"KVC")
    command = [sys.executable, "-P", "-m", "services.engine.kv.verify"]
    done = subprocess.run(
        [*command, str(tmp_path), str(empty)], capture_output=True, text=True, check=False
    )
    assert done.returncode == SOME_BAD, done.stderr
    assert done.stdout.splitlines()[1:] == [
        f"{tmp_path}: 3 files, 1 bad",
        f"{empty}: 0 files, 0 bad",
    ]
    assert subprocess.run([*command, str(tmp_path / "none")], check=False).returncode == NO_FOLDER
