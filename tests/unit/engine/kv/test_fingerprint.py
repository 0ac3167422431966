"""The fingerprint covers the whole file, and is remembered only for exactly this file."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from services.engine.kv.fingerprint import file_fingerprint, text_fingerprint
from services.runtime.clock import CountingIds

CONTENT = os.urandom(1_000) * 5_000


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(CONTENT)
    return path


def digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def test_the_whole_file_counts(model: Path) -> None:
    assert file_fingerprint(model, None, CountingIds()) == digest(CONTENT)
    changed = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    model.write_bytes(changed)
    assert file_fingerprint(model, None, CountingIds()) == digest(changed)


def test_it_is_remembered(model: Path, tmp_path: Path) -> None:
    memory = tmp_path / "new" / "fingerprints.json"
    assert file_fingerprint(model, memory, CountingIds()) == digest(CONTENT)
    entries = json.loads(memory.read_text())
    entries[0][4] = "ab" * 32  # Only what is remembered can give this.
    memory.write_text(json.dumps(entries))
    assert file_fingerprint(model, memory, CountingIds()) == b"\xab" * 32
    assert [path.name for path in memory.parent.iterdir()] == ["fingerprints.json"]


def test_another_time_size_or_inode_is_another_file(model: Path, tmp_path: Path) -> None:
    memory = tmp_path / "fingerprints.json"
    file_fingerprint(model, memory, CountingIds())
    status = model.stat()
    changed = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    model.write_bytes(changed)
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert file_fingerprint(model, memory, CountingIds()) == digest(changed)
    copy = tmp_path / "copy"
    copy.write_bytes(CONTENT)
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    copy.replace(model)
    assert file_fingerprint(model, memory, CountingIds()) == digest(CONTENT)
    assert len(json.loads(memory.read_text())) == 1


@pytest.mark.parametrize(
    "content",
    ["", "{", "{}", "[1]", '[["a", 1, 2, 3, "zz"]]', '[["a", 1, 2, 3, "ab"]]', "\x00\xff"],
)
def test_a_corrupt_memory_is_made_anew(model: Path, tmp_path: Path, content: str) -> None:
    memory = tmp_path / "fingerprints.json"
    memory.write_text(content)
    assert file_fingerprint(model, memory, CountingIds()) == digest(CONTENT)
    assert json.loads(memory.read_text())[0][4] == digest(CONTENT).hex()


def test_a_memory_that_cannot_be_written_is_no_error(model: Path, tmp_path: Path) -> None:
    memory = tmp_path / "folder"
    memory.mkdir()
    assert file_fingerprint(model, memory, CountingIds()) == digest(CONTENT)


def test_a_missing_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no-model"):
        file_fingerprint(tmp_path / "no-model", None, CountingIds())


def test_scripts_have_fingerprints_of_their_own() -> None:
    assert len(text_fingerprint("scripted:?a=1")) == 32
    assert text_fingerprint("scripted:?a=1") != text_fingerprint("scripted:?a=2")
