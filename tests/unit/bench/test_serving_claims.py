"""The benches of affinity, overload and admission turn what they saw into claims."""

from __future__ import annotations

import pytest

from bench import admission, affinity, overload
from bench.engine_client import TokenAnswer


def test_affinity_is_judged_against_round_robin() -> None:
    """Reused tokens and the slowest first tokens, each as a ratio."""
    found = {
        "affinity": affinity.Found(1000, 700, [10.0] * 19 + [50.0]),
        "round_robin": affinity.Found(1000, 350, [20.0] * 20),
    }
    reused, first = affinity.report(found, turns=3).claims
    assert (reused.value, reused.kept) == (2.0, True)
    assert (first.value, first.kept) == (0.5, True)
    found["affinity"] = affinity.Found(1000, 600, [30.0] * 20)
    assert [claim.kept for claim in affinity.report(found, turns=3).claims] == [False, False]


def test_all_turns_of_a_conversation_count() -> None:
    """Tokens are sums over all answers."""
    talk = affinity.Conversation.begin(5)
    for cached in (0, 30):
        talk.answers.append(
            TokenAnswer(0.0, times=[0.002], prompt_tokens=100, cached_tokens=cached)
        )
    seen = affinity.Found.of([talk, affinity.Conversation.begin(1)])
    assert (seen.prompt_tokens, seen.reused_tokens, seen.first_ms) == (200, 30, [2.0, 2.0])


def test_conversations_share_their_system_prompt_with_others() -> None:
    """Every fourth one."""
    texts = [affinity.Conversation.begin(n).messages[0].content for n in range(8)]
    assert texts[:4] == texts[4:]
    assert len(set(texts)) == affinity.SYSTEMS


def _overload(**changes: object) -> list[bool]:
    """Which claims hold, of a run that keeps all of them but for the changes."""
    seen = overload.Offered([1.0], [0.010, 0.020], {}, [0.0])
    values = {
        "capacity_per_s": 100.0,
        "served_per_s": 96.0,
        "offered": seen,
        "early_mb": {"gateway": 50.0},
        "late_mb": {"gateway": 51.0},
    }
    found = overload.Found(**{**values, **changes})  # type: ignore[arg-type]
    return [claim.kept for claim in overload.report(found, 60.0).claims]


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({}, None),
        ({"served_per_s": 94.0}, 0),
        ({"offered": overload.Offered([1.0], [], {}, [0.0])}, 1),
        ({"offered": overload.Offered([1.0], [0.010, 0.051], {}, [0.0])}, 2),
        ({"offered": overload.Offered([1.0], [0.010], {"UNAVAILABLE": 1}, [0.0])}, 3),
        ({"late_mb": {"gateway": 59.0}}, 4),
    ],
)
def test_overload_claims(changes: dict[str, object], broken: int | None) -> None:
    """Throughput, refusals, their speed, clean endings and memory are claims of their own."""
    assert _overload(**changes) == [number != broken for number in range(5)]


def test_served_within_counts_a_span() -> None:
    """What ended before or after does not count."""
    assert overload.Offered([0.9, 1.0, 1.9, 2.0]).served_within(1.0, 2.0) == 2


def test_admission_is_what_a_request_waits_for() -> None:
    """A lease on the session by its median; the calls that do the same are shown beside it."""
    path = {name: [2.0] for name in (admission.DIRECT, admission.BEHIND)}
    report = admission.report(admission.Waits([0.8, 0.9, 9.0], [1.3], [0.3]), path)
    assert (report.claims[0].value, report.claims[0].kept) == (0.9, True)
    assert report.tables[0].rows[2][:2] == ("call of Release", "0.30")
    (claim,) = admission.report(admission.Waits([1.1], [0.1], [0.1]), path).claims
    assert not claim.kept
