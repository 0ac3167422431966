"""Metrics, traces, memory and the access log of the running stack."""

from __future__ import annotations

import json

import httpx
import psutil
import pytest

from tests.support.otlp_collector import Collector, Span
from tests.support.stack import CHAT, Stack, chat_body
from tests.support.waiting import wait_for

pytestmark = pytest.mark.e2e
SERIES = {
    "gateway": [
        "caravan_requests_total",
        "caravan_time_to_first_token_seconds_bucket",
        "caravan_inter_token_seconds_bucket",
        "caravan_request_duration_seconds_bucket",
    ],
    "engine-0": [
        "caravan_queue_seconds_bucket",
        "caravan_decode_step_seconds_bucket",
        "caravan_engine_active_sequences",
        "caravan_queue_depth",
        "caravan_prompt_tokens_total",
        "caravan_generated_tokens_total",
    ],
    "coordinator": ["caravan_engines", "caravan_leases", "caravan_route_total"],
    "envoy": ["envoy_http_downstream_rq_total"],
}


@pytest.mark.parametrize("name", SERIES)
def test_every_process_has_metrics(stack: Stack, http: httpx.Client, name: str) -> None:
    """The address in endpoints.json serves the series that dashboards need."""
    assert http.post(CHAT, json=chat_body("fast", max_tokens=3)).status_code == 200
    text = stack.metrics(name)
    missing = [series for series in SERIES[name] if series not in text]
    assert not missing


def test_outcomes_are_counted(stack: Stack, http: httpx.Client) -> None:
    """A finished request raises the counter of its outcome by one."""

    def finished() -> float:
        return sum(
            float(line.rpartition(" ")[2])
            for line in stack.metrics("gateway").splitlines()
            if line.startswith("caravan_requests_total{") and 'outcome="finished"' in line
        )

    before = finished()
    http.post(CHAT, json=chat_body("fast", max_tokens=3))
    wait_for(lambda: finished() == before + 1, "the counter rises by one")


def test_one_trace_across_three_services(http: httpx.Client, collector: Collector) -> None:
    """A request is one trace: the client's span, the gateway's below it, coordinator and engine below that."""
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    headers = {"traceparent": f"00-{trace}-{parent}-01"}
    body = chat_body("fast", max_tokens=3, ignore_eos=True)
    assert http.post(CHAT, json=body, headers=headers).status_code == 200

    def whole() -> dict[str, Span] | None:
        spans = {span.service: span for span in collector.trace(trace)}
        return spans if len(spans) == 3 else None

    spans = wait_for(whole, "three spans")
    assert spans is not None
    gateway = spans["caravan-gateway"]
    assert gateway.parent_id == parent
    for service, name in (("caravan-coordinator", "route"), ("caravan-engine", "generate")):
        assert spans[service].name == name
        assert spans[service].parent_id == gateway.span_id
    assert gateway.attributes["gen_ai.request.model"] == "fast"
    assert gateway.attributes["gen_ai.usage.output_tokens"] == 3


def test_all_but_the_engines_are_small(stack: Stack) -> None:
    """Envoy, gateway, coordinator, cache service, `caravan up` and its lifeline together stay below 400 MB."""
    others = [pid for name, pid in stack.pids().items() if not name.startswith("engine-")]
    own = psutil.Process(stack.process.pid)
    engines = {pid for name, pid in stack.pids().items() if name.startswith("engine-")}
    family = {own.pid, *others, *(child.pid for child in own.children())} - engines
    resident = {pid: psutil.Process(pid).memory_info().rss for pid in family}
    assert len(family) == 6
    assert sum(resident.values()) <= 400_000_000, resident


def test_the_access_log_names_the_request(stack: Stack, http: httpx.Client) -> None:
    """A line of the access log leads from the client's id to ours."""
    body = chat_body("fast", max_tokens=1)
    answer = http.post(CHAT, json=body, headers={"x-request-id": "from-the-client"})
    log = stack.state_dir / "logs" / "access.log"

    def line() -> dict[str, object] | None:
        lines = [json.loads(text) for text in log.read_text().splitlines()]
        return next((x for x in lines if x["client_request_id"] == "from-the-client"), None)

    found = wait_for(line, "the line")
    assert found is not None
    assert found["request_id"] == answer.headers["x-request-id"]
    assert (found["path"], found["status"]) == (CHAT, 200)
