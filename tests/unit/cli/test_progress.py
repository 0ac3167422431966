"""When the start is over, one way or the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.cli import ports
from services.cli.model_sources import ModelSource
from services.cli.plan import Installation, Plan, UpOptions, make_plan
from services.cli.progress import EngineView, Phase, Seen, judge, status_line
from services.cli.settings import load_settings

READY = EngineView(Phase.READY, 1.0)
BROKEN = EngineView(Phase.FAILED, failure="bad tensor")


@pytest.fixture
def plan() -> Plan:
    """Two models with two engines each: engine-0 and engine-1 serve a, the others b."""
    models = (ModelSource("a", "/a.gguf"), ModelSource("b", "/b.gguf"))
    install = Installation("python", "envoy", Path("/e"))
    options = UpOptions(8080, models, 2, Path("/state"))
    return make_plan(options, load_settings({}), ports.default_ports(4), install, 2)


def _seen(routable: str, views: dict[int, EngineView] | None = None, *, door: bool = True) -> Seen:
    named = {f"engine-{index}": view for index, view in (views or {}).items()}
    return Seen(named, frozenset(routable), door)


def test_ready_needs_every_model_and_the_door(plan: Plan) -> None:
    """READY is a promise: a request for each model finds an engine, through Envoy."""
    assert judge(plan, _seen("ab")).ready
    assert not judge(plan, _seen("ab", door=False)).ready
    assert judge(plan, _seen("ab", door=False)).waiting == ("the gateway",)
    assert not judge(plan, _seen("a")).ready
    assert judge(plan, _seen("a")).waiting == ("b",)


def test_an_engine_that_is_ready_but_not_known_is_waited_for(plan: Plan) -> None:
    """The coordinator's word counts, not the engine's."""
    assert judge(plan, _seen("a", {2: READY, 3: READY})).waiting == ("b",)


def test_one_failed_engine_does_not_fail_its_model(plan: Plan) -> None:
    """A model fails when all its engines did."""
    verdict = judge(plan, _seen("a", {2: BROKEN}))
    assert (verdict.failed, verdict.waiting) == ({}, ("b",))


def test_a_failed_model_does_not_hold_up_the_others(plan: Plan) -> None:
    """What can be served is served; what failed is told with its reason."""
    verdict = judge(plan, _seen("a", {2: BROKEN, 3: BROKEN}))
    assert verdict.ready
    assert verdict.failed == {"b": "bad tensor"}


def test_no_model_left_is_hopeless(plan: Plan) -> None:
    """When every model failed there is nothing to wait for."""
    verdict = judge(plan, _seen("", dict.fromkeys(range(4), BROKEN)))
    assert verdict.hopeless
    assert not verdict.ready
    assert not judge(plan, _seen("", {0: BROKEN})).hopeless


def test_the_line_tells_each_engine(plan: Plan) -> None:
    """The progress shows percentages while loading."""
    seen = _seen("", {0: EngineView(Phase.LOADING, 0.456), 1: READY}, door=False)
    assert status_line(plan, seen) == (
        "a (engine-0) loading 45% · a (engine-1) ready · b (engine-2) starting"
        " · b (engine-3) starting · gateway starting"
    )


def test_shares_are_told_in_steps(plan: Plan) -> None:
    """A log gets a line per quarter, and never a share that is not reached yet."""
    shares = {0.0: "0%", 0.24: "0%", 0.25: "25%", 0.999: "75%", 1.0: "100%"}
    for share, text in shares.items():
        seen = _seen("", {0: EngineView(Phase.LOADING, share)})
        assert f"a (engine-0) loading {text} ·" in status_line(plan, seen, 0.25)
    for percent in range(101):
        seen = _seen("", {0: EngineView(Phase.LOADING, percent / 100)})
        assert f"loading {percent}% ·" in status_line(plan, seen)
