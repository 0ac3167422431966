"""What the benches of remote engines claim, and how they count CPU time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import litellm, remote
from bench.litellm_proxy import configuration
from bench.processor_time import core_of_its_own, tree_cpu_s
from bench.provider_process import Provider
from tests.support.waiting import wait_for

BURN = "import sys, time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
NEST = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN!r}])\n"


def _remote(engine_ms: float, speed: float) -> dict[str, bool]:
    first = {remote.DIRECT: [1.0], remote.ENGINE: [1.0 + engine_ms], remote.REST: [50.0]}
    round_ = remote.Carried(chunks=int(speed), messages=10, seconds=1.0, cpu_s=0.5)
    report = remote.report(first, {pace: [round_] for pace in remote.PACES_MS})
    return {claim.text.split()[0]: claim.kept for claim in report.claims}


def test_a_remote_engine_is_judged_by_what_it_adds_and_what_a_core_carries() -> None:
    assert _remote(2.9, 3001) == {"the": True, "64": True}
    assert _remote(3.1, 2999) == {"the": False, "64": False}


def _side(latency_ms: float, cpu_ms: float) -> litellm.Found:
    found = litellm.Found()
    for values in found.latency_ms.values():
        values.append(latency_ms)
    for values in found.cpu_ms.values():
        values.append(cpu_ms)
    return found


@pytest.mark.parametrize(("ours", "kept"), [((4.0, 6.9), True), ((4.1, 7.1), False)])
def test_litellm_is_compared_by_what_each_adds_to_the_provider(
    ours: tuple[float, float], *, kept: bool
) -> None:
    """The provider's own time counts for neither: 3 ms and 3.1 ms of 9 ms are added here."""
    found = {
        litellm.DIRECT: litellm.Found({litellm.STREAM: [1.0], litellm.PLAIN: [1.0]}),
        litellm.OURS: _side(*ours),
        litellm.THEIRS: _side(10.0, 21.0),
    }
    report = litellm.report(found)
    assert len(report.claims) == 6
    assert {claim.kept for claim in report.claims} == {kept}


def test_litellm_gets_the_provider_that_we_get() -> None:
    text = configuration(Provider(port=4711, pid=1))
    assert '"api_base": "http://127.0.0.1:4711/v1"' in text


def test_the_cpu_time_of_a_tree_has_the_children_that_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", f"{NEST}\nsys.stdin.read()"], stdin=-1)
    try:
        wait_for(lambda: tree_cpu_s(process.pid) >= 0.3, "0.3 s of CPU time")
        assert tree_cpu_s(process.pid) < 5
    finally:
        process.kill()
        process.communicate()


def test_a_core_of_its_own_is_given_and_taken_back() -> None:
    everywhere = os.sched_getaffinity(0)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
    try:
        with core_of_its_own(process.pid, []) as core:
            for thread in Path(f"/proc/{process.pid}/task").iterdir():
                assert os.sched_getaffinity(int(thread.name)) == {core}
            assert os.sched_getaffinity(0) == (everywhere - {core} or everywhere)
        assert os.sched_getaffinity(process.pid) == os.sched_getaffinity(0) == everywhere
    finally:
        process.kill()
        process.communicate()
