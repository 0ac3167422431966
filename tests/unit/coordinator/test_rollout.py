"""When requests shift to a new revision."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from services.coordinator.deployment_status import State, describe
from services.coordinator.rollout import Decision, Member, Standing, decide, decide_removed

OLD, NEW, HAND = "old", "new", ""
READY, LOADING, FAILED = Standing.READY, Standing.LOADING, Standing.FAILED


def _members(*kinds: tuple[str, Standing]) -> list[Member]:
    return [Member(number, revision, standing) for number, (revision, standing) in enumerate(kinds)]


def _held(decision: Decision) -> list[int]:
    return sorted(decision.held_back)


def test_the_former_serve_until_all_of_the_new_are_ready() -> None:
    """One of two new engines is ready: it is held back, so that the old ones are not ended too early."""
    decision = decide(NEW, 2, _members((OLD, READY), (NEW, READY), (NEW, LOADING)), shifted=False)
    assert (_held(decision), decision.drained, decision.shifted) == ([1, 2], (), False)


def test_the_shift_comes_at_once_and_for_all() -> None:
    """When as many as are wanted are ready, the former get nothing more, and end; those that load too."""
    members = _members((OLD, READY), (NEW, READY), (OLD, LOADING), (NEW, READY))
    decision = decide(NEW, 2, members, shifted=False)
    assert (_held(decision), decision.drained, decision.shifted) == ([0, 2], (0, 2), True)


def test_who_was_told_is_not_told_again() -> None:
    """A drain is said once per session."""
    members = [replace(member, told=True) for member in _members((OLD, READY))]
    decision = decide(NEW, 1, [*members, Member(7, NEW, READY)], shifted=True)
    assert decision.drained == ()
    assert decision.held_back == {0}


def test_a_new_revision_that_fails_never_takes_over() -> None:
    """A broken model behind the same name: what served goes on."""
    decision = decide(NEW, 1, _members((OLD, READY), (NEW, FAILED)), shifted=False)
    assert 0 not in decision.held_back
    assert decision.drained == ()


def test_without_a_former_engine_the_first_new_one_serves() -> None:
    """Nothing is waited for where nobody else serves."""
    decision = decide(NEW, 3, _members((OLD, LOADING), (NEW, READY)), shifted=False)
    assert decision.shifted
    assert decision.held_back == {0}


def test_a_death_after_the_shift_does_not_bring_the_former_back() -> None:
    """Once shifted, a former engine that joins again is ended, although one of the new has died."""
    decision = decide(NEW, 2, _members((OLD, READY), (NEW, READY)), shifted=True)
    assert (_held(decision), decision.drained) == ([0], (0,))


def test_a_former_engine_is_better_than_none() -> None:
    """After the shift all of the new have died: a former one that joins may serve."""
    decision = decide(NEW, 1, _members((OLD, READY), (NEW, LOADING)), shifted=True)
    assert 0 not in decision.held_back
    assert decision.drained == ()


def test_what_failed_before_is_cleared_away() -> None:
    """An engine of a former revision that could not load serves nobody, and is ended."""
    decision = decide(NEW, 1, _members((OLD, FAILED), ("older", READY)), shifted=False)
    assert decision.drained == (0,)


def test_engines_started_by_hand_serve_and_stay() -> None:
    """They have no revision, so no rollout holds them back or ends them; with no replicas they are waited for."""
    decision = decide(NEW, 1, _members((HAND, READY), (NEW, READY), (OLD, READY)), shifted=False)
    assert (_held(decision), decision.drained) == ([2], (2,))
    assert decide(NEW, 0, _members((OLD, READY)), shifted=False).held_back == set()
    assert decide(NEW, 0, _members((OLD, READY), (HAND, READY)), shifted=False).drained == (0,)


def test_all_engines_of_a_removed_deployment_end() -> None:
    """Removed is removed, whoever started them."""
    decision = decide_removed(_members((HAND, READY), (NEW, LOADING)))
    assert (_held(decision), decision.drained) == ([0, 1], (0, 1))


members_of = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", HAND]), st.sampled_from(Standing)), max_size=6
)


@settings(max_examples=300)
@given(
    steps=st.lists(st.tuples(st.sampled_from("abc"), members_of), min_size=1, max_size=6),
    replicas=st.integers(0, 3),
)
def test_no_rollout_takes_the_last_engine(
    steps: list[tuple[str, list[tuple[str, Standing]]]], replicas: int
) -> None:
    """Whatever comes and goes in whatever order: while an engine is ready that was not told to end, one may serve.

    And who is told to end gets no new requests, and the current revision is never told.
    """
    told: set[int] = set()
    shifted, before = False, ""
    for revision, kinds in steps:
        members = [
            Member(number, kind, standing, number in told)
            for number, (kind, standing) in enumerate(kinds)
        ]
        shifted = shifted and revision == before
        before = revision
        usable = {m.session for m in members if m.standing is READY and not m.told}
        decision = decide(revision, replicas, members, shifted=shifted)
        told |= set(decision.drained)
        shifted = decision.shifted
        if usable:
            assert usable - decision.held_back - set(decision.drained)
        for member in members:
            if member.session in decision.drained:
                assert member.revision not in {revision, HAND}
                assert member.session in decision.held_back or member.standing is FAILED
        told &= {member.session for member in members}


def test_where_a_deployment_stands() -> None:
    """Pending, serving, failed; and the note says what is missing and why."""
    assert describe(NEW, 1, [], []).state is State.PENDING
    assert describe(NEW, 1, [], []).note == "0 of 1 engines ready"
    status = describe(NEW, 3, _members((NEW, READY), (NEW, READY), (NEW, LOADING)), [])
    assert (status.state, status.ready, status.note) == (State.SERVING, 2, "2 of 3 engines ready")
    status = describe(NEW, 1, _members((OLD, READY), (NEW, FAILED)), ["no such file"])
    assert (status.state, status.former) == (State.FAILED, 1)
    assert status.note == "no engine can serve the model: no such file; the former revision serves"
    status = describe(NEW, 1, _members((OLD, READY), (NEW, LOADING)), [])
    assert (status.state, status.ready) == (State.SERVING, 0)
    assert status.note == "0 of 1 engines ready; the former revision serves until then"
    assert describe(NEW, 1, _members((NEW, READY)), []).note == ""
