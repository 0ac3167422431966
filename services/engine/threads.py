"""The number of threads of a model: what the settings say, or what suits the model and the machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from services.engine.free_cores import FreeCores
from services.engine.settings import physical_cores
from services.runtime.clock import Clock, SystemClock
from services.runtime.processor import ProcessorUsage, allowed_cores, usage_reader

SMALL_MODEL_BYTES: Final = 64 * 1024 * 1024
"""Below this, a step is so short that meeting at barriers costs as much as sharing the work saves."""


def thread_choice(
    asked: int,
    weight_bytes: int,
    *,
    read: Callable[[], ProcessorUsage] | None = None,
    clock: Clock | None = None,
) -> Callable[[], int]:
    """Tells before each batch how many threads compute it. `asked` 0 leaves the choice to the engine."""
    if asked or weight_bytes < SMALL_MODEL_BYTES:
        fixed = asked or 1
        return lambda: fixed
    allowed = allowed_cores()
    most = physical_cores()
    look = read or usage_reader(allowed)
    if look is None or most == 1:
        return lambda: most
    policy = FreeCores(most, len(allowed))
    now = (clock or SystemClock()).monotonic

    def choose() -> int:
        return policy.observe(look()) if policy.due(now()) else policy.threads

    return choose
