"""`caravan cache` against a real cache service: what it shows and what it drops."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.cli.__main__ import main
from services.runtime.clock import SystemClock
from tests.support.cache import MIB, CacheRig, EnginePeer, chain, key, root, running_cache

KIB = 1024


@pytest.fixture
async def cache() -> AsyncIterator[CacheRig]:
    """A service, and an engine with three blocks on disk and one of them in RAM."""
    async with running_cache(heartbeat_s=20.0) as rig:
        engine = await rig.engine(
            "engine-0", [root("disk-1", quota=MIB)], held=chain("a", "b", "c", size=20 * KIB)
        )
        await engine.ram(chain("a", size=20 * KIB))
        await _until_rows_are_there(rig, "a", 2)
        obeying = asyncio.create_task(_obey(engine))
        yield rig
        obeying.cancel()
        await asyncio.wait([obeying])
        engine.die()


async def _obey(engine: EnginePeer) -> None:
    while True:
        await engine.confirm(await engine.drop())


async def _until_rows_are_there(rig: CacheRig, name: str, copies: int) -> None:
    async with asyncio.timeout(10):
        while rig.available(name) < copies:  # noqa: ASYNC110 - the service has no events for tests
            await asyncio.sleep(0.002)


class Shell:
    """Runs the command beside the event loop of the service."""

    def __init__(self, address: str, capsys: pytest.CaptureFixture[str]) -> None:
        self._address = address
        self._capsys = capsys

    async def run(self, *arguments: str, code: int = 0) -> list[str]:
        """The lines that the command prints; those on stderr where it fails."""
        action, *rest = arguments
        command = ["cache", action, "--address", self._address, *rest]
        assert await asyncio.to_thread(main, command) == code
        printed = self._capsys.readouterr()
        return (printed.err if code else printed.out).splitlines()


@pytest.fixture
def shell(cache: CacheRig, capsys: pytest.CaptureFixture[str]) -> Shell:
    """The command line."""
    return Shell(cache.address, capsys)


async def test_stats(shell: Shell) -> None:
    """Each place with its bytes and quota, then what was looked for and found."""
    lines = await shell.run("stats")
    table = [line.split() for line in lines[: lines.index("")]]
    assert table[0] == ["TIER", "PLACE", "COPIES", "BYTES", "QUOTA", "USED", "ENGINES"]
    assert sorted(table[1:]) == [
        ["disk", "disk-1", "3", "60.0", "KiB", "1.0", "MiB", "6%", "1"],
        ["ram", "engine-0", "1", "20.0", "KiB", "1.0", "MiB", "2%", "1"],
    ]
    assert "blocks    3, 0 more being saved, 0 claims" in lines
    assert any(line.startswith("lookups   0: 0 of 0 blocks found (-)") for line in lines)


async def test_ls(shell: Shell) -> None:
    """A line for each block in the order of the keys; a prefix of any length; a limit; JSON for programs."""
    keys = sorted(key(name).hex() for name in "abc")
    lines = await shell.run("ls")
    assert [line.split()[0] for line in lines] == ["KEY", *(found[:12] for found in keys)]
    first = next(line for line in lines if line.startswith(key("a").hex()[:12])).split()
    assert first[1] == "0-256"
    assert set(first[2].split(",")) == {"disk", "ram"}
    for length in (3, 4, 64):
        (_, only) = await shell.run("ls", "--prefix", keys[1][:length].upper())
        assert only.startswith(keys[1][:12])
    assert len(await shell.run("ls", "--limit", "2")) == 3
    rows = [json.loads(line) for line in await shell.run("ls", "--json")]
    assert [row["key"] for row in rows] == keys
    row = next(row for row in rows if row["key"] == key("b").hex())
    assert (row["parent_key"], row["start"], row["end"]) == (key("a").hex(), 256, 512)
    assert row["size_bytes"] == 20 * KIB
    assert row["save_reason"] == "cold"
    (copy,) = row["copies"]
    assert (copy["tier"], copy["root_id"], copy["state"]) == ("disk", "disk-1", "available")
    assert abs(copy["last_used"] - SystemClock().wall()) < 60


async def test_evict_by_key(cache: CacheRig, shell: Shell) -> None:
    """The copies of one block, named by the first digits of its key."""
    assert await shell.run("evict", key("c").hex()[:9]) == ["1 copy dropped, 20.0 KiB"]
    assert (cache.available("b"), cache.available("c")) == (1, 0)
    (complaint,) = await shell.run("evict", "0" * 64, code=1)
    assert complaint.startswith("caravan cache: no block has a key that begins with 000")


async def test_evict_bytes_and_everything(cache: CacheRig, shell: Shell) -> None:
    """As many of the least worth keeping as it takes; then all."""
    (line,) = await shell.run("evict", "--bytes", "1KiB")
    assert line == "1 copy dropped, 20.0 KiB"
    (line,) = await shell.run("evict", "--all")
    assert line == "3 copies dropped, 60.0 KiB"
    assert [cache.available(name) for name in "abc"] == [0, 0, 0]
    async with asyncio.timeout(10):
        while await shell.run("ls") != ["no blocks"]:
            pass


async def test_the_address_is_found_in_the_state_directory(
    cache: CacheRig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`caravan up` wrote it; without it the command says what is missing."""
    command = ["cache", "stats", "--state-dir", str(tmp_path)]
    assert await asyncio.to_thread(main, command) == 1
    assert "is `caravan up` running?" in capsys.readouterr().err
    endpoints = tmp_path / "endpoints.json"
    endpoints.write_text('{"processes": [{"name": "gateway", "address": "127.0.0.1:1"}]}')
    assert await asyncio.to_thread(main, command) == 1
    assert "no cache runs" in capsys.readouterr().err
    endpoints.write_text("[]")
    assert await asyncio.to_thread(main, command) == 1
    assert "cannot be read" in capsys.readouterr().err
    process = {"name": "cache", "address": cache.address}
    endpoints.write_text(json.dumps({"processes": [process]}))
    assert await asyncio.to_thread(main, command) == 0


def test_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names the address, and code 1."""
    assert main(["cache", "stats", "--address", "127.0.0.1:1"]) == 1
    errors = capsys.readouterr().err
    assert errors == "caravan cache: no cache service answers at 127.0.0.1:1\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["evict"],
        ["evict", "--all", "00ff"],
        ["evict", "--bytes", "4GB"],
        ["evict", "--bytes", "0"],
        ["evict", "xyz"],
        ["ls", "--limit", "0"],
        ["ls", "--prefix", "f" * 65],
    ],
)
def test_wrong_use(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Contradictions and bad values are code 2 and a line of help."""
    with pytest.raises(SystemExit) as caught:
        main(["cache", *arguments])
    assert caught.value.code == 2
    assert "usage: caravan cache" in capsys.readouterr().err


def test_verify_checks_the_folder_of_the_state_directory(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without folders it takes STATE_DIR/kv; the code of the check is the code of the command."""
    command = ["cache", "verify", "--state-dir", str(tmp_path)]
    assert main(command) == 2
    assert f"there is no folder {tmp_path / 'kv'}" in capfd.readouterr().out
    (tmp_path / "kv").mkdir()
    assert main(command) == 0
    (tmp_path / "kv" / f"{'00' * 32}.kvc").write_bytes(b"KVC")
    assert main(command) == 1
    assert "1 files, 1 bad" in capfd.readouterr().out
