"""The gateways that have joined, and whether they are alive. Pure; see engines.py for what a session is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(slots=True)
class GatewayRecord:
    """One gateway in one session; `heard_at` is in monotonic seconds."""

    gateway_id: str
    session: int
    heard_at: float


class GatewayRegistry:
    """Gateways by id, one session each."""

    def __init__(self) -> None:
        self._gateways: dict[str, GatewayRecord] = {}
        self._sessions: dict[int, GatewayRecord] = {}

    def __len__(self) -> int:
        return len(self._gateways)

    def __iter__(self) -> Iterator[GatewayRecord]:
        """In the order of their joining."""
        return iter(tuple(self._gateways.values()))

    def find(self, gateway_id: str) -> GatewayRecord | None:
        """The gateway, or None where it has not joined."""
        return self._gateways.get(gateway_id)

    def of_session(self, session: int) -> GatewayRecord | None:
        """The gateway whose session this is, or None where the session is over."""
        return self._sessions.get(session)

    def add(self, gateway_id: str, session: int, now: float) -> None:
        """Adds a gateway. The session before, if any, has been removed."""
        assert gateway_id not in self._gateways
        record = GatewayRecord(gateway_id, session, now)
        self._gateways[gateway_id] = self._sessions[session] = record

    def remove(self, session: int) -> GatewayRecord | None:
        """Removes the gateway of a session and returns it; None where the session is over already."""
        record = self._sessions.pop(session, None)
        if record is not None:
            del self._gateways[record.gateway_id]
        return record

    def silent_since(self, then: float) -> list[GatewayRecord]:
        """Gateways that have not been heard after `then`."""
        return [record for record in self._gateways.values() if record.heard_at <= then]
