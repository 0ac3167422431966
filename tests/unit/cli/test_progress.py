"""When the start is over, one way or the other."""

from __future__ import annotations

from services.cli.fleet import Wanted
from services.cli.plan import ProcessPlan
from services.cli.progress import (
    REST_POLL_S,
    EngineView,
    Phase,
    Seen,
    Verdict,
    judge,
    look_again_s,
    status_line,
)

READY = EngineView(Phase.READY, 1.0)
BROKEN = EngineView(Phase.FAILED, failure="bad tensor")


WANTED = (Wanted("a", "/a.gguf", "1", 2), Wanted("b", "/b.gguf", "1", 2))


def _engine(number: int, model: str) -> ProcessPlan:
    return ProcessPlan(f"engine-{number}", "engine", (), {}, "", "", model=model)


ENGINES = tuple(_engine(number, model) for number, model in enumerate("aabb"))
"""Two deployments with two engines each: engine-0 and engine-1 serve a, the others b."""


def _judge(seen: Seen) -> Verdict:
    return judge(WANTED, ENGINES, seen)


def _seen(routable: str, views: dict[int, EngineView] | None = None, *, door: bool = True) -> Seen:
    named = {f"engine-{index}": view for index, view in (views or {}).items()}
    return Seen(named, frozenset(routable), door)


def test_ready_needs_every_model_and_the_door() -> None:
    """READY is a promise: a request for each model finds an engine, through Envoy."""
    assert _judge(_seen("ab")).ready
    assert not _judge(_seen("ab", door=False)).ready
    assert _judge(_seen("ab", door=False)).waiting == ("the gateway",)
    assert not _judge(_seen("a")).ready
    assert _judge(_seen("a")).waiting == ("b",)


def test_an_engine_that_is_ready_but_not_known_is_waited_for() -> None:
    """The coordinator's word counts, not the engine's."""
    assert _judge(_seen("a", {2: READY, 3: READY})).waiting == ("b",)


def test_one_failed_engine_does_not_fail_its_model() -> None:
    """A model fails when all its engines did."""
    verdict = _judge(_seen("a", {2: BROKEN}))
    assert (verdict.failed, verdict.waiting) == ({}, ("b",))


def test_a_failed_model_does_not_hold_up_the_others() -> None:
    """What can be served is served; what failed is told with its reason."""
    verdict = _judge(_seen("a", {2: BROKEN, 3: BROKEN}))
    assert verdict.ready
    assert verdict.failed == {"b": "bad tensor"}


def test_no_model_left_is_hopeless() -> None:
    """When every model failed there is nothing to wait for."""
    verdict = _judge(_seen("", dict.fromkeys(range(4), BROKEN)))
    assert verdict.hopeless
    assert not verdict.ready
    assert not _judge(_seen("", {0: BROKEN})).hopeless


def test_what_is_not_told_yet_is_waited_for() -> None:
    """Until the coordinator has said what is wanted, nothing is ready and nothing is hopeless."""
    verdict = judge(None, (), _seen(""))
    assert (verdict.ready, verdict.hopeless, verdict.waiting) == (
        False,
        False,
        ("the coordinator",),
    )
    assert judge(WANTED, (), _seen("")).waiting == ("a", "b")


def test_nothing_to_serve_is_ready_too() -> None:
    """Without deployments, and for those without replicas, the door is all that is needed."""
    assert judge((), (), _seen("")).ready
    assert not judge((), (), _seen("", door=False)).ready
    assert judge((Wanted("a", "/a", "1", 0),), (), _seen("")).ready


def test_the_line_tells_each_engine() -> None:
    """The progress shows percentages while loading."""
    seen = _seen("", {0: EngineView(Phase.LOADING, 0.456), 1: READY}, door=False)
    assert status_line(ENGINES, seen) == (
        "a (engine-0) loading 45% · a (engine-1) ready · b (engine-2) starting"
        " · b (engine-3) starting · gateway starting"
    )


def test_shares_are_told_in_steps() -> None:
    """A log gets a line per quarter, and never a share that is not reached yet."""
    shares = {0.0: "0%", 0.24: "0%", 0.25: "25%", 0.999: "75%", 1.0: "100%"}
    for share, text in shares.items():
        seen = _seen("", {0: EngineView(Phase.LOADING, share)})
        assert f"a (engine-0) loading {text} ·" in status_line(ENGINES, seen, 0.25)
    for percent in range(101):
        seen = _seen("", {0: EngineView(Phase.LOADING, percent / 100)})
        assert f"loading {percent}% ·" in status_line(ENGINES, seen)


def test_what_is_under_way_is_looked_at_often() -> None:
    """The probes rest only when all is served, each engine stands where it stays, and nothing is to be started or ended."""

    def pause_s(seen: Seen, *, announced: bool = True, fleet_rests: bool = True) -> float:
        return look_again_s(_judge(seen), seen, announced=announced, fleet_rests=fleet_rests)

    stays = {0: READY, 1: READY, 2: READY, 3: BROKEN}
    assert pause_s(_seen("ab", stays)) == REST_POLL_S
    for view in (EngineView(), EngineView(Phase.LOADING, 0.5)):
        assert pause_s(_seen("ab", stays | {3: view})) <= 2
    assert pause_s(_seen("ab", stays), fleet_rests=False) <= 2
    assert pause_s(_seen("a", stays)) < 1
    assert pause_s(_seen("ab", stays, door=False)) < 1
    assert pause_s(_seen("ab", stays), announced=False) < 1
