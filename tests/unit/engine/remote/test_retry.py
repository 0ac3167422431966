"""What is tried again, how long it waits, and what bounds it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.remote.failure import RETRYABLE, Failure, ProviderError
from services.engine.remote.retry import Jitter, Retry, RetryBudget, RetryConfig

FAILED = ProviderError(Failure.SERVER_ERROR, "503")
CONFIGS = st.builds(
    RetryConfig,
    max_retries=st.integers(0, 10),
    initial_backoff_s=st.floats(0.0, 10.0),
    max_backoff_s=st.floats(0.0, 120.0),
    multiplier=st.floats(1.0, 10.0),
    jitter=st.sampled_from(Jitter),
    respect_retry_after=st.booleans(),
)
FAILURES = st.builds(
    lambda failure, after: ProviderError(failure, "x", retry_after_s=after),
    st.sampled_from(sorted(RETRYABLE, key=lambda f: f.value)),
    st.one_of(st.none(), st.floats(0.0, 200.0)),
)
FRACTIONS = st.floats(0.0, 1.0, exclude_max=True)


def retry_of(config: RetryConfig | None = None, *, budget: int = 1000) -> Retry:
    return Retry(config or RetryConfig(), RetryBudget(0.0, budget))


@pytest.mark.parametrize("failure", list(Failure))
def test_only_what_may_pass_is_tried_again(failure: Failure) -> None:
    """Too many requests, errors of the server, of the network and time-outs (S3.10)."""
    wait = retry_of().decide(0, ProviderError(failure, "x"), None, 0.5)
    assert (wait is not None) == (
        failure.name in {"RATE_LIMITED", "SERVER_ERROR", "NETWORK", "TIMEOUT"}
    )


@pytest.mark.parametrize("failure", [f for f in Failure if f in RETRYABLE])
def test_without_retries_a_call_is_never_made_again(failure: Failure) -> None:
    """Whatever failed: its request may be one that must not run twice (S3.8)."""
    retry = retry_of(RetryConfig(max_retries=0))
    assert retry.decide(0, ProviderError(failure, "x"), None, 0.5) is None


def test_attempts_are_counted() -> None:
    """Three retries: the fourth attempt is the last."""
    retry = retry_of()
    assert [retry.decide(n, FAILED, None, 0.0) is None for n in range(5)] == [False] * 3 + [
        True
    ] * 2


@pytest.mark.parametrize(
    ("jitter", "fraction", "waits"),
    [
        (Jitter.NONE, 0.9, [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]),
        (Jitter.EQUAL, 0.0, [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]),
        (Jitter.EQUAL, 0.5, [0.075, 0.15, 0.3, 0.6, 1.2, 1.5, 1.5]),
        (Jitter.FULL, 0.25, [0.025, 0.05, 0.1, 0.2, 0.4, 0.5, 0.5]),
    ],
)
def test_waits_grow_and_are_spread(jitter: Jitter, fraction: float, waits: list[float]) -> None:
    """S3.9, with a fraction that is drawn instead of computed from the attempt (W25)."""
    retry = retry_of(RetryConfig(10, 0.1, 2.0, 2.0, jitter))
    assert [retry.decide(n, FAILED, None, fraction) for n in range(7)] == pytest.approx(waits)


def test_what_the_provider_asks_for_is_the_least() -> None:
    """Not sooner, and not all at the same moment; to the point where jitter is switched off."""
    asked = ProviderError(Failure.RATE_LIMITED, "x", retry_after_s=7.0)
    spread_out = [retry_of().decide(0, asked, None, f) or 0.0 for f in (0.0, 0.5, 0.99)]
    assert spread_out == pytest.approx([7.0, 7.5, 7.99])
    assert retry_of(RetryConfig(jitter=Jitter.NONE)).decide(0, asked, None, 0.9) == 7.0
    assert retry_of(RetryConfig(respect_retry_after=False)).decide(0, asked, None, 0.0) == 0.5


@pytest.mark.parametrize(("asked_s", "remaining_s"), [(61.0, None), (5.0, 5.0), (5.0, 1.0)])
def test_a_wait_that_is_too_long_is_not_begun(asked_s: float, remaining_s: float | None) -> None:
    """Longer than the longest backoff, or than the deadline allows: given up at once, and the retry time is the provider's."""
    asked = ProviderError(Failure.RATE_LIMITED, "x", retry_after_s=asked_s)
    assert retry_of().decide(0, asked, remaining_s, 0.0) is None
    assert asked.to_error("openai", "gpt-9").retry_after_s == asked_s


@given(
    config=CONFIGS,
    deadline_s=st.floats(0.0, 100.0),
    attempts=st.lists(st.tuples(FAILURES, FRACTIONS, st.floats(0.0, 5.0)), max_size=12),
)
def test_waiting_never_passes_the_deadline(
    config: RetryConfig, deadline_s: float, attempts: list[tuple[ProviderError, float, float]]
) -> None:
    """However long attempts take, and whatever the provider asks for: every wait ends before the deadline."""
    retry, now = retry_of(config), 0.0
    for number, (failure, fraction, took_s) in enumerate(attempts):
        now += took_s
        wait = retry.decide(number, failure, deadline_s - now, fraction)
        if wait is None:
            return
        assert number < config.max_retries
        now += wait
        assert now <= deadline_s + 1e-9
        if failure.retry_after_s is not None and config.respect_retry_after:
            assert failure.retry_after_s <= wait
        else:
            assert wait <= config.max_backoff_s


@given(
    ratio=st.integers(0, 1000).map(lambda n: n / 1000),
    initial=st.integers(0, 20),
    requests=st.integers(0, 300),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_budget_bounds_how_much_load_grows(
    ratio: float, initial: int, requests: int, seed: int
) -> None:
    """Attempts <= requests * (1 + ratio) + initial, in whatever order requests come and fail."""
    drawn = random.Random(seed)
    retry = Retry(RetryConfig(max_retries=10), RetryBudget(ratio, initial))
    attempts, failed = 0, []
    for _ in range(requests):
        retry.first_attempt()
        attempts += 1
        failed.append(0)
        while failed and drawn.random() < 0.7:
            number = failed.pop(drawn.randrange(len(failed)))
            if retry.decide(number, FAILED, None, drawn.random()) is not None:
                attempts += 1
                failed.append(number + 1)
    assert attempts <= requests * (1 + ratio) + initial


def test_quiet_times_do_not_pay_for_a_storm() -> None:
    """A million good requests leave a hundred retries, not two hundred thousand; refusals cost nothing."""
    budget = RetryBudget(0.2, 10)
    assert budget.left == 10
    for _ in range(1_000_000):
        budget.earn()
    assert budget.left == 100
    assert sum(budget.spend() for _ in range(500)) == 100
    for _ in range(5):
        budget.earn()
    assert (budget.spend(), budget.spend()) == (True, False)


def test_giving_up_costs_nothing() -> None:
    """Only a retry that is made is taken from the budget."""
    retry = Retry(RetryConfig(), RetryBudget(0.0, 1))
    for _ in range(10):
        assert retry.decide(0, FAILED, 0.1, 0.5) is None
        assert retry.decide(3, FAILED, None, 0.5) is None
        assert retry.decide(0, ProviderError(Failure.REJECTED, "400"), None, 0.5) is None
    assert retry.decide(0, FAILED, None, 0.5) is not None
    assert retry.decide(0, FAILED, None, 0.5) is None
