"""How well engines keep to a limit that they share: what goes beyond it, and what is left of it unused.

`python -m bench.limits [--seeds 10]`. Four engines and the coordinator's part, the real modules, on a simulated clock; the same
seeds give the same figures. Requests ask at random times, ten times as many as the limit allows, for two minutes from a cold
start; those that cannot go at once are refused. In approximate mode engines report once a second; reports and answers take 10 ms
to 300 ms each, and 5 % of each are lost. Counted is what was sent to the provider, tokens as they were really used.

Beyond: the most in any 60 s, wherever they begin, and in the minutes of the clock, above the limit. Unused: what is missing of two
full minutes. The worst seed counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.limits_world import Network, Work, World, most_within, within
from bench.report import Report, Table, arguments, ceiling, finish, progress
from services.runtime.rate_limiter import Quota

MINUTE_S = 60.0
MINUTES = 2
ENGINES = 4
REQUESTS = 600
TOKENS = 200_000
OVERLOAD = 10
OVER_MAX = 5.0
UNUSED_MAX = 10.0
CHAT = Work(expected=(200, 1500), used=(0.3, 1.0))
MEAN_TOKENS = 850
REQUEST_QUOTA = Quota(requests_per_minute=REQUESTS)
TOKEN_QUOTA = Quota(tokens_per_minute=TOKENS)
SKEWED = (0.7, 0.1, 0.1, 0.1)
EVEN = (0.25, 0.25, 0.25, 0.25)


@dataclass(frozen=True, slots=True)
class Scenario:
    """`shares(engine, now)` is the part of the demand at an engine; `arrange` makes engines come and go.

    Only those that are `claimed` have to keep the bounds; the others show where it ends.
    """

    name: str
    shares: Callable[[int, float], float]
    quota: Quota = REQUEST_QUOTA
    work: Work = field(default_factory=Work)
    arrange: Callable[[World], None] | None = None
    strict: bool = False
    engines: int = ENGINES
    is_claimed: bool = True

    @property
    def counts_tokens(self) -> bool:
        """Whether the limit is one of tokens."""
        return bool(self.quota.tokens_per_minute)

    @property
    def limit(self) -> int:
        """Of a minute."""
        return self.quota.tokens_per_minute or self.quota.requests_per_minute

    def offered(self, engine: int, now: float) -> float:
        """Requests per second."""
        each = MEAN_TOKENS if self.counts_tokens else 1
        return OVERLOAD * self.limit / MINUTE_S / each * self.shares(engine, now)


@dataclass(frozen=True, slots=True)
class Found:
    """Percent of the limit."""

    over_clock: float
    over_sliding: float
    unused: float


def constant(shares: Sequence[float]) -> Callable[[int, float], float]:
    """The same demand all the time."""
    return lambda engine, _: shares[engine]


def left_to_others(shares: Sequence[float]) -> Callable[[int, float], float]:
    """The first engine leaves after a minute, and the others get its demand."""
    rest = sum(shares[1:])
    return lambda engine, now: shares[engine] if now < MINUTE_S else shares[engine] / rest


def joined_by_one(_engine: int, now: float) -> float:
    """Even demand; after a minute a fifth engine takes its part."""
    return 1 / ENGINES if now < MINUTE_S else 1 / (ENGINES + 1)


def moving(engine: int, now: float) -> float:
    """Nearly all demand is at one engine, another one every five seconds."""
    return 0.97 if engine == int(now // 5) % ENGINES else 0.01


def _join(world: World) -> None:
    world.at(MINUTE_S, lambda: world.join(ENGINES))


def _leave(world: World) -> None:
    world.at(MINUTE_S, lambda: world.leave(0))


SCENARIOS = (
    Scenario("even", constant(EVEN)),
    Scenario("skewed 70/10/10/10", constant(SKEWED)),
    Scenario("one joins", joined_by_one, arrange=_join),
    Scenario("one of four leaves", left_to_others(EVEN), arrange=_leave),
    Scenario("the one with 70 % leaves", left_to_others(SKEWED), arrange=_leave),
    Scenario("tokens, skewed", constant(SKEWED), TOKEN_QUOTA, CHAT),
    Scenario("strict, skewed", constant(SKEWED), strict=True),
    Scenario("strict, one joins", joined_by_one, arrange=_join, strict=True),
    Scenario("strict, tokens", constant(SKEWED), TOKEN_QUOTA, CHAT, strict=True),
    Scenario("demand moves every 5 s", moving, is_claimed=False),
    Scenario("16 engines", lambda *_: 1 / 16, engines=16, is_claimed=False),
    Scenario("10 a minute", constant(EVEN), Quota(10), is_claimed=False),
)


def measure(scenario: Scenario, seed: int) -> Found:
    """One run."""
    world = World(
        scenario.quota,
        scenario.offered,
        seed=seed,
        strict=scenario.strict,
        work=scenario.work,
        network=Network(),
    )
    for engine in range(scenario.engines):
        world.join(engine)
    if scenario.arrange is not None:
        scenario.arrange(world)
    world.run(MINUTES * MINUTE_S)
    tokens, limit = scenario.counts_tokens, scenario.limit
    minutes = [
        within(world.sent, MINUTE_S * i, MINUTE_S * (i + 1), tokens=tokens) for i in range(MINUTES)
    ]
    return Found(
        over_clock=max(0.0, 100 * (max(minutes) / limit - 1)),
        over_sliding=max(0.0, 100 * (most_within(world.sent, MINUTE_S, tokens=tokens) / limit - 1)),
        unused=max(0.0, 100 * (1 - sum(minutes) / MINUTES / limit)),
    )


def worst(found: Sequence[Found]) -> Found:
    """The worst of each figure."""
    return Found(
        max(one.over_clock for one in found),
        max(one.over_sliding for one in found),
        max(one.unused for one in found),
    )


def report(found: Sequence[tuple[Scenario, Found]], seeds: int) -> Report:
    """The table and the claims."""
    result = Report("limits")
    result.notes.append(
        f"{REQUESTS} requests or {TOKENS} tokens a minute, {OVERLOAD} times as many asked for, {MINUTES} minutes from a cold start, "
        f"worst of {seeds} seeds"
    )
    rows = tuple(
        (each.name, f"{f.over_clock:.1f}", f"{f.over_sliding:.1f}", f"{f.unused:.1f}")
        for each, f in found
    )
    columns = ("demand", "beyond, minutes", "beyond, any 60 s", "unused")
    result.tables.append(Table("percent of the limit", columns, rows))
    shared = worst([f for each, f in found if each.is_claimed and not each.strict])
    strict = worst([f for each, f in found if each.strict])
    result.claims += [
        ceiling("beyond the limit in any 60 s, approximate", shared.over_sliding, OVER_MAX, "%"),
        ceiling("unused, approximate", shared.unused, UNUSED_MAX, "%"),
        ceiling("beyond the limit in any 60 s, strict", strict.over_sliding, 0.0, "%"),
        ceiling("unused, strict", strict.unused, UNUSED_MAX, "%"),
    ]
    return result


def main() -> int:
    """Parses the command line, runs, prints."""
    parser = arguments("limits", __doc__)
    parser.add_argument("--seeds", type=int, default=10, help="default: %(default)s")
    args = parser.parse_args()
    found = []
    for scenario in SCENARIOS:
        progress(scenario.name)
        found.append((scenario, worst([measure(scenario, seed) for seed in range(args.seeds)])))
    return finish(report(found, args.seeds), args.json)


if __name__ == "__main__":
    sys.exit(main())
