"""A gateway that does what the request tells it, to see what Envoy makes of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from caravan.inference.v1 import inference_service_pb2 as inference_pb
from caravan.inference.v1 import inference_service_pb2_grpc as inference_grpc
from caravan.openai.v1 import openai_service_pb2 as openai_pb
from caravan.openai.v1 import openai_service_pb2_grpc as openai_grpc
from google.api.httpbody_pb2 import HttpBody
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.runtime.channel import SERVER_OPTIONS
from services.runtime.errors import CaravanError

SSE = "text/event-stream; charset=utf-8"
NAMES = ("caravan.openai.v1.OpenAIService", "caravan.inference.v1.InferenceService")


class StandIn(openai_grpc.OpenAIServiceServicer, inference_grpc.InferenceServiceServicer):
    """The body of a completion request is a script: {"do": "echo" | "stream" | "error" | "bare" | "hang" | "break"}."""

    def __init__(self) -> None:
        self.left = threading.Event()
        self.release = threading.Event()
        self.sent = 0
        self.hanging = 0

    def CreateChatCompletion(
        self, request: openai_pb.CreateChatCompletionRequest, context: Any
    ) -> Iterator[openai_pb.CreateChatCompletionResponse]:
        raw = request.body.data
        script = json.loads(raw) if raw.startswith(b"{") else {"do": "echo"}
        for part in self._play(script, raw, context):
            yield openai_pb.CreateChatCompletionResponse(body=part)

    def _play(self, script: dict[str, Any], raw: bytes, context: Any) -> Iterator[HttpBody]:
        match script.get("do", "echo"):
            case "echo":
                context.send_initial_metadata((("x-request-id", "req-stand-in"),))
                yield _json(
                    {
                        "bytes": len(raw),
                        "text": raw[:2000].decode(),
                        "metadata": {
                            k: v for k, v in context.invocation_metadata() if isinstance(v, str)
                        },
                    }
                )
            case "stream":
                padding = b" " * script.get("padding", 0)
                for number in range(script["count"]):
                    yield HttpBody(content_type=SSE, data=b"data: %d%b\n\n" % (number, padding))
                    self.sent += 1
                    if number == 0 and script.get("hold"):
                        self.release.wait(20)
                yield HttpBody(content_type=SSE, data=b"data: [DONE]\n\n")
            case "error":
                message = script.get("message", 'bad "x" ünï\nline')
                _fail(context, script["reason"], message, script.get("retry"))
            case "bare":
                context.abort(grpc.StatusCode[script["code"]], 'bare "words"\nhere')
            case "break":
                yield HttpBody(content_type=SSE, data=b"data: 1\n\n")
                context.abort(grpc.StatusCode.INTERNAL, "broke")
            case "hang":
                context.add_callback(self.left.set)
                self.hanging += 1
                self.left.wait(20)

    def ListModels(self, request: Any, context: Any) -> Any:
        if isinstance(request, inference_pb.ListModelsRequest):
            return inference_pb.ListModelsResponse(models=[inference_pb.Model(name="typed")])
        return openai_pb.ListModelsResponse(body=_json({"object": "list", "data": []}))

    def CreateCompletion(self, request: Any, context: Any) -> Any:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "not scripted")

    Chat = Complete = CancelRequest = ListRequests = PrefillOnly = EndSession = CreateCompletion

    def GetModel(
        self, request: openai_pb.GetModelRequest, context: Any
    ) -> openai_pb.GetModelResponse:
        if request.model.startswith("error-"):
            _fail(context, request.model.removeprefix("error-"), 'bad "x" ünï\nline', None)
        if request.model.startswith("bare-"):
            code = grpc.StatusCode[request.model.removeprefix("bare-")]
            context.abort(code, 'bare "ünï"\nhere %41')
        return openai_pb.GetModelResponse(body=_json({"id": request.model}))


def _fail(context: Any, reason: str, message: str, retry: float | None) -> None:
    error = CaravanError(reason, message, param="messages[0]", retry_after_s=retry)
    context.set_trailing_metadata(error.trailing_metadata(openai=True))
    context.abort(error.row.grpc_code, error.message)


def _json(document: object) -> HttpBody:
    return HttpBody(content_type="application/json", data=json.dumps(document).encode())


def serve(port: int) -> tuple[grpc.Server, StandIn]:
    """Listens on the port. The caller stops the server."""
    server = grpc.server(ThreadPoolExecutor(64), options=SERVER_OPTIONS)
    stand_in = StandIn()
    openai_grpc.add_OpenAIServiceServicer_to_server(stand_in, server)
    inference_grpc.add_InferenceServiceServicer_to_server(stand_in, server)
    checks = health.HealthServicer()
    checks.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((*NAMES, reflection.SERVICE_NAME), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server, stand_in
