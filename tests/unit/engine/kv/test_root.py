"""Roots: files appear whole or not at all, broken ones vanish, and every failure has a name (S2.13-S2.17, S2.28)."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from caravan.cache.v1 import cache_service_pb2 as cache_pb

from services.engine.kv import kvc
from services.engine.kv.block_file import TemporaryBlock
from services.engine.kv.holdings import Holdings, MountedRoot
from services.engine.kv.kvc import Expected, Flaw, KvcError
from services.engine.kv.ram import RamTier
from services.engine.kv.root import Linked, Root, RootError, RootTrouble
from services.engine.kv.rows import meta_of
from services.engine.kv.store import SavedBlock
from services.runtime.clock import CountingIds
from tests.support.kv import NAMESPACE, chain_of, prompt_of

BLOCK = chain_of(prompt_of(1, 256), state_bytes=3_000_000)[0]


def open_root(path: Path) -> Root:
    return Root.open(path, CountingIds())


def expected_of(block: SavedBlock) -> Expected:
    meta = meta_of(block, NAMESPACE, 0)
    return Expected(meta.key, meta.parent, meta.namespace, meta.start, meta.token_bytes)


def written(root: Root, block: SavedBlock, unique: str = "save-1") -> TemporaryBlock:
    meta = meta_of(block, NAMESPACE, 1_700_000_000)
    return root.write(block.key, "writer-1", unique, (kvc.seal(meta, block.state), block.state))


def saved(root: Root, block: SavedBlock) -> Path:
    assert root.link(written(root, block), expected_of(block)) is Linked.NEW
    return root.file_of(block.key)


def files(root: Root) -> set[str]:
    return {path.name for path in root.path.iterdir()} - {"root-id"}


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    root = open_root(tmp_path / "deep" / "root")
    path = saved(root, BLOCK)
    assert files(root) == {BLOCK.key.hex() + ".kvc"}
    block = root.read(expected_of(BLOCK))
    assert block.state == BLOCK.state
    assert block.state.readonly
    assert block.file_bytes == path.stat().st_size
    assert path.stat().st_mode & 0o077 == 0  # What users wrote is nobody else's to read.


@pytest.mark.parametrize("size", [0, 1, 6_000, 8_192, (1 << 20) + 1])
def test_states_of_any_size(tmp_path: Path, size: int) -> None:
    root = open_root(tmp_path)
    block = chain_of(prompt_of(1, 10), state_bytes=size)[0]
    saved(root, block)
    assert root.read(expected_of(block)).state == block.state


def test_the_id_stays_and_engines_that_open_at_once_agree(tmp_path: Path) -> None:
    ids = CountingIds()
    seen: list[str] = []
    threads = [
        threading.Thread(target=lambda: seen.append(Root.open(tmp_path, ids).root_id))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert set(seen) == {open_root(tmp_path).root_id}
    assert files(open_root(tmp_path)) == set()


def test_nothing_is_visible_before_the_link(tmp_path: Path) -> None:
    root = open_root(tmp_path)
    temporary = written(root, BLOCK)
    assert [name for name in files(root) if name.endswith(".kvc")] == []
    assert list(root.scan()) == []
    with pytest.raises(FileNotFoundError):
        root.read(expected_of(BLOCK))
    temporary.discard()
    temporary.discard()
    assert files(root) == set()


def test_a_valid_file_under_the_name_is_adopted(tmp_path: Path) -> None:
    root = open_root(tmp_path)
    first = saved(root, BLOCK).stat().st_ino
    assert root.link(written(root, BLOCK), expected_of(BLOCK)) is Linked.ADOPTED
    assert root.file_of(BLOCK.key).stat().st_ino == first
    assert files(root) == {BLOCK.key.hex() + ".kvc"}


@pytest.mark.parametrize("damage", [0, 100, 5_000, 2_999_000])
def test_a_broken_file_under_the_name_is_replaced(tmp_path: Path, damage: int) -> None:
    root = open_root(tmp_path)
    path = saved(root, BLOCK)
    data = bytearray(path.read_bytes())
    data[damage] ^= 1
    path.write_bytes(data)
    assert root.link(written(root, BLOCK), expected_of(BLOCK)) is Linked.NEW
    assert root.read(expected_of(BLOCK)).state == BLOCK.state


def test_reads_are_counted_in_the_file_and_only_in_a_file(tmp_path: Path) -> None:
    root = open_root(tmp_path)
    path = saved(root, BLOCK)
    for _ in range(3):
        root.read(expected_of(BLOCK))
    assert root.head(BLOCK.key).meta.hits == 3
    root.delete(BLOCK.key)
    root.delete(BLOCK.key)
    with pytest.raises(FileNotFoundError):
        root.read(expected_of(BLOCK))
    assert not path.exists()


def test_a_scan_lists_the_good_and_removes_the_bad(tmp_path: Path) -> None:
    root = open_root(tmp_path)
    blocks = chain_of(prompt_of(1, 256 * 5), state_bytes=9_000)
    for block in blocks:
        saved(root, block)
    data = bytearray(root.file_of(blocks[0].key).read_bytes())
    data[60] ^= 1
    root.file_of(blocks[0].key).write_bytes(data)
    os.truncate(root.file_of(blocks[1].key), 8_000)
    root.file_of(blocks[2].key).rename(tmp_path / ("00" * 32 + ".kvc"))
    (tmp_path / "stub.kvc").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not ours")
    assert {head.meta.key for head in root.scan()} == {blocks[3].key, blocks[4].key}
    good = {block.key.hex() + ".kvc" for block in blocks[3:]}
    assert files(root) == {*good, "notes.txt"}


def test_a_scan_lists_files_by_their_number(tmp_path: Path) -> None:
    """That is about the order in which they were saved, whatever a listing of the folder says."""
    root = open_root(tmp_path)
    blocks = chain_of(prompt_of(1, 256 * 24), state_bytes=100)
    paths = [saved(root, block) for block in blocks]
    by_number = sorted(paths, key=lambda path: path.stat().st_ino)
    assert [root.file_of(head.meta.key) for head in root.scan()] == by_number


def test_an_inventory_tells_chain_by_chain(tmp_path: Path) -> None:
    """Of two that were saved at the same time."""
    root = open_root(tmp_path)
    chains = [chain_of(prompt_of(seed, 256 * 6), state_bytes=100) for seed in (1, 2)]
    for pair in zip(*chains, strict=True):
        for block in pair:
            saved(root, block)
    holdings = Holdings([MountedRoot(root, cache_pb.TIER_DISK, 2**40)], RamTier(0))
    (part,) = holdings.inventory(root.root_id)
    told = [row.key for row in part]
    one, other = ([block.key for block in chain] for chain in chains)
    assert told in ([*one, *other], [*other, *one])


def test_a_scan_reads_only_the_metadata(tmp_path: Path) -> None:
    root = open_root(tmp_path)
    path = saved(root, BLOCK)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert [head.meta.key for head in root.scan()] == [BLOCK.key]
    with pytest.raises(KvcError) as caught:
        root.read_whole(BLOCK.key)
    assert caught.value.flaw is Flaw.CRC_MISMATCH


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from services.engine.kv.block_file import TemporaryBlock
temporary = TemporaryBlock(Path({path!r}), [b"half a block"])
print("written", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def writer_process(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process, in the middle of a save."""
    path = str(tmp_path / f"{'ab' * 32}.kvc.writer-9.save-1.tmp")
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER.format(paths=sys.path, path=path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == b"written\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()
    child.stdin.close()


def test_a_scan_sweeps_the_files_of_dead_writers_only(
    tmp_path: Path, writer_process: subprocess.Popen[bytes]
) -> None:
    root = open_root(tmp_path)
    assert list(root.scan()) == []
    assert len(files(root)) == 1
    writer_process.kill()
    writer_process.wait()
    assert list(root.scan()) == []
    assert files(root) == set()


def test_a_save_whose_temporary_file_vanished_fails_in_its_own_name(tmp_path: Path) -> None:
    root = open_root(tmp_path)
    temporary = written(root, BLOCK)
    temporary.path.unlink()
    with pytest.raises(RootError) as caught:
        root.link(temporary, expected_of(BLOCK))
    assert caught.value.trouble is RootTrouble.FAILED


@pytest.mark.parametrize("content", ["", "x" * 65, "naïve"])
def test_a_corrupt_id_fails_the_start(tmp_path: Path, content: str) -> None:
    (tmp_path / "root-id").write_text(content)
    with pytest.raises(RootError):
        open_root(tmp_path)


def test_a_path_that_is_no_folder_fails_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RootError):
        open_root(tmp_path / "file" / "root")


@pytest.mark.parametrize("wrong", [replace(expected_of(BLOCK), parent=bytes(32))])
def test_a_file_of_another_chain_is_not_read(tmp_path: Path, wrong: Expected) -> None:
    root = open_root(tmp_path)
    saved(root, BLOCK)
    with pytest.raises(KvcError):
        root.read(wrong)
