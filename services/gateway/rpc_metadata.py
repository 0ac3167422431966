"""gRPC metadata of the gateway's answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NoReturn, cast

import grpc

from services.runtime.errors import CaravanError
from services.runtime.telemetry import Metadata

REQUEST_ID_KEY: Final = "x-request-id"
Context = grpc.aio.ServicerContext[Any, Any]


def invocation_metadata(context: Context) -> Metadata:
    """What the client sent."""
    return tuple(context.invocation_metadata() or ())


async def send_request_id(context: Context, request_id: str) -> None:
    """Sends the id of the request as a response header. Only when the first message follows: errors before it keep their
    HTTP status only while no headers were sent."""
    await context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))


def when_over(context: Context, call: Callable[[], None]) -> None:
    """Calls `call` when the client's call is over, however it ended.

    A generator whose call is cancelled while a message is being sent is not run on, so its `finally` comes late.
    """
    cast(Any, context).add_done_callback(lambda _: call())


async def abort(
    context: Context, error: CaravanError, request_id: str, *, openai: bool
) -> NoReturn:
    """Ends the call with an error that carries the id of the request too."""
    trailing = (*error.trailing_metadata(openai=openai), (REQUEST_ID_KEY, request_id))
    await context.abort(error.row.grpc_code, error.message, trailing)
    raise AssertionError("abort does not return")
