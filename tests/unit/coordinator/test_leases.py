"""The lease table: counts kept with the table, sweeps, order (S0, W57)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.leases import Lease, LeaseTable


def lease(number: int, engine: str = "e", gateway: str = "g", model: str = "m") -> Lease:
    """A lease of its own request."""
    return Lease(f"lease-{number}", f"req-{number}", model, engine, gateway, float(number))


def test_counts_follow_grants_and_releases() -> None:
    """Depth by engine, gateway and model is 2/1/0 after two grants and one of another, and 0 after the releases."""
    table = LeaseTable()
    for one in (lease(1), lease(2), lease(3, "f", "h", "n")):
        table.grant(one)
    assert (len(table), table.on_engine("e"), table.on_engine("f"), table.on_engine("?")) == (
        3,
        2,
        1,
        0,
    )
    assert (table.of_gateway("g"), table.of_gateway("h")) == (2, 1)
    assert (table.of_model("m"), table.of_model("n")) == (2, 1)
    for number in (1, 2, 3):
        assert table.release(f"lease-{number}") is not None
    assert (len(table), table.on_engine("e"), table.of_gateway("g"), table.of_model("m")) == (
        0,
        0,
        0,
        0,
    )


def test_the_leases_of_a_tenant_are_counted_and_listed() -> None:
    """Oldest first; who named no tenant shares the empty one."""
    table = LeaseTable()
    for number, tenant in enumerate(("a", "", "a")):
        one = Lease(f"lease-{number}", f"req-{number}", "m", "e", "g", 0.0, tenant=tenant)
        table.grant(one)
    assert (table.count_tenant("a"), table.count_tenant(""), table.count_tenant("b")) == (2, 1, 0)
    assert [found.lease_id for found in table.of_tenant("a")] == ["lease-0", "lease-2"]
    table.release("lease-0")
    assert table.count_tenant("a") == 1


def test_a_second_release_is_no_operation() -> None:
    """Releasing twice never takes the depth below what is held (W57: double decrement)."""
    table = LeaseTable()
    table.grant(lease(1))
    table.grant(lease(2))
    assert table.release("lease-1") == lease(1)
    assert table.release("lease-1") is None
    assert (len(table), table.on_engine("e")) == (1, 1)


def test_a_request_id_is_held_once() -> None:
    """A second lease of a request, or a lease id again, is a defect of the caller and changes nothing."""
    table = LeaseTable()
    table.grant(lease(1))
    with pytest.raises(ValueError, match="held already"):
        table.grant(Lease("lease-9", "req-1", "m", "e", "g", 0.0))
    with pytest.raises(ValueError, match="held already"):
        table.grant(Lease("lease-1", "req-9", "m", "e", "g", 0.0))
    table.check_integrity()
    assert len(table) == 1


def test_the_listing_is_oldest_first() -> None:
    """Iterating follows the order of grants, whatever was released between."""
    table = LeaseTable()
    for number in (5, 3, 9, 1):
        table.grant(lease(number))
    table.release("lease-3")
    table.grant(lease(3))
    assert [one.lease_id for one in table] == ["lease-5", "lease-9", "lease-1", "lease-3"]


Operation = tuple[str, int, int, int]
OPERATIONS: st.SearchStrategy[list[Operation]] = st.lists(
    st.tuples(
        st.sampled_from(["grant", "grant", "release", "sweep_engine", "sweep_gateway"]),
        st.integers(0, 9),
        st.integers(0, 2),
        st.integers(0, 1),
    ),
    max_size=60,
)


@given(OPERATIONS)
def test_sweeps_and_releases_in_any_order_keep_the_counts(operations: list[Operation]) -> None:
    """A sweep that races releases removes each lease once, and the indexes stay a recount of the table."""
    table = LeaseTable()
    held: dict[str, Lease] = {}
    for what, number, engine, gateway in operations:
        one = lease(number, f"e{engine}", f"g{gateway}")
        if what == "grant" and one.lease_id not in held:
            table.grant(one)
            held[one.lease_id] = one
        elif what == "release":
            assert table.release(one.lease_id) == held.pop(one.lease_id, None)
        elif what == "sweep_engine":
            gone = [h for h in held.values() if h.engine_id == one.engine_id]
            assert list(table.sweep_engine(one.engine_id)) == gone
            held = {k: h for k, h in held.items() if h not in gone}
        elif what == "sweep_gateway":
            gone = [h for h in held.values() if h.gateway_id == one.gateway_id]
            assert list(table.sweep_gateway(one.gateway_id)) == gone
            held = {k: h for k, h in held.items() if h not in gone}
        table.check_integrity()
        assert list(table) == list(held.values())
