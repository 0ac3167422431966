"""What every routing policy must hold, and what each is for."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator.affinity import Affinity, Whereabouts
from services.coordinator.effects import Grant
from services.coordinator.limits import Limits
from services.coordinator.policies import NAMES, policy_factory
from services.coordinator.routing import PowerOfTwo
from services.coordinator.state import CoordinatorState
from services.coordinator.waiting import Want


class World:
    """A state with one gateway and a policy; requests are numbered."""

    def __init__(self, policy: str, seed: int = 1, load_factor: float = 1.25) -> None:
        limits = Limits(engines_max=2000, leases_per_engine_max=64)
        self.state = CoordinatorState(
            limits, policy_factory(policy, Random(seed).random, load_factor)
        )
        self.state.join_gateway("gateway", 0.0)
        self.requests = 0

    def engine(self, engine_id: str, capacity: int = 16, model: str = "demo") -> int:
        """Adds an engine; returns its session."""
        info = engine_pb.ModelInfo(name=model, max_sequences=capacity)
        load = engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_IDLE)
        session, _ = self.state.join_engine(engine_id, "h:1", info, load, now=0.0, wall=0.0)
        return session

    def route(self, chain: str = "", session_id: str = "", model: str = "demo") -> Grant:
        """Asks; each letter of `chain` is a message of the prompt, so each prefix of it is a hash."""
        self.requests += 1
        affinity = tuple(chain[: end + 1].encode() for end in range(len(chain)))
        number = self.requests
        want = Want(
            f"req-{number}",
            "gateway",
            model,
            f"lease-{number}",
            0.0,
            affinity=affinity,
            session_id=session_id,
        )
        grant = self.state.route(want)
        assert grant is not None
        return grant

    def where(self, chain: str = "", session_id: str = "", model: str = "demo") -> str:
        """The engine of a request that ends at once."""
        grant = self.route(chain, session_id, model)
        self.state.release(grant.lease.lease_id, 0.0)
        return grant.lease.engine_id


@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_every_policy_uses_all_room_and_no_more(policy: str, seed: int) -> None:
    """Engines of all sizes come, fill, drain and go at random; the integrity of the state holds at every step."""
    random = Random(seed)
    world = World(policy, seed)
    sessions: dict[str, int] = {}
    held: list[str] = []
    for step in range(600):
        action = random.random()
        if action < 0.05 or not sessions:
            sessions[f"engine-{step}"] = world.engine(f"engine-{step}", random.randint(1, 6))
        elif action < 0.08:
            name = random.choice(sorted(sessions))
            world.state.end_session(sessions.pop(name), 0.0)
            held = [h for h in held if world.state.leases.find(h)]
        elif action < 0.7 and world.state.models.find("demo").queue.room:  # type: ignore[union-attr]
            held.append(world.route(random.choice(["", "a", "ab", "cd"])).lease.lease_id)
        elif held:
            world.state.release(held.pop(random.randrange(len(held))), 0.0)
        world.state.check_integrity()


def test_round_robin_takes_each_in_turn() -> None:
    """Whatever their load; a full one is passed over."""
    world = World("round_robin")
    for name, capacity in (("a", 9), ("b", 1), ("c", 9)):
        world.engine(name, capacity)
    assert [world.route().lease.engine_id for _ in range(7)] == list("abcacac")


def test_power_of_two_is_nearly_even() -> None:
    """Ten thousand requests on a hundred engines: the fullest is within a few of the mean, far better than at random."""
    world = World("power_of_two")
    for number in range(100):
        world.engine(f"engine-{number}", 64)
    for _ in range(3200):
        world.route()
    loads = Counter(lease.engine_id for lease in world.state.leases)
    assert len(loads) == 100
    assert max(loads.values()) <= 32 + 5
    assert min(loads.values()) >= 32 - 9


def test_the_longest_known_prefix_wins() -> None:
    """A continued conversation goes to its own engine, not to the one that shares only its system prompt."""
    world = World("affinity")
    for number in range(8):
        world.engine(f"engine-{number}")
    first = world.where("sA")
    # The others are busier from here on, so that only affinity brings a request anywhere but to an empty one.
    others = {world.where(chain) for chain in ("tB", "uC", "vD", "wE", "xF")} - {first}
    assert others
    elsewhere = next(
        chain for chain in ("tB", "uC", "vD", "wE", "xF") if world.where(chain) != first
    )
    assert world.where("sAbC") == first
    assert world.where(elsewhere + "more") == world.where(elsewhere) != first


def test_affinity_is_bounded() -> None:
    """One popular prompt spreads before its engine holds more than the factor times the mean."""
    world = World("affinity", load_factor=1.25)
    for number in range(4):
        world.engine(f"engine-{number}", 64)
    for asked in range(1, 161):
        world.route("popular")
        loads = Counter(lease.engine_id for lease in world.state.leases)
        bound = 1.25 * asked / 4
        # Beyond the bound an engine is only ever taken as the less loaded of two.
        assert max(loads.values()) <= bound + 2
    assert len(loads) == 4


def test_a_session_sticks_to_its_engine_while_that_lives() -> None:
    """Also beyond the bound; when the engine is full or gone, another takes over and keeps it."""
    world = World("affinity")
    sessions = {name: world.engine(name, 4) for name in ("a", "b", "c")}
    home = world.where("p", session_id="s")
    for _ in range(4):
        assert world.route("q", session_id="s").lease.engine_id == home
    away = world.route("p", session_id="s").lease.engine_id
    assert away != home
    assert world.where("p", session_id="s") == away
    world.state.end_session(sessions[away], 0.0)
    last = world.where("p", session_id="s")
    assert last not in {away}
    assert world.where("zzz", session_id="s") == last


def test_sessions_of_two_models_are_two() -> None:
    """The same id of a conversation with another model is another conversation."""
    world = World("affinity")
    world.engine("a", model="demo")
    world.engine("b", model="other")
    assert world.where(session_id="s") == "a"
    assert world.where("p", session_id="s", model="other") == "b"
    assert world.where("p", session_id="s") == "a"


def test_whereabouts_are_bounded() -> None:
    """What was not used for longest is forgotten first (I4)."""
    known = Whereabouts(prefixes_max=3, sessions_max=1)
    policy = Affinity(PowerOfTwo(lambda: 0.0), known, 1.25)
    state = CoordinatorState(Limits(leases_per_engine_max=64), lambda: policy)
    state.join_gateway("gateway", 0.0)
    info = engine_pb.ModelInfo(name="demo", max_sequences=64)
    load = engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_IDLE)
    state.join_engine("engine", "h:1", info, load, now=0.0, wall=0.0)
    for number, hashes in enumerate([(b"1", b"2"), (b"3",), (b"1",), (b"4",)]):
        state.route(Want(f"r{number}", "gateway", "demo", f"l{number}", 0.0, 0.0, affinity=hashes))
    remembered = [known.prefixes.get(key) is not None for key in (b"1", b"2", b"3", b"4")]
    assert remembered == [True, False, True, True]
    assert (len(known.prefixes), len(known.sessions)) == (3, 0)


def test_every_name_of_a_policy_makes_one() -> None:
    """The setting's choices and the factory are the same set."""
    for name in NAMES:
        assert policy_factory(name, Random(1).random, 1.25)()
    with pytest.raises(KeyError):
        policy_factory("random", Random(1).random, 1.25)
