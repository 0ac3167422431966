"""Which engines run for the deployments."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from services.cli.fleet import UNKNOWN_S, Fleet, Running, Wanted

CHAT = Wanted("chat", "/v1.gguf", "1", replicas=2)
ENGINES = [Running(f"engine-{number}", "chat", "1") for number in range(3)]


def test_too_few_are_started() -> None:
    """One runs and two are wanted: one is started; those that run are kept."""
    orders = Fleet().orders([CHAT], ENGINES[:1], 0)
    assert (orders.start, orders.end, orders.let_go) == ((CHAT,), (), frozenset())


def test_a_new_revision_runs_beside_the_former() -> None:
    """Both of the new are started; those of the former go on, and are not started again when they end."""
    newer = replace(CHAT, revision="2", former_engines=2)
    orders = Fleet().orders([newer], ENGINES[:2], 0)
    assert orders.start == (newer, newer)
    assert orders.end == ()
    assert orders.let_go == {"engine-0", "engine-1"}


def test_fewer_replicas_end_the_youngest() -> None:
    """The surplus of the current revision is ended here: the coordinator does not know what is too many."""
    orders = Fleet().orders([replace(CHAT, replicas=1)], ENGINES, 0)
    assert orders.end == ("engine-1", "engine-2")
    assert Fleet().orders([replace(CHAT, replicas=0)], ENGINES, 0).end == (
        "engine-0",
        "engine-1",
        "engine-2",
    )


def test_a_removed_deployment_is_the_coordinators() -> None:
    """Its engines are let go; the coordinator ends them when what runs on them has ended."""
    removed = replace(CHAT, is_removed=True, former_engines=3)
    orders = Fleet().orders([removed], ENGINES, 0)
    assert (orders.start, orders.end) == ((), ())
    assert len(orders.let_go) == 3


def test_what_nobody_else_ends_is_ended() -> None:
    """An engine of a former revision that the coordinator does not know ends after a while, not in the moment of a restart."""
    fleet, newer = Fleet(), replace(CHAT, revision="2", replicas=0)
    assert fleet.orders([newer], ENGINES[:1], 0).end == ()
    known = replace(newer, former_engines=1)
    assert fleet.orders([known], ENGINES[:1], UNKNOWN_S).end == ()
    assert fleet.orders([newer], ENGINES[:1], UNKNOWN_S + 1).end == ()
    assert fleet.orders([newer], ENGINES[:1], 2 * UNKNOWN_S + 1).end == ("engine-0",)
    assert fleet.orders([], ENGINES[1:2], 2 * UNKNOWN_S + 1).end == ()
    assert fleet.orders([], ENGINES[1:2], 3 * UNKNOWN_S + 1).end == ("engine-1",)


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("12")), max_size=8),
    st.integers(0, 4),
    st.integers(0, 4),
)
def test_orders_lead_to_what_is_wanted(kinds: list[tuple[str, str]], a: int, b: int) -> None:
    """After starts and ends as many of the current revision run as are wanted, and none of them is let go."""
    wanted = [Wanted("a", "/a", "1", a, former_engines=1), Wanted("b", "/b", "2", b)]
    running = [Running(f"engine-{n}", name, revision) for n, (name, revision) in enumerate(kinds)]
    orders = Fleet().orders(wanted, running, 0)
    for each in wanted:
        current = {
            r.name for r in running if (r.deployment, r.revision) == (each.name, each.revision)
        }
        left = current - set(orders.end)
        assert len(left) + orders.start.count(each) == each.replicas
        assert not left & orders.let_go
    assert set(orders.end) <= orders.let_go
