"""Each bench turns its measurements into the claims that the project makes."""

from __future__ import annotations

from bench import contention, neighbour, throughput


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


def _seen(gap_s: float, tail_s: float) -> contention.Seen:
    # One gap in twenty is long: the p99 must find it although the median does not.
    return contention.Seen(gaps=[*[gap_s] * 95, *[tail_s] * 5], speeds=[1 / gap_s])


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
    assert claim.value == 0.09 / 0.30
    assert claim.kept


def test_the_default_spin_must_cost_nothing_alone() -> None:
    """A setting that is smooth beside others but slow alone is not the default."""
    settings = neighbour.settings(threads=2)
    found = {s.name: neighbour.Found([0.02], [50.0], [0.06, 0.3]) for s in settings}
    found[neighbour.CHOSEN] = neighbour.Found([0.025], [40.0], [0.06, 0.07])
    speed, tail = neighbour.report(found, rounds=1).claims
    assert not speed.kept
    assert tail.kept
