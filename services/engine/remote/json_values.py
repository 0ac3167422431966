"""JSON texts of a request that go into the provider's JSON as they are: key order and numbers are kept. Pure."""

from __future__ import annotations

from typing import Any

import msgspec
from caravan.core.v1 import chat_pb2

from services.engine.remote.request_checks import invalid


def json_object(text: str, param: str, what: str) -> msgspec.Raw:
    """The text, which must be a JSON object. Raises INVALID_VALUE; `what` names it in the message."""
    try:
        msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        raise invalid(param, f"{what} are not a JSON object.") from None
    return msgspec.Raw(text.encode())


def tool_parameters(tool: chat_pb2.Tool, index: int) -> msgspec.Raw | None:
    """The JSON schema of a tool's arguments, None where there are none. Raises INVALID_VALUE."""
    if not tool.parameters_json:
        return None
    what = f"The parameters of tool {tool.name!r}"
    return json_object(tool.parameters_json, f"tools[{index}].parameters", what)


def call_arguments(call: chat_pb2.ToolCall, param: str) -> msgspec.Raw:
    """The arguments of a call that the model once made. Raises INVALID_VALUE where a provider takes objects only."""
    if not call.arguments_json.strip():
        return msgspec.Raw(b"{}")
    return json_object(call.arguments_json, param, f"The arguments of call {call.id!r}")


def is_any_object(schema: str) -> bool:
    """Whether a grammar asks for a JSON object of any form."""
    try:
        return bool(msgspec.json.decode(schema) == {})
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return False
