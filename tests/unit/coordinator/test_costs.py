"""What the coordinator does about budgets."""

from __future__ import annotations

import dataclasses

import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.deployment import (
    Budget,
    Deployment,
    Fallback,
    FallbackReason,
    OnExceeded,
    Runtime,
)
from services.coordinator.effects import BudgetCrossing, Effects
from services.coordinator.limits import Limits
from services.coordinator.state import CoordinatorState
from services.coordinator.waiting import Want
from services.runtime.errors import CaravanError
from tests.support.refusals import attempt

CENT = 10_000_000
LIMITS = Limits(queue_s=100.0)


class World:
    """A coordinator with one gateway, an engine for each deployment, and a clock. Costs are in cents."""

    def __init__(self, *deployments: Deployment, places: int = 4) -> None:
        self.now = 1_000.0
        self.state = CoordinatorState(LIMITS)
        self.state.join_gateway("gateway", self.now)
        self.sessions: dict[str, int] = {}
        self._requests = 0
        self.apply(*deployments)
        for deployment in deployments:
            model = engine_pb.ModelInfo(name=deployment.name, max_sequences=places)
            self.sessions[deployment.name], _ = self.state.join_engine(
                f"engine-{deployment.name}",
                "127.0.0.1:1",
                model,
                engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_IDLE),
                now=self.now,
                wall=self.now,
                incarnation=f"life-{deployment.name}",
            )

    def apply(self, *deployments: Deployment) -> None:
        self.state.deployments.apply(deployments, remove_others=False, now=self.now, wall=0)

    def report(self, name: str, **cents: int) -> Effects:
        """The engine of a deployment tells what each tenant has cost since it started; `_` is the one without a name."""
        spend = [
            pb.SpendCounter(tenant=tenant.strip("_"), nanousd=cost * CENT, requests=1)
            for tenant, cost in cents.items()
        ]
        load = engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_IDLE)
        session = self.sessions[name]
        return self.state.report_engine(session, None, load, self.now, spend=spend)

    def route(self, name: str, tenant: str = "", **fields: object) -> str | None:
        """Asks for a lease; the deployment that grants it, or None where the request waits."""
        self._requests += 1
        number = self._requests
        want = Want(f"req-{number}", "gateway", name, f"lease-{number}", self.now, tenant=tenant)
        granted = self.state.route(dataclasses.replace(want, **fields))  # type: ignore[arg-type]
        return None if granted is None else granted.lease.model

    def refusal(self, name: str, tenant: str = "", **fields: object) -> CaravanError:
        """Asks for a lease that must be refused; returns why."""
        with pytest.raises(CaravanError) as caught:
            self.route(name, tenant, **fields)
        return caught.value

    def pass_time(self, seconds: float) -> Effects:
        """Time passes, and the sweeper runs. The peers have spoken."""
        self.now += seconds
        for engine in self.state.engines:
            engine.reported_at = self.now
        for gateway in self.state.gateways:
            gateway.heard_at = self.now
        first = self.state.expire(self.now)  # After so long a pause it judges no peer.
        return first + self.state.expire(self.now)


def chat(on_exceeded: OnExceeded = OnExceeded.REJECT, **budget: float) -> Deployment:
    """A deployment with a budget."""
    return Deployment(
        "chat",
        "gpt-4o",
        runtime=Runtime.OPENAI,
        budget=Budget(**budget, on_exceeded=on_exceeded),
    )


def test_a_spent_budget_refuses_until_enough_has_left_the_hour() -> None:
    """Exactly at the limit; the error says which limit, and the time is right to the second."""
    world = World(chat(usd_per_hour=1))
    world.report("chat", _=60)
    world.pass_time(1_800)
    world.report("chat", _=99)
    assert world.route("chat") == "chat"
    world.report("chat", _=100)
    error = world.refusal("chat")
    assert (error.reason, error.metadata) == (
        "BUDGET_EXCEEDED",
        {"model": "chat", "budget": "usd_per_hour"},
    )
    assert error.retry_after_s is not None
    assert 1_800 <= error.retry_after_s <= 1_860
    world.pass_time(error.retry_after_s - 1)
    world.refusal("chat")
    world.pass_time(1)
    assert world.route("chat") == "chat"


def test_the_day_counts_too() -> None:
    """After the hour is free again, the day is not."""
    world = World(chat(usd_per_hour=1, usd_per_day=1.5))
    world.report("chat", _=100)
    world.pass_time(4_000)
    world.report("chat", _=150)
    world.pass_time(4_000)
    error = world.refusal("chat")
    assert error.metadata["budget"] == "usd_per_day"
    assert error.retry_after_s is not None
    world.pass_time(error.retry_after_s)
    assert world.route("chat") == "chat"


def test_a_tenant_s_part_is_its_own() -> None:
    """Another tenant goes on; the error names whose part it is."""
    world = World(chat(tenant_usd_per_hour=0.5))
    world.report("chat", ants=50, bees=49)
    error = world.refusal("chat", "ants")
    assert error.metadata["budget"] == "tenant_usd_per_hour"
    assert "'ants'" in error.message
    assert world.route("chat", "bees") == "chat"
    assert world.route("chat") == "chat"


def test_what_runs_already_goes_on() -> None:
    """A request that has lost its engine gets another, whatever the budget."""
    world = World(chat(usd_per_hour=1))
    world.report("chat", _=500)
    assert world.route("chat", resumed=True, wait_s=10.0) == "chat"


def test_a_fallback_for_the_reason_takes_over() -> None:
    """One for other reasons does not; nor does one whose budget is spent as well."""
    main = dataclasses.replace(
        chat(usd_per_hour=1),
        fallback=(
            Fallback("busy", frozenset({FallbackReason.CAPACITY})),
            Fallback("local", frozenset({FallbackReason.BUDGET})),
        ),
    )
    budget = Budget(usd_per_hour=1)
    busy, local = (Deployment(name, "gpt-4o", budget=budget) for name in ("busy", "local"))
    world = World(main, busy, local)
    world.report("chat", _=100)
    assert world.route("chat", may_fall_back=True) == "local"
    assert world.refusal("chat").reason == "BUDGET_EXCEEDED"
    world.report("local", _=100)
    assert world.refusal("chat", may_fall_back=True).metadata["model"] == "chat"


def test_those_that_wait_are_placed_anew_when_the_budget_is_spent() -> None:
    """Before the place that becomes free is given to them: to a fallback, or refused. What runs and waits to go on stays."""
    main = dataclasses.replace(
        chat(usd_per_hour=1), fallback=(Fallback("local", frozenset({FallbackReason.BUDGET})),)
    )
    world = World(main, Deployment("local", "gpt-4o"), places=1)
    assert world.route("chat") == "chat"
    assert world.route("chat", wait_s=50.0) is None
    assert world.route("chat", wait_s=50.0, may_fall_back=True) is None
    assert world.route("chat", wait_s=50.0, resumed=True) is None
    effects = world.report("chat", _=100)
    assert [(one.request_id, one.error.reason) for one in effects.refusals] == [
        ("req-2", "BUDGET_EXCEEDED")
    ]
    assert [(one.lease.request_id, one.lease.model) for one in effects.grants] == [
        ("req-3", "local")
    ]
    released = world.state.release("lease-1", world.now)
    assert released is not None
    assert [one.lease.request_id for one in released.grants] == ["req-4"]
    world.state.check_integrity()


def test_it_is_told_once_and_again_when_it_is_over() -> None:
    """With warn nothing else happens; each later crossing is told again."""
    world = World(chat(OnExceeded.WARN, usd_per_hour=1, tenant_usd_per_hour=0.6))
    crossed = BudgetCrossing("chat", None, "usd_per_hour", OnExceeded.WARN, is_over=True)
    tenant = BudgetCrossing("chat", "ants", "tenant_usd_per_hour", OnExceeded.WARN, is_over=True)
    assert world.report("chat", ants=60).crossings == (tenant,)
    assert world.report("chat", ants=60, bees=40).crossings == (crossed,)
    assert world.report("chat", ants=61, bees=41).crossings == ()
    assert world.route("chat", "ants") == "chat"
    assert world.state.costs.is_over("chat")
    over = world.pass_time(4_000).crossings
    assert {(one.tenant, one.is_over) for one in over} == {(None, False), ("ants", False)}
    assert not world.state.costs.is_over("chat")
    assert world.report("chat", ants=200, bees=41).crossings == (crossed, tenant)


def test_another_budget_is_judged_at_once() -> None:
    """A larger one lets requests through; none at all forgets that one was spent."""
    world = World(chat(OnExceeded.THROTTLE, usd_per_hour=1))
    world.report("chat", _=100)
    world.apply(chat(usd_per_hour=1))
    assert world.refusal("chat").reason == "BUDGET_EXCEEDED"
    world.apply(chat(usd_per_hour=1.01))
    assert world.route("chat") == "chat"
    world.pass_time(1)
    model = world.state.models.find("chat")
    assert model is not None
    assert (model.is_throttled, model.limit) == (False, 4)
    assert not world.state.costs.is_over("chat")


def test_throttling_halves_the_places() -> None:
    """What runs stays, and who waits gets a place when fewer than half are taken."""
    world = World(chat(OnExceeded.THROTTLE, usd_per_hour=1), places=5)
    assert [world.route("chat") for _ in range(3)] == ["chat"] * 3
    world.report("chat", _=100)
    error = world.refusal("chat")
    assert (error.reason, error.metadata["capacity"]) == ("CAPACITY_EXHAUSTED", "2")
    assert world.route("chat", wait_s=99.0) is None
    for number in (1, 2):
        released = world.state.release(f"lease-{number}", world.now)
        assert released is not None
        assert len(released.grants) == number - 1
    assert world.route("chat", wait_s=99.0) is None
    assert len(world.state.waiting) == 1
    world.state.check_integrity()


def test_places_come_back_to_those_that_wait() -> None:
    """In the sweep in which the hour is over."""
    world = World(chat(OnExceeded.THROTTLE, usd_per_hour=1), places=2)
    world.report("chat", _=100)
    assert world.route("chat") == "chat"
    world.pass_time(3_595)
    assert world.route("chat", wait_s=90.0) is None
    grants = [grant for _ in range(80) for grant in world.pass_time(1).grants]
    assert [grant.lease.request_id for grant in grants] == ["req-2"]


def test_a_single_place_is_not_halved() -> None:
    """Throttling never stops a deployment."""
    world = World(chat(OnExceeded.THROTTLE, usd_per_hour=1), places=1)
    world.report("chat", _=100)
    assert world.route("chat") == "chat"


def test_a_throttled_tenant_has_half_of_the_places() -> None:
    """Beyond it, it is refused and does not wait; others have what is left."""
    world = World(chat(OnExceeded.THROTTLE, tenant_usd_per_hour=0.5))
    world.report("chat", ants=50)
    assert [world.route("chat", "ants") for _ in range(2)] == ["chat"] * 2
    assert world.refusal("chat", "ants", wait_s=9.0).reason == "BUDGET_EXCEEDED"
    assert [world.route("chat", "bees") for _ in range(2)] == ["chat"] * 2


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["route"] * 4 + ["finish"] * 2 + ["report", "time"]),
        st.integers(1, 60),
        st.sampled_from(["ants", "bees"]),
    ),
    min_size=10,
    max_size=60,
)


class Load:
    """Requests of a deployment whose costs, in cents, are known beforehand; those that are let in run until they finish."""

    def __init__(self, *deployments: Deployment) -> None:
        self.world = World(*deployments, places=2)
        self.costs: dict[str, tuple[str, int]] = {}
        self.running: list[str] = []
        self.spent: list[tuple[float, str, int]] = []
        self.told = 0
        self.under_way = 0

    def route(self, cost: int, tenant: str) -> None:
        """A request that waits for its turn, if there is a queue."""
        granted, refused = attempt(lambda: self.world.route("chat", tenant, wait_s=90.0))
        assert refused in {None, "BUDGET_EXCEEDED"}
        request_id = f"req-{self.world._requests}"
        self.costs[request_id] = tenant, cost
        if granted is not None:
            self.let_in(request_id)

    def let_in(self, request_id: str) -> None:
        """Notes what runs now, or has not been told. What was told must be below the limit."""
        assert sum(cost for at, _, cost in self.spent[: self.told] if self.is_recent(at)) < 100
        self.running.append(request_id)
        untold = sum(cost for _, _, cost in self.spent[self.told :])
        self.under_way = untold + sum(self.costs[one][1] for one in self.running)

    def take(self, effects: Effects | None) -> None:
        """What the state says."""
        for grant in () if effects is None else effects.grants:
            self.let_in(grant.lease.request_id)

    def finish(self) -> None:
        """The oldest request ends."""
        if self.running:
            request_id = self.running.pop(0)
            self.spent.append((self.world.now, *self.costs[request_id]))
            lease = self.world.state.leases.of_request(request_id)
            assert lease is not None
            self.take(self.world.state.release(lease.lease_id, self.world.now))

    def report(self) -> None:
        """The engine tells all that was spent."""
        tenants = {tenant for _, tenant, _ in self.spent}
        self.told = len(self.spent)
        self.take(self.world.report("chat", **{one: self.of_tenant(one) for one in tenants}))

    def of_tenant(self, tenant: str) -> int:
        return sum(cost for _, other, cost in self.spent if other == tenant)

    def within_the_hour(self) -> int:
        return sum(cost for at, _, cost in self.spent if self.is_recent(at))

    def is_recent(self, at: float) -> bool:
        return at > self.world.now - 3_600


@given(steps=STEPS)
def test_a_budget_is_exceeded_by_no_more_than_what_was_under_way(
    steps: list[tuple[str, int, str]],
) -> None:
    """What was spent within any hour is below the limit and what ran, or had not been told, when the last one was let in.

    That one may have waited: nobody is let in from the queue either once the coordinator knows.
    """
    load = Load(chat(usd_per_hour=1))
    for step, number, tenant in steps:
        if step == "route":
            load.route(number, tenant)
        elif step == "finish":
            load.finish()
        elif step == "report":
            load.report()
        else:
            load.take(load.world.pass_time(number * 60))
        spent = load.within_the_hour()
        assert spent < 100 + load.under_way or not spent
        load.world.state.check_integrity()
