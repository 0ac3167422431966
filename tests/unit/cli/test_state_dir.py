"""The state directory: one owner, true endpoints, bounded logs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from services.cli import log_files
from services.cli.plan import ProcessPlan
from services.cli.state_dir import Endpoints, StateDirError, owned

GATEWAY = ProcessPlan(
    "gateway", "gateway", (), {}, "127.0.0.1:7001", "http://127.0.0.1:9101/metrics"
)
ENGINE = ProcessPlan(
    "engine-0", "engine", (), {}, "127.0.0.1:7010", "http://127.0.0.1:9110/metrics"
)


def test_a_directory_has_one_owner(tmp_path: Path) -> None:
    """A second `caravan up` is refused and told who is there; afterwards the directory is free."""
    folder = tmp_path / "new" / "state"
    with owned(folder), pytest.raises(StateDirError, match=str(os.getpid())), owned(folder):
        pass
    with owned(folder):
        pass


def test_a_directory_that_cannot_be_is_told(tmp_path: Path) -> None:
    """A path below a file is refused with the system's words."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StateDirError, match="cannot use"), owned(tmp_path / "file" / "state"):
        pass


def test_endpoints_tell_what_runs(tmp_path: Path) -> None:
    """The file lists the processes that run now, with the number that each has now."""
    path = tmp_path / "endpoints.json"
    endpoints = Endpoints(tmp_path)
    endpoints.started(GATEWAY, 10)
    endpoints.started(ENGINE, 11)
    gateway = {
        "name": "gateway",
        "pid": 10,
        "address": "127.0.0.1:7001",
        "metrics": "http://127.0.0.1:9101/metrics",
    }
    assert json.loads(path.read_text())["processes"][0] == gateway
    endpoints.ended(ENGINE)
    assert json.loads(path.read_text()) == {"processes": [gateway]}
    endpoints.started(ENGINE, 12)
    assert [p["pid"] for p in json.loads(path.read_text())["processes"]] == [10, 12]
    endpoints.remove()
    assert not list(tmp_path.iterdir())


def test_endpoints_are_never_seen_half(tmp_path: Path) -> None:
    """A reader that holds the old file open still reads a whole document: the file is replaced, not rewritten."""
    endpoints = Endpoints(tmp_path)
    endpoints.started(GATEWAY, 10)
    with (tmp_path / "endpoints.json").open() as reader:
        endpoints.started(ENGINE, 11)
        assert len(json.load(reader)["processes"]) == 1


def test_logs_are_rotated_at_start_and_appended_after_a_restart(tmp_path: Path) -> None:
    """One run, one file; a process that is started again goes on in it; one older run is kept."""
    path = tmp_path / "logs" / "x.log"
    for number in range(3):
        descriptor = log_files.open_log(path)
        os.write(descriptor, f"run {number}\n".encode())
        os.close(descriptor)
    descriptor = log_files.reopen_log(path)
    os.write(descriptor, b"again\n\n")
    os.close(descriptor)
    assert log_files.last_lines(path, 5) == ["run 2", "again"]
    assert (tmp_path / "logs" / "x.log.1").read_text() == "run 1\n"
    assert log_files.last_lines(tmp_path / "none.log", 5) == []


def test_a_long_log_is_cut_under_its_writer(tmp_path: Path) -> None:
    """The writer keeps its descriptor and goes on at the new end, leaving no hole (I4)."""
    path = tmp_path / "x.log"
    descriptor = log_files.open_log(path)
    os.write(descriptor, b"a" * 100)
    assert not log_files.cap(path, 100)
    os.write(descriptor, b"b")
    assert log_files.cap(path, 100)
    os.write(descriptor, b"c\n")
    os.close(descriptor)
    assert path.read_bytes() == b"c\n"
    assert (tmp_path / "x.log.1").read_bytes() == b"a" * 100 + b"b"
    assert not log_files.cap(tmp_path / "none.log", 100)
