"""The routing policies by name."""

from __future__ import annotations

from collections.abc import Callable

from services.coordinator.affinity import Affinity, Whereabouts
from services.coordinator.published import PublishedBlocks
from services.coordinator.routing import LeastLoaded, Policy, PowerOfTwo, RoundRobin

AFFINITY = "affinity"
NAMES = (AFFINITY, "least_loaded", "power_of_two", "round_robin")


def policy_factory(
    name: str,
    fraction: Callable[[], float],
    load_factor: float,
    published: PublishedBlocks | None = None,
) -> Callable[[], Policy]:
    """What makes the policy of a model.

    `fraction` gives random numbers within [0, 1); `load_factor` and what is known to be `published` are for affinity.
    """
    if name == AFFINITY:
        whereabouts = Whereabouts(published=published)
        return lambda: Affinity(PowerOfTwo(fraction), whereabouts, load_factor)
    factories: dict[str, Callable[[], Policy]] = {
        "least_loaded": LeastLoaded,
        "power_of_two": lambda: PowerOfTwo(fraction),
        "round_robin": RoundRobin,
    }
    return factories[name]
