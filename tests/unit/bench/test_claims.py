"""Each bench turns its measurements into the claims that the project makes."""

from __future__ import annotations

from itertools import accumulate

import pytest

from bench import contention, neighbour, throughput
from bench.sse_client import Answer


def test_throughput_bounds_differ_by_contestant() -> None:
    """0.92 of the plain loop is enough; of the servers it is not."""
    found = {
        (who, streams): [speed] * 3
        for streams in throughput.STREAMS
        for who, speed in (
            ("caravan", 95.0),
            ("raw", 100.0),
            ("example", 95.0),
            ("xllamacpp", 96.0),
        )
    }
    report = throughput.report(found, threads=2, rounds=3)
    kept = {claim.text: claim.kept for claim in report.claims}
    assert len(kept) == 6
    assert all(holds == ("xllamacpp" not in text) for text, holds in kept.items())


def test_throughput_without_a_peer_claims_nothing_about_it() -> None:
    """What was not run is neither printed nor claimed."""
    found = {(who, s): [10.0] for s in throughput.STREAMS for who in ("caravan", "raw")}
    report = throughput.report(found, threads=2, rounds=1)
    assert not any("server" in claim.text for claim in report.claims)
    assert len(report.tables[0].rows) == 2


def _seen(gap_s: float, *tails_s: float) -> contention.Seen:
    """A round for each tail: one gap in twenty is that long, so the p99 finds it although the median does not."""
    seen = contention.Seen()
    for tail_s in tails_s:
        between = [*[gap_s] * 95, *[tail_s] * 5]
        seen.add(Answer(0.0, list(accumulate([0.0, *between])), "length"))
    return seen


def test_contention_is_judged_by_the_tail_beside_the_busy_pair() -> None:
    """The p99 beside two busy processes decides, not the median and not the times alone."""
    alone, beside = contention.SITUATIONS
    found = {
        ("caravan", alone): _seen(0.02, 0.3),
        ("xllamacpp", alone): _seen(0.02, 0.03),
        ("caravan", beside): _seen(0.06, 0.09),
        ("xllamacpp", beside): _seen(0.06, 0.30),
    }
    (claim,) = contention.report(found, rounds=1, threads=2).claims
    assert claim.value == pytest.approx(0.09 / 0.30)
    assert claim.kept


def test_one_disturbed_round_of_a_peer_proves_nothing() -> None:
    """A peer that stood still for a while in one round of three is not slower for it."""
    alone, beside = contention.SITUATIONS
    found = {
        ("caravan", alone): _seen(0.02, 0.03),
        ("xllamacpp", alone): _seen(0.02, 0.03),
        ("caravan", beside): _seen(0.06, 0.09, 0.09, 0.09),
        ("xllamacpp", beside): _seen(0.06, 0.10, 3.0, 0.10),
    }
    (claim,) = contention.report(found, rounds=3, threads=2).claims
    assert claim.value == pytest.approx(0.9)
    assert not claim.kept


def test_the_default_spin_must_cost_nothing_alone() -> None:
    """A setting that is smooth beside others but slow alone is not the default."""
    settings = neighbour.settings(threads=2)
    found = {s.name: neighbour.Found([0.02], [50.0], [0.06, 0.3]) for s in settings}
    found[neighbour.CHOSEN] = neighbour.Found([0.025], [40.0], [0.06, 0.07])
    speed, tail = neighbour.report(found, rounds=1).claims
    assert not speed.kept
    assert tail.kept
