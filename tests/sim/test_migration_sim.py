"""Whole requests through a gateway, a coordinator and engines that crash, hang, drain and lose each other, from a seed.

After each step no client has been told a wrong, missing or second token, and every lease belongs to live sessions within all
bounds (I1, I4, I6). When the faults end, each request has had one end, nothing is left of any, and new ones are answered. A
failure prints its seed and the command that replays it (I8).
"""

from __future__ import annotations

import os
from collections import Counter
from random import Random

import pytest

from services.coordinator.limits import Limits
from services.coordinator.waiting import Want
from tests.support.chaos_coordinator import INTERVAL_S, ONCE, Coordinator
from tests.support.chaos_engine import CAPACITY, PROMPT_TOKENS, Engine, token_at
from tests.support.chaos_gateway import MOVES_MAX, Gateway, Request
from tests.support.chaos_time import Time

SCHEDULES = 2000
SEED_VARIABLE = "CARAVAN_SIM_SEED"
MODELS = ("demo", ONCE)
LIMITS = Limits(
    interval_s=INTERVAL_S,
    engines_max=4,
    gateways_max=4,
    leases_max=16,
    leases_per_engine_max=CAPACITY,
    queued_max=6,
    queue_s=6.0,
    cancel_budget_s=2.5,
)
FAULTS_END_S = 7.0
CALM_S = 18.0
LATE_S = 25.0
SETTLED_S = 36.0
LOST = {"ENGINE_LOST", "ENGINE_STALLED", "DRAINING"}
REASONS = LOST | {
    "finished",
    "left",
    "broken",
    "SERVICE_UNAVAILABLE",
    "SESSION_UNKNOWN",
    "NO_ENGINE",
    "MODEL_LOADING",
    "CAPACITY_EXHAUSTED",
    "QUEUE_TIMEOUT",
    "DUPLICATE_REQUEST",
}


class Simulation:
    """One schedule."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.time = Time(self.random)
        self.coordinator = Coordinator(self.time, LIMITS)
        names = (("engine-0", MODELS[0]), ("engine-1", MODELS[0]), ("engine-2", ONCE))
        self.engines = {
            name: Engine(self.time, self.coordinator, name, model) for name, model in names
        }
        self.gateways = [
            Gateway(self.time, self.coordinator, self.engines, f"gateway-{i}") for i in range(2)
        ]
        self.requests: list[Request] = []
        self.late: list[Request] = []

    def run(self) -> None:
        """Runs to the end and checks that nothing is left."""
        self.time.after(0.5, self.ask)
        self.time.after(0.6, self.fault)
        self.time.after(CALM_S, self.calm)
        self.time.after(LATE_S, self.ask_late)
        while self.time.step(SETTLED_S):
            if self.coordinator.touched:
                self.coordinator.touched = False
                self.coordinator.state.check_integrity()
            assert all(len(gateway.held) <= len(gateway.requests) for gateway in self.gateways)
        for request in self.requests:
            self.check(request)
        self.check_nothing_is_left()

    # --- clients -------------------------------------------------------------------------------------------------

    def ask(self) -> None:
        """A client comes; some leave before the end."""
        if self.time.now > FAULTS_END_S:
            return
        request = self.request(self.random.choice((MODELS[0], MODELS[0], ONCE)))
        if self.random.random() < 0.1:
            self.time.after(self.random.uniform(0, 3), request.leave)
        self.time.after(self.random.expovariate(1.2), self.ask)

    def calm(self) -> None:
        """No message is late any more, so nobody is taken for dead."""
        self.time.calm = True

    def ask_late(self) -> None:
        """Long after the last fault everything works."""
        self.late = [self.request(model) for model in MODELS]

    def request(self, model: str) -> Request:
        gateway = self.random.choice(self.gateways)
        length = self.random.randint(1, 30)
        request = Request(gateway, self.coordinator.ids("req"), model, length)
        self.requests.append(request)
        return request

    def check(self, request: Request) -> None:
        """One end, and all tokens or the first ones of them."""
        assert len(request.ends) == 1, (request.request_id, request.ends)
        (end,) = request.ends
        assert end in REASONS, end
        expected = [token_at(request.seed, place) for place in range(request.length)]
        assert request.told == expected[: len(request.told)]
        assert len(request.starts) <= 1
        assert request.moves <= MOVES_MAX
        if end in LOST and request.model != ONCE:
            assert request.moves == MOVES_MAX, end
        if end == "finished":
            assert request.finished is not None
            assert request.told == expected
            usage = request.finished.usage
            assert (usage.prompt_tokens, usage.completion_tokens) == (
                PROMPT_TOKENS,
                request.length,
            )
            assert [usage.cached_tokens] == request.starts
        if request in self.late:
            assert end == "finished", end

    def check_nothing_is_left(self) -> None:
        """No table holds anything; requests of a deployment that is not idempotent were begun once at most."""
        state = self.coordinator.state
        assert len(state.leases) == len(state.waiting) == 0, list(state.leases)
        assert len(state._relearning.claimed) == len(state._relearning.orphaned) == 0
        assert not any(engine.calls for engine in self.engines.values())
        assert not any(gateway.requests or len(gateway.held) for gateway in self.gateways)
        begun = Counter(id_ for engine in self.engines.values() for id_ in engine.begun)
        once = {request.request_id for request in self.requests if request.model == ONCE}
        assert not [id_ for id_ in once if begun[id_] > 1]
        gateway_id = self.gateways[0].session_id
        assert gateway_id is not None
        for model, engines in ((MODELS[0], 2), (ONCE, 1)):
            for _ in range(engines * CAPACITY):
                ids = self.coordinator.ids("final"), self.coordinator.ids("lease")
                assert state.route(Want(ids[0], gateway_id, model, ids[1], self.time.now))

    # --- faults --------------------------------------------------------------------------------------------------

    def fault(self) -> None:
        """A process dies or hangs, a connection breaks, or an engine is taken out of service for a while."""
        if self.time.now > FAULTS_END_S:
            return
        engine = self.random.choice(list(self.engines.values()))
        gateway = self.random.choice(self.gateways)
        kinds = ("kill", "hang", "drain", "stop", "calls", "stream", "coordinator", "gateway")
        kind = self.random.choices(kinds, (6, 3, 3, 2, 3, 3, 2, 1))[0]
        if kind == "kill":
            engine.restart()
        elif kind == "hang":
            engine.hang(hung=True)
            self.time.after(self.random.uniform(0.2, 6), lambda: engine.hang(hung=False))
        elif kind == "drain":
            self.drain(engine)
        elif kind == "stop":
            finish_s = self.random.uniform(0, 2)
            engine.drain(finish_s)
            self.time.after(finish_s + 0.5, engine.restart)
        elif kind == "calls":
            for call in list(engine.calls.values()):
                call.break_off()
        elif kind == "stream":
            self.coordinator.part(self.random.choice((engine, gateway)).stream)
        elif kind == "coordinator":
            self.coordinator.crash(self.random.uniform(0.1, 2))
        else:
            gateway.restart()
        self.time.after(self.random.expovariate(0.9), self.fault)

    def drain(self, engine: Engine) -> None:
        """By an operator, who puts it back later."""
        state, coordinator = self.coordinator.state, self.coordinator
        if not coordinator.up or state.engines.find(engine.engine_id) is None:
            return
        grace_s = self.random.uniform(0, 1)
        coordinator.perform(
            state.drain_engine(engine.engine_id, grace_s, stop=False, now=self.time.now)
        )
        self.time.after(self.random.uniform(0.5, 4), lambda: self.undrain(engine))

    def undrain(self, engine: Engine) -> None:
        """A command is lost with its stream, so it is repeated until the engine has obeyed."""
        state = self.coordinator.state
        if self.coordinator.up and state.engines.find(engine.engine_id) is not None:
            self.coordinator.perform(state.undrain_engine(engine.engine_id, self.time.now))
        if engine.draining or engine.hung or not engine.stream.open:
            self.time.after(1.0, lambda: self.undrain(engine))


def run(seed: int) -> Simulation:
    """Runs one schedule; a failure tells how to replay it."""
    simulation = Simulation(seed)
    try:
        simulation.run()
    except Exception as error:
        command = f"{SEED_VARIABLE}={seed} python -m pytest tests/sim/test_migration_sim.py"
        raise AssertionError(f"seed {seed} fails; replay: {command}") from error
    return simulation


@pytest.mark.timeout(600)
def test_answers_survive_any_schedule() -> None:
    """I1, I4 and I6 hold in two thousand seeded schedules, or in the one seed that is asked for; most answers are whole."""
    asked = os.environ.get(SEED_VARIABLE)
    ends: Counter[str] = Counter()
    moved = adopted = 0
    for seed in [int(asked)] if asked else range(SCHEDULES):
        simulation = run(seed)
        adopted += simulation.coordinator.adopted
        for request in simulation.requests:
            ends[request.ends[0]] += 1
            moved += request.moves > 0 and request.ends[0] == "finished"
    print(ends, f"finished after a move: {moved}; leases taken over: {adopted}")
    if not asked:
        assert moved > SCHEDULES / 2
        assert adopted > SCHEDULES / 10
        assert ends["finished"] > 0.7 * ends.total()


def test_a_seed_replays_its_schedule() -> None:
    """Two runs of one seed are equal, token by token (I8)."""

    def history(seed: int) -> list[str]:
        simulation = run(seed)
        return [f"{request.ends} {request.told}" for request in simulation.requests]

    assert history(7) == history(7)
    assert history(7) != history(8)
