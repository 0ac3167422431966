"""Which engines `caravan up` runs for the deployments, and which it lets go. Pure.

An engine of a former revision is not ended here: the coordinator does so when requests have shifted, and until then it serves. It
is only not started again. What the coordinator does not know ends after a while, since nobody else would end it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

UNKNOWN_S: Final = 10.0
"""Seconds for which an engine that is not wanted may be unknown to the coordinator: it may be about to join, or to join again."""


@dataclass(frozen=True)
class Wanted:
    """What the coordinator says of a deployment; 0 leaves a number to the engine.

    `former_engines` are those of earlier revisions that it knows, `is_removed` says that all of its engines are to end. Where a
    `provider` runs the model, such as "openai", `remote_options` say how to talk to it: caravan.engine.v1.RemoteOptions as JSON.
    """

    name: str
    model: str
    revision: str
    replicas: int = 1
    is_scripted: bool = False
    provider: str = ""
    remote_options: str = ""
    is_removed: bool = False
    former_engines: int = 0
    context_tokens: int = 0
    max_sequences: int = 0
    threads: int = 0

    @property
    def computes(self) -> bool:
        """Whether its engines run the model on this machine's cores."""
        return not self.is_scripted and not self.provider


@dataclass(frozen=True)
class Running:
    """An engine that runs, or waits to be started again."""

    name: str
    deployment: str
    revision: str


@dataclass(frozen=True)
class Orders:
    """What to do: deployments to start an engine for, once for each time it is listed; engines to end; and those to let go.

    What is let go is not started again when it ends.
    """

    start: tuple[Wanted, ...]
    end: tuple[str, ...]
    let_go: frozenset[str]


def engine_threads(
    wanted: Wanted, everything: Iterable[Wanted], asked: int | None, cores: int
) -> int | None:
    """Compute threads of each engine of a deployment; None leaves it to the engine, which takes all cores.

    llama.cpp's threads wait for each other at barriers, so engines that share cores slow each other by much more than their
    share: several engines split the cores. Its own number counts first, then `asked`.
    """
    if not wanted.computes:
        return None
    if wanted.threads or asked is not None:
        return wanted.threads or asked
    real = sum(each.replicas for each in everything if each.computes)
    return None if real <= 1 else max(1, cores // real)


class Fleet:
    """Remembers since when engines that are not wanted are unknown to the coordinator."""

    def __init__(self) -> None:
        self._unknown_since: dict[str, float] = {}

    def orders(self, wanted: Collection[Wanted], running: Sequence[Running], now: float) -> Orders:
        """What to do; `running` is in the order of their start, `now` in seconds."""
        start: list[Wanted] = []
        surplus: list[str] = []
        needed: set[str] = set()
        for each in wanted:
            current = [
                engine.name
                for engine in running
                if (engine.deployment, engine.revision) == (each.name, each.revision)
            ]
            replicas = 0 if each.is_removed else each.replicas
            start += [each] * (replicas - len(current))
            if not each.is_removed:
                surplus += current[replicas:]
            needed.update(current[:replicas])
        left = [engine for engine in running if engine.name not in needed]
        lost = self._lost({each.name: each for each in wanted}, left, now)
        ends = [engine.name for engine in left if engine.name in {*surplus, *lost}]
        return Orders(tuple(start), tuple(ends), frozenset(engine.name for engine in left))

    def _lost(self, wanted: dict[str, Wanted], left: Iterable[Running], now: float) -> set[str]:
        """Those of `left` that the coordinator has not known for so long that it will not end them."""
        unknown = {
            engine.name
            for engine in left
            if engine.deployment not in wanted or not wanted[engine.deployment].former_engines
        }
        self._unknown_since = {name: self._unknown_since.get(name, now) for name in unknown}
        return {name for name, since in self._unknown_since.items() if now - since >= UNKNOWN_S}
