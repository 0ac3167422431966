"""The one error table (invariant I10): reason -> gRPC code -> HTTP status -> OpenAI type and code.

An error travels between processes as a gRPC status with google.rpc.ErrorInfo (domain "caravan", the reason by name, the
metadata that caravan.core.v1.ErrorReason documents) and, where trying again may help, google.rpc.RetryInfo.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import grpc
from caravan.core.v1 import error_reason_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN: Final = "caravan"
_PREFIX: Final = "ERROR_REASON_"
# Trailing metadata that Envoy's Lua filter turns into the body of an HTTP reply (deploy/envoy/openai_errors.lua).
OPENAI_ERROR_KEY: Final = "x-openai-error"
RETRY_AFTER_KEY: Final = "retry-after"
_CODES: Final[Mapping[int, grpc.StatusCode]] = {code.value[0]: code for code in grpc.StatusCode}
# An error travels in trailing metadata up to three times (status, details, OpenAI body), and gRPC drops calls whose
# metadata passes 8 KiB. Messages and metadata may quote what a client sent, so both are cut.
MESSAGE_BYTES_MAX: Final = 768
METADATA_BYTES_MAX: Final = 256


@dataclass(frozen=True)
class ErrorRow:
    """What one reason looks like on each wire."""

    grpc_code: grpc.StatusCode
    http_status: int
    openai_type: str
    openai_code: str | None


_INVALID = "invalid_request_error"
_SERVER = "server_error"

TABLE: Final[Mapping[str, ErrorRow]] = {
    "INVALID_VALUE": ErrorRow(grpc.StatusCode.INVALID_ARGUMENT, 400, _INVALID, "invalid_value"),
    "INVALID_JSON": ErrorRow(grpc.StatusCode.INVALID_ARGUMENT, 400, _INVALID, "invalid_json"),
    "WRONG_TYPE": ErrorRow(grpc.StatusCode.INVALID_ARGUMENT, 400, _INVALID, "invalid_type"),
    "MISSING_FIELD": ErrorRow(
        grpc.StatusCode.INVALID_ARGUMENT, 400, _INVALID, "missing_required_parameter"
    ),
    "UNKNOWN_FIELD": ErrorRow(grpc.StatusCode.INVALID_ARGUMENT, 400, _INVALID, "unknown_parameter"),
    "UNSUPPORTED_FIELD": ErrorRow(
        grpc.StatusCode.INVALID_ARGUMENT, 400, _INVALID, "unsupported_parameter"
    ),
    "CONTEXT_LENGTH_EXCEEDED": ErrorRow(
        grpc.StatusCode.INVALID_ARGUMENT, 400, _INVALID, "context_length_exceeded"
    ),
    "TEMPLATE_FAILED": ErrorRow(
        grpc.StatusCode.INVALID_ARGUMENT, 400, _INVALID, "chat_template_failed"
    ),
    "MODEL_NOT_FOUND": ErrorRow(grpc.StatusCode.NOT_FOUND, 404, _INVALID, "model_not_found"),
    "REQUEST_NOT_FOUND": ErrorRow(grpc.StatusCode.NOT_FOUND, 404, _INVALID, "request_not_found"),
    "DUPLICATE_REQUEST": ErrorRow(
        grpc.StatusCode.ALREADY_EXISTS, 409, _INVALID, "duplicate_request"
    ),
    "CAPACITY_EXHAUSTED": ErrorRow(
        grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "rate_limit_error", "capacity_exhausted"
    ),
    "MODEL_LOADING": ErrorRow(grpc.StatusCode.UNAVAILABLE, 503, _SERVER, "model_loading"),
    "NO_ENGINE": ErrorRow(grpc.StatusCode.UNAVAILABLE, 503, _SERVER, "no_engine"),
    "ENGINE_LOST": ErrorRow(grpc.StatusCode.UNAVAILABLE, 503, _SERVER, "engine_lost"),
    "DRAINING": ErrorRow(grpc.StatusCode.UNAVAILABLE, 503, _SERVER, "draining"),
    "SERVICE_UNAVAILABLE": ErrorRow(
        grpc.StatusCode.UNAVAILABLE, 503, _SERVER, "service_unavailable"
    ),
    "DEADLINE_EXCEEDED": ErrorRow(
        grpc.StatusCode.DEADLINE_EXCEEDED, 504, _SERVER, "deadline_exceeded"
    ),
    "CANCELLED": ErrorRow(grpc.StatusCode.CANCELLED, 499, _INVALID, "request_cancelled"),
    "SESSION_UNKNOWN": ErrorRow(
        grpc.StatusCode.FAILED_PRECONDITION, 400, _SERVER, "session_unknown"
    ),
    "DECODE_FAILED": ErrorRow(grpc.StatusCode.INTERNAL, 500, _SERVER, "decode_failed"),
    "INTERNAL": ErrorRow(grpc.StatusCode.INTERNAL, 500, _SERVER, "internal_error"),
    "MODEL_INVALID": ErrorRow(grpc.StatusCode.FAILED_PRECONDITION, 400, _SERVER, "model_invalid"),
    "QUEUE_TIMEOUT": ErrorRow(grpc.StatusCode.DEADLINE_EXCEEDED, 504, _SERVER, "queue_timeout"),
    "ENGINE_NOT_FOUND": ErrorRow(grpc.StatusCode.NOT_FOUND, 404, _INVALID, "engine_not_found"),
    "DEPLOYMENT_NOT_FOUND": ErrorRow(
        grpc.StatusCode.NOT_FOUND, 404, _INVALID, "deployment_not_found"
    ),
    "ENGINE_STALLED": ErrorRow(grpc.StatusCode.UNAVAILABLE, 503, _SERVER, "engine_stalled"),
    "RATE_LIMITED": ErrorRow(
        grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "rate_limit_error", "rate_limit_exceeded"
    ),
    "CIRCUIT_OPEN": ErrorRow(grpc.StatusCode.UNAVAILABLE, 503, _SERVER, "circuit_open"),
    "CONTENT_FILTERED": ErrorRow(
        grpc.StatusCode.FAILED_PRECONDITION, 400, _INVALID, "content_filter"
    ),
    "PROVIDER_REJECTED": ErrorRow(
        grpc.StatusCode.INVALID_ARGUMENT, 400, _INVALID, "provider_rejected"
    ),
    "PROVIDER_UNAUTHORIZED": ErrorRow(
        grpc.StatusCode.INTERNAL, 500, _SERVER, "provider_unauthorized"
    ),
    "PROVIDER_FORBIDDEN": ErrorRow(
        grpc.StatusCode.PERMISSION_DENIED, 403, _INVALID, "provider_forbidden"
    ),
    "PROVIDER_NOT_FOUND": ErrorRow(grpc.StatusCode.INTERNAL, 500, _SERVER, "provider_not_found"),
    "PROVIDER_FAILED": ErrorRow(grpc.StatusCode.UNAVAILABLE, 503, _SERVER, "provider_failed"),
    "PROVIDER_UNREACHABLE": ErrorRow(
        grpc.StatusCode.UNAVAILABLE, 503, _SERVER, "provider_unreachable"
    ),
    "PROVIDER_TIMEOUT": ErrorRow(
        grpc.StatusCode.DEADLINE_EXCEEDED, 504, _SERVER, "provider_timeout"
    ),
    "BUDGET_EXCEEDED": ErrorRow(
        grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "rate_limit_error", "budget_exceeded"
    ),
    "UNSUPPORTED_METHOD": ErrorRow(
        grpc.StatusCode.UNIMPLEMENTED, 501, _SERVER, "unsupported_method"
    ),
}


class CaravanError(Exception):
    """An error of the table.

    `metadata` holds what caravan.core.v1.ErrorReason documents for the reason; `retry_after_s` is in seconds, None where
    trying again does not help. Longer texts than the limits above are cut, and what is no Unicode is replaced.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        **metadata: str,
    ) -> None:
        self.message = _cut(message, MESSAGE_BYTES_MAX)
        super().__init__(self.message)
        self.reason = reason
        self.row = TABLE[reason]
        self.retry_after_s = retry_after_s
        named = metadata if param is None else {"param": param, **metadata}
        self.metadata = {key: _cut(value, METADATA_BYTES_MAX) for key, value in named.items()}

    @property
    def param(self) -> str | None:
        """The field that is to blame, as a path such as `messages[0].content`."""
        return self.metadata.get("param")

    def to_status(self) -> status_pb2.Status:
        """The error as google.rpc.Status with its details."""
        status = status_pb2.Status(code=self.row.grpc_code.value[0], message=self.message)
        status.details.add().Pack(
            error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata)
        )
        if self.retry_after_s is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(max(0, round(self.retry_after_s * 1000)))
            status.details.add().Pack(retry)
        return status

    def openai_body(self) -> dict[str, object]:
        """The error as the OpenAI API shows it."""
        return {
            "error": {
                "message": self.message,
                "type": self.row.openai_type,
                "param": self.param,
                "code": self.row.openai_code,
            }
        }

    def trailing_metadata(self, *, openai: bool = False) -> tuple[tuple[str, str | bytes], ...]:
        """Trailing metadata of the gRPC status; with `openai`, what Envoy needs for the REST reply too."""
        items: list[tuple[str, str | bytes]] = [
            ("grpc-status-details-bin", self.to_status().SerializeToString())
        ]
        if self.retry_after_s is not None:
            # HTTP counts whole seconds (RFC 9110, 10.2.3); never tell a client to come back at once.
            items.append((RETRY_AFTER_KEY, str(max(1, math.ceil(self.retry_after_s)))))
        if openai:
            items.append((OPENAI_ERROR_KEY, json.dumps(self.openai_body(), ensure_ascii=True)))
        return tuple(items)

    async def abort(
        self,
        context: grpc.aio.ServicerContext[Any, Any],
        *,
        openai: bool = False,
    ) -> NoReturn:
        """Ends the call with this error."""
        await context.abort(self.row.grpc_code, self.message, self.trailing_metadata(openai=openai))
        raise AssertionError("abort does not return")


def from_rpc_error(error: grpc.aio.AioRpcError, *, service: str) -> CaravanError:
    """The error that the peer `service` meant; SERVICE_UNAVAILABLE or INTERNAL where it was none of the table."""
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):  # The details are corrupt or contradict the status.
        status = None
    if status is not None:
        found = _from_status(status)
        if found is not None:
            return found
    return _of_code(error.code(), service)


def from_status(status: status_pb2.Status, *, service: str) -> CaravanError:
    """The error that the peer `service` meant by a status; SERVICE_UNAVAILABLE or INTERNAL where it was none of the table."""
    found = _from_status(status)
    return _of_code(_CODES.get(status.code), service) if found is None else found


def _of_code(code: grpc.StatusCode | None, service: str) -> CaravanError:
    if code is grpc.StatusCode.UNAVAILABLE:
        return CaravanError(
            "SERVICE_UNAVAILABLE",
            f"The {service} cannot be reached.",
            retry_after_s=1.0,
            service=service,
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return CaravanError("DEADLINE_EXCEEDED", f"The {service} did not answer in time.")
    if code is grpc.StatusCode.CANCELLED:
        return CaravanError("CANCELLED", "The request was cancelled.")
    return CaravanError("INTERNAL", f"The {service} failed.", service=service)


def _cut(text: str, bytes_max: int) -> str:
    encoded = text[:bytes_max].encode(errors="replace")  # Lone surrogates have no UTF-8.
    if len(encoded) <= bytes_max and len(text) <= bytes_max:
        return encoded.decode()
    return encoded[: bytes_max - 3].decode(errors="ignore") + "..."


def _from_status(status: status_pb2.Status) -> CaravanError | None:
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    reason: str | None = None
    metadata: dict[str, str] = {}
    retry_after_s: float | None = None
    for detail in status.details:
        if detail.Unpack(info) and info.domain == DOMAIN and info.reason in TABLE:
            reason = info.reason
            metadata = dict(info.metadata)
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    if reason is None:
        return None
    return CaravanError(reason, status.message, retry_after_s=retry_after_s, **metadata)


def reason_names() -> frozenset[str]:
    """Names of caravan.core.v1.ErrorReason without their prefix; the table has a row for each."""
    names = error_reason_pb2.ErrorReason.keys()
    return frozenset(n.removeprefix(_PREFIX) for n in names if not n.endswith("UNSPECIFIED"))
