"""When a request goes to another engine, and when it ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.migration import AVOIDED_MAX, BACKOFF_MOST_S, MOVED, Loss, Migration
from services.runtime.errors import TABLE

LOSSES = st.builds(
    Loss,
    reason=st.sampled_from(sorted(TABLE)),
    incarnation=st.sampled_from(["", "a", "b", "c"]),
    began=st.booleans(),
    resumable=st.booleans(),
)
FRACTIONS = st.floats(0, 1, exclude_max=True)


def _after(
    migration: Migration,
    loss: Loss,
    *,
    idempotent: bool = True,
    remaining_s: float | None = None,
    fraction: float = 0.5,
) -> float | None:
    return migration.after(loss, idempotent=idempotent, remaining_s=remaining_s, fraction=fraction)


@given(st.lists(st.tuples(LOSSES, st.booleans(), FRACTIONS), max_size=30), st.integers(0, 10))
def test_moves_are_bounded(losses: list[tuple[Loss, bool, float]], moves_max: int) -> None:
    """However a request loses its engines, it moves no more often than it may, and never waits long (I4)."""
    migration = Migration(moves_max)
    moves = 0
    for loss, idempotent, fraction in losses:
        delay_s = _after(migration, loss, idempotent=idempotent, fraction=fraction)
        if delay_s is None:
            continue
        moves += 1
        assert 0 <= delay_s <= BACKOFF_MOST_S
        assert loss.reason in MOVED
        assert loss.resumable, "nobody could go on with the answer"
        assert migration.has_moved
    assert moves <= moves_max


@given(st.lists(LOSSES, max_size=20))
def test_what_must_not_run_twice_never_does(losses: list[Loss]) -> None:
    """Without idempotence a request moves only where the engine itself has said no before it began."""
    migration = Migration(100)
    for loss in losses:
        if _after(migration, loss, idempotent=False) is not None:
            assert not loss.began
            assert loss.reason in {"DRAINING", "CAPACITY_EXHAUSTED", "MODEL_LOADING"}


@given(LOSSES, st.floats(0, 5), FRACTIONS, st.integers(0, 8))
def test_no_move_outlives_the_deadline(
    loss: Loss, remaining_s: float, fraction: float, moves: int
) -> None:
    """A pause that would end after the deadline is not begun."""
    migration = Migration(100)
    for _ in range(moves):
        _after(migration, Loss("DRAINING", "", began=False))
    delay_s = _after(migration, loss, remaining_s=remaining_s, fraction=fraction)
    assert delay_s is None or delay_s < remaining_s


@given(st.lists(LOSSES, max_size=40))
def test_lost_engines_are_avoided(losses: list[Loss]) -> None:
    """Lives that were lost or stalled are never asked again; one that refused may take the request a moment later."""
    migration = Migration(100)
    lost: list[str] = []
    for loss in losses:
        moved = _after(migration, loss) is not None
        if moved and loss.reason in {"ENGINE_LOST", "ENGINE_STALLED"} and loss.incarnation:
            lost.append(loss.incarnation)
    assert list(migration.avoided) == lost[-AVOIDED_MAX:]


def test_the_first_loss_costs_no_pause() -> None:
    """Another engine can go on at once; each further loss doubles the pause."""
    migration = Migration(10)
    delays = [
        _after(migration, Loss("ENGINE_LOST", "", began=True), fraction=0.0) for _ in range(4)
    ]
    assert delays == [0.0, 0.05, 0.1, 0.2]


def test_a_refusal_costs_a_pause() -> None:
    """An engine that is full needs a moment, and the coordinator to hear of it."""
    assert _after(Migration(1), Loss("CAPACITY_EXHAUSTED", "", began=False), fraction=0.0) == 0.05


def test_poison_is_not_passed_on() -> None:
    """A request that an engine cannot compute, and a defect, end where they are."""
    for reason in ("DECODE_FAILED", "INTERNAL", "INVALID_VALUE", "CANCELLED", "DEADLINE_EXCEEDED"):
        assert _after(Migration(5), Loss(reason, "a", began=False)) is None


def test_its_own_ghost_is_waited_for() -> None:
    """A life that still holds the attempt which left it is asked again; a request that is new there has another's id, and ends."""
    migration = Migration(5)
    ghost = Loss("DUPLICATE_REQUEST", "a", began=False)
    assert _after(migration, ghost) is None
    assert _after(migration, Loss("ENGINE_STALLED", "a", began=True)) == 0
    pauses = [_after(migration, ghost) for _ in range(4)]
    assert all(pause is not None and pause > 0 for pause in pauses)
    assert pauses == sorted(pauses, key=lambda pause: pause or 0)
    assert _after(migration, ghost) is None, "no more often than requests move"
    assert _after(Migration(5), ghost, idempotent=False) is None
