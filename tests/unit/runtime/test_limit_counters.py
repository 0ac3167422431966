"""Counters that only grow: to merge them is commutative, idempotent and monotone, whatever is late, repeated or lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.runtime.limit_counters import (
    EPOCHS_KEPT,
    NO_USE,
    EngineUse,
    Use,
    to_counters,
    use_of,
)

USES = st.builds(
    Use,
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(0, 9),
)
TOLD = st.lists(st.tuples(st.integers(0, 5), USES), max_size=12)


def known(told: list[tuple[int, Use]]) -> list[tuple[int, Use]]:
    """What one knows who has heard this, in this order."""
    engine = EngineUse()
    for epoch, use in told:
        engine.merge(epoch, use)
    return list(engine)


@given(told=TOLD, seed=st.randoms(use_true_random=False))
def test_order_and_repetition_change_nothing(
    told: list[tuple[int, Use]], seed: st.DataObject
) -> None:
    """Two who have heard the same messages, in any order and any number of times, know the same."""
    again = told + told[: len(told) // 2]
    seed.shuffle(again)  # type: ignore[attr-defined]
    assert known(again) == known(told)


@given(told=TOLD, epoch=st.integers(0, 5), use=USES)
def test_what_is_known_only_grows(told: list[tuple[int, Use]], epoch: int, use: Use) -> None:
    """A message never lowers a figure of an epoch that is still kept, and no more than the newest epochs are kept."""
    before, after = dict(known(told)), dict(known([*told, (epoch, use)]))
    assert len(after) <= EPOCHS_KEPT
    for kept, figures in after.items():
        assert before.get(kept, NO_USE).beyond(figures) == NO_USE


@given(told=TOLD)
def test_news_add_up_to_what_was_told(told: list[tuple[int, Use]]) -> None:
    """Nothing is news twice: the news of one epoch add up to the largest of its figures."""
    engine, news = EngineUse(), dict[int, Use]()
    largest = dict[int, Use]()
    for epoch, use in sorted(told, key=lambda one: one[0]):
        news[epoch] = news.get(epoch, NO_USE) + engine.merge(epoch, use)
        largest[epoch] = largest.get(epoch, NO_USE).largest(use)
    assert news == largest


def test_a_late_message_of_an_old_epoch_is_no_news() -> None:
    """An epoch that has been put aside is not opened again: it would count twice."""
    engine = EngineUse()
    for epoch in (7, 8, 9):
        assert engine.merge(epoch, Use(requests=5)) == Use(requests=5)
    assert engine.merge(7, Use(requests=50)) == NO_USE
    assert [epoch for epoch, _ in engine] == [8, 9]


def test_a_message_holds_all_figures() -> None:
    """What is sent is what is read."""
    (counter,) = to_counters("key", "life", [(3, Use(1, 2, 3, 4, 5))])
    assert (counter.key, counter.incarnation, counter.epoch) == ("key", "life", 3)
    assert use_of(counter) == Use(1, 2, 3, 4, 5)
