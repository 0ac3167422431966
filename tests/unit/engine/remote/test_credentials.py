"""Credentials from real files and variables: read once for many, replaced while in use, never shown."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest
from caravan.engine.v1 import remote_options_pb2 as pb

from services.engine.remote import credentials
from services.engine.remote.credential_sources import (
    EnvSource,
    FileSource,
    Reading,
    Source,
    source_of,
)
from services.engine.remote.credentials import (
    REFRESH_AHEAD_S,
    Credential,
    CredentialError,
    CredentialSession,
)
from services.engine.remote.failure import Failure
from services.runtime.clock import ManualClock

CANARY = "sk-canary-4f9a"


class CountedFile(FileSource):
    """A file that tells how often it was read, and may hold readers up."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        object.__setattr__(self, "threads", [])
        object.__setattr__(self, "begun", threading.Event())
        object.__setattr__(self, "go", threading.Event())
        self.go.set()

    threads: list[str]
    begun: threading.Event
    go: threading.Event

    def read(self, environ: Mapping[str, str]) -> Reading:
        self.threads.append(threading.current_thread().name)
        reading = super().read(environ)
        self.begun.set()
        assert self.go.wait(20)
        return reading


class Held:
    """A session with its clock and what it told."""

    def __init__(self, source: Source | None, environ: Mapping[str, str] | None = None) -> None:
        self.clock = ManualClock()
        self.told: list[Credential] = []
        self.session = CredentialSession(source, self.clock, environ or {}, self.told.append)

    @property
    def secret(self) -> str:
        return self.session.snapshot.secret


def token(secret: str, expires_at: float) -> str:
    moment = datetime.fromtimestamp(expires_at, UTC).isoformat().replace("+00:00", "Z")
    return json.dumps({"token": secret, "expires_at": moment})


async def test_each_source_is_read_and_named_without_its_secret(tmp_path: Path) -> None:
    """From the options to a snapshot; white space around a secret is none of it."""
    (tmp_path / "key").write_text(f"\n{CANARY}\n")
    options = [
        pb.Credential(env="OPENAI_API_KEY"),
        pb.Credential(file=str(tmp_path / "key")),
        pb.Credential(inline=CANARY),
    ]
    names = []
    for credential in options:
        source = source_of(credential)
        held = Held(source, {"OPENAI_API_KEY": CANARY})
        await held.session.open()
        assert held.secret == CANARY
        names.append(held.session.status().source)
        shown = f"{source!r} {source} {held.session.snapshot!r} {held.session.status()}"
        assert "canary" not in shown
    assert names == ["env OPENAI_API_KEY", f"file {tmp_path / 'key'}", "inline"]
    assert source_of(pb.Credential()) is None


async def test_without_a_source_no_credential_is_sent() -> None:
    """Servers of one's own need none; an operator can give one all the same."""
    held = Held(None)
    await held.session.open()
    assert (held.secret, held.session.status().source) == ("", "")
    assert (await held.session.rebuild(1)).generation == 1
    with pytest.raises(CredentialError):
        await held.session.reread()
    await held.session.rotate(CANARY)
    assert (held.secret, held.session.snapshot.generation) == (CANARY, 2)


# --- replacing ---------------------------------------------------------------------------------------------------


async def test_a_hundred_401s_at_once_cause_one_reading(tmp_path: Path) -> None:
    """Single flight by generation (W21): all get what the one read, on another thread than the loop's."""
    (tmp_path / "key").write_text("sk-old-1")
    source = CountedFile(tmp_path / "key")
    held = Held(source)
    await held.session.open()
    failed = held.session.snapshot
    (tmp_path / "key").write_text("sk-new-2")
    source.go.clear()
    source.begun.clear()
    waiting = [asyncio.create_task(held.session.rebuild(failed.generation)) for _ in range(100)]
    await asyncio.to_thread(source.begun.wait, 20)
    assert held.session.snapshot is failed
    source.go.set()
    rebuilt = await asyncio.gather(*waiting)
    assert {c.secret for c in rebuilt} == {"sk-new-2"}
    assert {c.generation for c in rebuilt} == {2}
    assert len(source.threads) == 2
    assert threading.main_thread().name not in source.threads
    # A straggler whose call was made with the old one gets the new one without a reading.
    assert (await held.session.rebuild(failed.generation)).generation == 2
    assert len(source.threads) == 2
    assert [c.generation for c in held.told] == [1, 2]


async def test_a_failed_rebuild_is_shared_and_keeps_the_old_credential(tmp_path: Path) -> None:
    """Those who waited for the same reading do not read again; the next one does, and may have better luck."""
    (tmp_path / "key").write_text("sk-old-1")
    source = CountedFile(tmp_path / "key")
    held = Held(source)
    await held.session.open()
    (tmp_path / "key").unlink()
    asked = [held.session.rebuild(1) for _ in range(100)]
    failures = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(failure, CredentialError) for failure in failures)
    assert len(source.threads) == 2
    assert held.secret == "sk-old-1"
    with pytest.raises(CredentialError) as caught:
        await held.session.rebuild(1)
    assert caught.value.failure is Failure.UNAUTHORIZED
    assert str(tmp_path) in caught.value.detail
    assert str(tmp_path) not in caught.value.message
    (tmp_path / "key").write_text("sk-new-2")
    assert (await held.session.rebuild(1)).secret == "sk-new-2"


async def test_whoever_stops_waiting_does_not_stop_the_others(tmp_path: Path) -> None:
    """The one who reads is cancelled: another reads for all."""
    (tmp_path / "key").write_text("sk-old-1")
    source = CountedFile(tmp_path / "key")
    held = Held(source)
    await held.session.open()
    source.go.clear()
    source.begun.clear()
    waiting = [asyncio.create_task(held.session.rebuild(1)) for _ in range(10)]
    await asyncio.to_thread(source.begun.wait, 20)
    waiting[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting[0]
    source.go.set()
    assert {c.generation for c in await asyncio.gather(*waiting[1:])} == {2}
    assert len(source.threads) == 3


async def test_rotating_wins_over_a_reading_that_has_begun(tmp_path: Path) -> None:
    """And stays, whatever the file says, until it is read again on purpose."""
    (tmp_path / "key").write_text("sk-file-1")
    source = CountedFile(tmp_path / "key")
    held = Held(source)
    await held.session.open()
    source.go.clear()
    source.begun.clear()
    rebuilding = asyncio.create_task(held.session.rebuild(1))
    await asyncio.to_thread(source.begun.wait, 20)
    rotating = asyncio.create_task(held.session.rotate(CANARY))
    source.go.set()
    await asyncio.gather(rebuilding, rotating)
    assert (held.secret, held.session.snapshot.generation) == (CANARY, 3)
    (tmp_path / "key").write_text("sk-file-2")
    await held.session.check()
    assert (await held.session.rebuild(3)).secret == CANARY
    assert held.session.status().source == "rotated by hand"
    assert (await held.session.reread()).secret == "sk-file-2"
    assert held.session.status().source == f"file {tmp_path / 'key'}"
    for refused in ("", "with space", "line\nbreak"):
        with pytest.raises(CredentialError):
            await held.session.rotate(refused)
    assert held.secret == "sk-file-2"


async def test_those_who_have_a_snapshot_keep_it() -> None:
    """Secret and generation of one call always belong together (W29)."""
    environ = {"KEY": "sk-old-1"}
    held = Held(EnvSource("KEY"), environ)
    await held.session.open()
    before = held.session.snapshot
    environ["KEY"] = "sk-new-2"
    after = await held.session.rebuild(before.generation)
    assert (before.generation, before.secret) == (1, "sk-old-1")
    assert (after.generation, after.secret) == (2, "sk-new-2")


async def test_a_disk_that_hangs_does_not_hold_anybody_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old credential stays, and reading works again when the disk does. A pipe that nobody writes to hangs like a disk."""
    path = tmp_path / "key"
    path.write_text("sk-old-1")
    held = Held(FileSource(str(path)))
    await held.session.open()
    monkeypatch.setattr(credentials, "READ_S", 0.05)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CredentialError) as caught:
        await held.session.rebuild(1)
    assert "does not answer" in caught.value.detail
    await held.session.check()  # It waits behind the reading that hangs, and not for ever either.
    assert held.secret == "sk-old-1"
    await asyncio.to_thread(
        path.write_text, "sk-late-2"
    )  # The reading that hung ends; it is too late.
    path.unlink()
    path.write_text("sk-new-3")
    monkeypatch.setattr(credentials, "READ_S", 20.0)
    assert (await held.session.rebuild(1)).secret == "sk-new-3"
    held.session.close()


# --- by itself ---------------------------------------------------------------------------------------------------


async def test_a_file_that_changes_is_noticed_and_one_that_does_not_is_not_read(
    tmp_path: Path,
) -> None:
    """Written in place or put in its place; an equal content is no new credential."""
    path = tmp_path / "key"
    path.write_text("sk-old-1")
    source = CountedFile(path)
    held = Held(source)
    await held.session.open()
    for _ in range(5):
        await held.session.check()
    assert len(source.threads) == 1
    path.write_text("sk-new-22")
    await held.session.check()
    assert (held.secret, len(source.threads)) == ("sk-new-22", 2)
    (tmp_path / "other").write_text("sk-new-33")
    (tmp_path / "other").replace(path)
    await held.session.check()
    assert held.secret == "sk-new-33"
    (tmp_path / "same").write_text("sk-new-33")
    (tmp_path / "same").replace(path)
    await held.session.check()
    assert (held.session.snapshot.generation, len(source.threads)) == (3, 4)


async def test_it_is_read_ahead_of_its_expiry_until_there_is_a_newer_one(tmp_path: Path) -> None:
    """The old one is used meanwhile, beyond its end if need be."""
    path = tmp_path / "key"
    path.write_text(token("sk-old-1", 2000.0))
    source = CountedFile(path)
    held = Held(source)
    await held.session.open()
    assert held.session.status().expires_in.ToTimedelta().total_seconds() == 1000.0
    held.clock.advance(1000.0 - REFRESH_AHEAD_S - 1)
    await held.session.check()
    assert len(source.threads) == 1
    held.clock.advance(2.0)
    await held.session.check()
    assert (held.secret, len(source.threads)) == ("sk-old-1", 2)
    held.clock.advance(500.0)
    await held.session.check()
    assert (held.secret, held.session.snapshot.generation) == ("sk-old-1", 1)
    assert held.session.status().expires_in.ToTimedelta().total_seconds() == 0.0
    path.write_text(token("sk-new-2", 9000.0))
    await held.session.check()
    assert (held.secret, held.session.snapshot.expires_at) == ("sk-new-2", 9000.0)
    assert held.session.status().age.ToTimedelta().total_seconds() == 0.0


async def test_a_file_that_breaks_is_logged_once_and_read_when_it_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half a file is what somebody is writing just now."""
    path = tmp_path / "key"
    path.write_text(token("sk-old-1", 5000.0))
    held = Held(FileSource(str(path)))
    await held.session.open()
    path.write_text('{"token": "sk-canary')
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            await held.session.check()
    assert len(caplog.records) == 1
    assert "canary" not in caplog.text
    assert held.secret == "sk-old-1"
    path.unlink()
    await held.session.check()
    assert held.secret == "sk-old-1"
    path.write_text(token("sk-new-2", 5000.0))
    await held.session.check()
    assert held.secret == "sk-new-2"


async def test_watching_goes_on_until_it_is_cancelled(tmp_path: Path) -> None:
    """A change arrives without anybody asking; what cannot change is not watched."""
    path = tmp_path / "key"
    path.write_text("sk-old-1")
    arrived = asyncio.Event()

    def adopted(credential: Credential) -> None:
        if credential.secret == "sk-new-22":
            arrived.set()

    session = CredentialSession(FileSource(str(path)), ManualClock(), {}, adopted)
    await session.open()
    watching = asyncio.create_task(session.watch(0.005))
    path.write_text("sk-new-22")
    await asyncio.wait_for(arrived.wait(), 20)
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    await asyncio.wait_for(Held(EnvSource("KEY")).session.watch(), 20)


async def test_the_first_reading_must_succeed() -> None:
    """An engine that has no credential does not start with none."""
    with pytest.raises(CredentialError) as caught:
        await Held(EnvSource("OPENAI_API_KEY")).session.open()
    assert caught.value.detail == "env OPENAI_API_KEY: the variable is not set"
