"""What was last said to each engine of draining, so that a command which its stream has lost is said again. Pure."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator.effects import NOTHING, DrainEngine, Effects, UndrainEngine
from services.coordinator.engines import EngineRecord

ORDERS_MAX: Final = 4_096
"""Lives of engines that are remembered; beyond it those of whom nothing was said for longest are forgotten."""


@dataclass(frozen=True, slots=True)
class _Order:
    """Drain until `until`, in monotonic seconds, and then `stop` or not; or, `is_undone`, take requests again."""

    until: float = 0.0
    stop: bool = False
    is_undone: bool = False


class DrainOrders:
    """The last order of a person for each life of an engine; its deployment repeats its own. Who tells no life is not remembered."""

    def __init__(self) -> None:
        self._orders: OrderedDict[str, _Order] = OrderedDict()

    def drained(self, engine: EngineRecord, until: float, stop: bool) -> None:
        """It was told to drain until `until`, in monotonic seconds."""
        self._note(engine.incarnation, _Order(until, stop))

    def undrained(self, engine: EngineRecord) -> None:
        """It was told to take requests again."""
        self._note(engine.incarnation, _Order(is_undone=True))

    def repeat(self, engine: EngineRecord, now: float) -> Effects:
        """An engine has joined again, and may have missed what it was told last."""
        order = self._orders.get(engine.incarnation)
        if order is None:
            return NOTHING
        engine.is_drained = not order.is_undone
        if not order.is_undone:
            grace_s = max(0.0, order.until - now)
            return Effects(drains=(DrainEngine(engine.session, grace_s, order.stop),))
        if engine.load.phase == engine_pb.ENGINE_PHASE_DRAINING:
            return Effects(undrains=(UndrainEngine(engine.session),))
        return NOTHING

    def _note(self, incarnation: str, order: _Order) -> None:
        if not incarnation:
            return
        self._orders[incarnation] = order
        self._orders.move_to_end(incarnation)
        if len(self._orders) > ORDERS_MAX:
            self._orders.popitem(last=False)
