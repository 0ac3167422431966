"""A gateway that is restarted behind Envoy: what arrives meanwhile waits, what ran ends clearly."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest
from caravan.inference.v1 import inference_service_pb2 as pb
from caravan.inference.v1 import inference_service_pb2_grpc as stubs

from tests.config.conftest import Front, serving
from tests.support import stand_in_gateway
from tests.support.waiting import wait_for

CHAT = "/v1/chat/completions"


def test_a_gateway_that_stays_away_is_503(tmp_path: Path) -> None:
    """After the last try: 503 in OpenAI's shape with Retry-After, UNAVAILABLE for gRPC, and service again afterwards."""
    with serving(tmp_path, lambda text: text.replace("num_retries: 30", "num_retries: 2")) as front:
        _gone_and_back(front)


def _gone_and_back(front: Front) -> None:
    front.server.stop(0).wait()
    wait_for(lambda: not front.healthy(), "the health check fails")
    for response in (front.http.get("/v1/models"), front.http.post(CHAT, json={})):
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (503, "service_unavailable")
        assert response.headers["retry-after"] == "1"
    with grpc.insecure_channel(f"127.0.0.1:{front.port}") as channel:
        with pytest.raises(grpc.RpcError) as caught:
            stubs.InferenceServiceStub(channel).ListModels(pb.ListModelsRequest())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    front.server, front.gateway = stand_in_gateway.serve(front.gateway_port)
    wait_for(front.healthy, "the health check passes again")
    again = front.http.get("/v1/models")
    assert again.status_code == 200, again.text


def _retries(front: Front) -> int:
    stats = httpx.get(f"http://127.0.0.1:{front.admin}/stats?filter=gateway.upstream_rq_retry$")
    return int(stats.text.rpartition(":")[2])


def _start_again(front: Front) -> None:
    front.server, front.gateway = stand_in_gateway.serve(front.gateway_port)


@pytest.mark.parametrize("noticed", [False, True])
def test_requests_wait_for_a_gateway_that_restarts(front: Front, noticed: bool) -> None:
    """They are tried again for some seconds, large bodies too, whether or not the health check has noticed."""
    front.server.stop(0).wait()
    if noticed:
        wait_for(lambda: not front.healthy(), "the health check fails")
    before = _retries(front)

    def ask(padding: int) -> httpx.Response:
        script = {"do": "echo", "padding": "x" * padding}
        return httpx.post(f"http://127.0.0.1:{front.port}{CHAT}", json=script, timeout=20)

    def ask_typed() -> int:
        with grpc.insecure_channel(f"127.0.0.1:{front.port}") as channel:
            answer = stubs.InferenceServiceStub(channel).ListModels(pb.ListModelsRequest())
            return len(answer.models)

    with ThreadPoolExecutor(16) as pool:
        asked: list[Future[httpx.Response]] = [pool.submit(ask, 10 * 4**n) for n in range(10)]
        typed = pool.submit(ask_typed)
        wait_for(lambda: _retries(front) >= before + 20, "all are tried again")
        _start_again(front)
        assert [response.result().status_code for response in asked] == [200] * 10
        assert typed.result() == 1


def test_a_request_that_ran_is_not_tried_again(front: Front) -> None:
    """What a gateway had begun when it went away is an error, once."""
    front.gateway.hanging = 0
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(
            httpx.post, f"http://127.0.0.1:{front.port}{CHAT}", json={"do": "hang"}, timeout=20
        )
        wait_for(lambda: front.gateway.hanging == 1, "it runs")
        old = front.gateway
        front.server.stop(0)
        _start_again(front)
        response = asking.result()
        old.left.set()
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "server_error"
    assert front.gateway.hanging == 0


def test_what_arrives_at_a_gateway_that_drains(front: Front) -> None:
    """A gateway that finishes its streams takes nothing new: that waits for its successor, and the stream ends whole."""
    front.gateway.release.clear()
    wait_for(front.healthy, "the gateway serves")
    script = {"do": "stream", "count": 3, "hold": True}
    with ThreadPoolExecutor(1) as pool, front.http.stream("POST", CHAT, json=script) as response:
        chunks = response.iter_raw()
        assert next(chunks) == b"data: 0\n\n"
        old, stopped = front.gateway, front.server.stop(20)
        before = _retries(front)
        asking = pool.submit(
            httpx.post, f"http://127.0.0.1:{front.port}{CHAT}", json={"do": "echo"}, timeout=20
        )
        wait_for(lambda: _retries(front) > before, "it is tried again")
        old.release.set()
        assert b"".join(chunks).endswith(b"data: [DONE]\n\n")
        stopped.wait()
        _start_again(front)
        assert asking.result().status_code == 200
