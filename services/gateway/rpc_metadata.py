"""gRPC metadata of the gateway's answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NoReturn, cast
from urllib.parse import quote

import grpc

from services.runtime.errors import CaravanError
from services.runtime.telemetry import Metadata

REQUEST_ID_KEY: Final = "x-request-id"
DEPLOYMENT_KEY: Final = "x-caravan-deployment"
Context = grpc.aio.ServicerContext[Any, Any]


def invocation_metadata(context: Context) -> Metadata:
    """What the client sent."""
    return tuple(context.invocation_metadata() or ())


async def send_head(context: Context, request_id: str, deployment: str) -> None:
    """Sends the id of the request, and the name of the deployment that serves it, as response headers; empty: not known yet.

    Only when the first message follows: errors before it keep their HTTP status only while no headers were sent.
    """
    await context.send_initial_metadata(_names(request_id, deployment))


def when_over(context: Context, call: Callable[[], None]) -> None:
    """Calls `call` when the client's call is over, however it ended.

    A generator whose call is cancelled while a message is being sent is not run on, so its `finally` comes late.
    """
    cast(Any, context).add_done_callback(lambda _: call())


async def abort(
    context: Context, error: CaravanError, request_id: str, deployment: str, *, openai: bool
) -> NoReturn:
    """Ends the call with an error that carries what the head of an answer would."""
    trailing = (*error.trailing_metadata(openai=openai), *_names(request_id, deployment))
    await context.abort(error.row.grpc_code, error.message, trailing)
    raise AssertionError("abort does not return")


def _names(request_id: str, deployment: str) -> tuple[tuple[str, str], ...]:
    request = (REQUEST_ID_KEY, request_id)
    if not deployment:
        return (request,)
    # An engine that was started by hand may have any name, and a header holds printable ASCII only.
    return (request, (DEPLOYMENT_KEY, quote(deployment, safe="/:")))
