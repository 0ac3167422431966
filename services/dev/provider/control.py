"""The scripted provider by hand: /_control/faults, /_control/script, /_control/keys and /_control/requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final, Protocol

from services.dev.provider.asked import AskedError, list_of, object_of
from services.dev.provider.exchange import Sink, send_json
from services.dev.provider.faults import Fault, FaultError, FaultPlan, fault_of
from services.dev.provider.received import Received
from services.dev.provider.script import Script, ScriptError

PREFIX: Final = "/_control/"


class Controlled(Protocol):
    """What can be changed and looked at."""

    script: Script
    accepted_keys: set[str]

    @property
    def faults(self) -> FaultPlan:
        """The faults in force."""
        ...

    @property
    def requests(self) -> Sequence[Received]:
        """What came, oldest first."""
        ...


async def answer_control(received: Received, sink: Sink, controlled: Controlled) -> None:
    """Answers a request below PREFIX."""
    try:
        value = _done(received, controlled)
    except (AskedError, FaultError, ScriptError, ValueError) as error:
        await send_json(sink, 400, {"error": str(error)})
        return
    if value is None:
        await send_json(sink, 404, {"error": "no such control"})
        return
    await send_json(sink, 200, value)


def _done(received: Received, controlled: Controlled) -> dict[str, Any] | None:
    match received.method, received.path.removeprefix(PREFIX):
        case "GET", "requests":
            return {"requests": [_request(request) for request in controlled.requests]}
        case "GET", "faults":
            pass
        case "POST", "faults":
            controlled.faults.add(fault_of(object_of(received.json(), "a fault")))
        case "DELETE", "faults":
            controlled.faults.clear()
        case "POST", "script":
            values = object_of(received.json(), "a script")
            controlled.script = controlled.script.changed(values)
            return {"script": asdict(controlled.script)}
        case "POST", "keys":
            keys = list_of(object_of(received.json(), "the keys").get("accepted"), "accepted")
            controlled.accepted_keys = {str(key) for key in keys}
            return {"accepted": len(controlled.accepted_keys)}
        case _:
            return None
    return {"faults": [_fault(fault) for fault in controlled.faults.listed()]}


def _fault(fault: Fault) -> dict[str, Any]:
    return {**asdict(fault), "kind": fault.kind.value}


def _request(request: Received) -> dict[str, Any]:
    """A request without its headers: they hold the credential."""
    return {
        "number": request.number,
        "connection": request.connection,
        "method": request.method,
        "path": request.path,
        "bytes": len(request.body),
        "status": request.status,
        "fault": request.fault,
        "pieces": request.pieces,
        "started": request.started,
        "ended": request.ended,
        "closed_by_client": request.closed_by_client.is_set(),
    }
