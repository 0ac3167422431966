"""The page of `caravan status`, from messages to lines."""

from __future__ import annotations

import json

import pytest
from caravan.cache.v1 import cache_service_pb2 as cache_pb
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import deployment_pb2
from caravan.core.v1 import generation_pb2, scheduling_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from caravan.engine.v1 import remote_service_pb2 as remote_pb
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from services.cli.oncall_tables import engine_lines, engine_phase, request_phase
from services.cli.remote_tables import Seen
from services.cli.reused_tokens import ReusedTokens, read_metrics
from services.cli.status import frame
from services.cli.status_view import Snapshot, as_json, page
from services.cli.tables import columns_of


def engine(engine_id: str, **load: object) -> pb.Engine:
    """An engine of the demo model."""
    told = pb.Engine(
        engine_id=engine_id,
        model=engine_pb.ModelInfo(name="demo"),
        load=engine_pb.EngineLoad(**{"phase": engine_pb.ENGINE_PHASE_IDLE, **load}),  # type: ignore[arg-type]
    )
    told.report_age.FromMilliseconds(400)
    return told


def request(number: int, **fields: object) -> pb.InflightRequest:
    """A request that generates."""
    told = pb.InflightRequest(
        request_id=f"req-{number}",
        model="demo",
        engine_id="engine-0",
        age=Duration(seconds=75 - number),
        queued=Duration(nanos=300_000_000),
        phase=pb.INFLIGHT_PHASE_RUNNING,
        engine_phase=engine_pb.REQUEST_PHASE_GENERATING,
        prompt_tokens=120,
        completion_tokens=34,
        priority=scheduling_pb2.PRIORITY_NORMAL,
    )
    told.MergeFrom(pb.InflightRequest(**fields))  # type: ignore[arg-type]
    return told


def snapshot(requests: int = 2) -> Snapshot:
    """A stack with something of everything."""
    busy = engine(
        "engine-0",
        phase=engine_pb.ENGINE_PHASE_GENERATING,
        active_sequences=2,
        tokens_per_second=222.4,
        free_cells=900,
        last_hit=generation_pb2.CACHE_HIT_PARTIAL,
        last_hit_tokens=256,
    )
    busy.leases, busy.written_off = 2, 1
    loading = engine("engine-1", phase=engine_pb.ENGINE_PHASE_LOADING, load_progress=0.45)
    deployment = deployment_pb2.DeploymentRecord(
        deployment=deployment_pb2.Deployment(name="next", replicas=2),
        state=deployment_pb2.DEPLOYMENT_STATE_PENDING,
        note="0 of 2 engines ready",
    )
    disk = cache_pb.PlaceStats(
        tier=cache_pb.TIER_DISK, root_id="r", bytes=3 << 20, quota_bytes=4 << 30
    )
    return Snapshot(
        "127.0.0.1:7002",
        [pb.Model(name="demo", ready_engines=1, in_flight=2, capacity=32)],
        [busy, loading],
        [request(number) for number in range(requests)],
        [deployment],
        cache_pb.GetStatsResponse(blocks_wanted=10, blocks_found=8, places=[disk]),
        ReusedTokens(12_345, 7_654),
    )


def test_the_whole_page() -> None:
    """Models with and without engines, engines, requests oldest first, and the cache, each in its columns."""
    assert page(snapshot()) == [
        "caravan 127.0.0.1:7002   2 engines   2 running   0 queued   222 tokens/s",
        "cache: 62% of 12345 prompt tokens reused; disk 3.0 MiB of 4.0 GiB",
        "",
        "MODEL  STATE    READY  RUNNING  QUEUED  CAPACITY",
        "demo   serving  1            2       0        32",
        "next   pending  0/2          0       0         0",
        "! next: 0 of 2 engines ready",
        "",
        "ENGINE    MODEL  PHASE        LEASES  ACTIVE  QUEUED  SWAPPED  TOK/S  FREE CELLS  LAST HIT",
        "engine-0  demo   generating        2       2       0        0    222         900  partial 256",
        "engine-1  demo   loading 45%       0       0       0        0      0           0  -",
        "! engine-0: did not end 1 request in time",
        "",
        "REQUEST  MODEL  ENGINE    PHASE         AGE  QUEUED  PROMPT  ANSWER  PRIORITY  TENANT",
        "req-0    demo   engine-0  generating  1 min   0.3 s     120      34  normal    -",
        "req-1    demo   engine-0  generating  1 min   0.3 s     120      34  normal    -",
    ]


def test_an_engine_in_front_of_a_provider() -> None:
    """Who runs the model stands behind its name; cells are none of its business."""
    told = engine("engine-0", active_sequences=3)
    told.model.provider = "openai"
    (_, line) = engine_lines([told])
    assert line.split("  ")[:2] == ["engine-0", "demo (openai)"]
    assert line.split()[-2:] == ["-", "-"]


def test_why_an_engine_is_not_chosen() -> None:
    """A note for each reason; one that says itself that it drains needs none."""
    told = engine("engine-0")
    told.drained = told.held_back = told.suspect = True
    notes = list(engine_lines([told]))[2:]
    assert [note.split(":")[1].split()[0] for note in notes] == ["was", "held", "suspect"]
    told = engine("engine-0", phase=engine_pb.ENGINE_PHASE_DRAINING)
    told.drained = True
    assert len(list(engine_lines([told]))) == 2


def test_why_a_provider_is_not_asked() -> None:
    """Breakers that keep calls back, and budgets that are spent; nothing of those that are well, or do not answer."""
    told = engine("engine-0")
    told.model.provider = "openai"
    states = [
        remote_pb.BreakerStatus(state=remote_pb.BREAKER_STATE_OPEN, failures=10),
        remote_pb.BreakerStatus(state=remote_pb.BREAKER_STATE_HALF_OPEN),
        remote_pb.BreakerStatus(state=remote_pb.BREAKER_STATE_CLOSED, failures=3),
    ]
    states[0].remaining.FromSeconds(28)
    seen = Snapshot(
        engines=[told],
        remotes=[
            *(Seen(told, remote_pb.GetRemoteStatusResponse(breaker=state)) for state in states),
            Seen(told, None, "no answer"),
        ],
        costs=[
            pb.DeploymentCosts(deployment="chat", exceeded=True),
            pb.DeploymentCosts(deployment="well"),
        ],
    )
    assert [line for line in page(seen) if line.startswith("!")] == [
        "! engine-0: breaker of openai: open for 28.0 s",
        "! engine-0: breaker of openai: half open",
        "! chat: its budget is spent",
    ]
    shown = as_json(seen)
    assert [one["breaker"]["state"] for one in shown["remotes"]][:2] == [
        "BREAKER_STATE_OPEN",
        "BREAKER_STATE_HALF_OPEN",
    ]
    assert [one["exceeded"] for one in shown["costs"]] == [True, False]


@pytest.mark.parametrize("columns", [1, 12, 40, 79])
@pytest.mark.parametrize("rows", [1, 10, 24])
def test_a_small_terminal_cuts(columns: int, rows: int) -> None:
    """Lines never wrap, whatever is in them; many requests are counted instead of shown."""
    seen = snapshot(requests=50)
    lines = page(seen, columns, rows)
    assert all(columns_of(line) <= columns for line in lines)
    assert len(lines) < len(page(seen))
    assert frame(lines, rows).count("\n") < rows


@given(st.text(), st.text(), st.text(), st.integers(1, 200), st.integers(1, 60))
def test_whatever_names_there_are(
    model: str, tenant: str, note: str, columns: int, rows: int
) -> None:
    """Every line fits and shows only what can be shown, whatever clients and engines call themselves."""
    names = [name.encode(errors="replace").decode() for name in (model, tenant, note)]
    model, tenant, note = names
    seen = Snapshot(
        "127.0.0.1:7002",
        [pb.Model(name=model)],
        [engine(model, failure=note)],
        [request(number, request_id=model, tenant=tenant) for number in range(20)],
    )
    for line in page(seen, columns, rows):
        assert line.isprintable()
        assert columns_of(line) <= columns


def test_what_is_not_shown_is_counted() -> None:
    """The oldest fit; the last line says how many more there are."""
    lines = page(snapshot(requests=50), None, 24)
    assert len(lines) == 24
    assert lines[-1] == "and 41 more"
    assert lines[-2].startswith("req-8 ")


def test_an_empty_stack() -> None:
    """A coordinator that has just started."""
    assert page(Snapshot("127.0.0.1:1")) == [
        "caravan 127.0.0.1:1   0 engines   0 running   0 queued   0 tokens/s",
        "cache: no cache service",
        "",
        "no models",
        "",
        "no requests",
    ]


def test_a_problem_is_all_there_is() -> None:
    """Old figures beside it would look like those of now."""
    seen = Snapshot("127.0.0.1:1", problem="no coordinator answers at 127.0.0.1:1")
    assert page(seen, 30) == ["caravan: no coordinator answer"]


def test_strangers_do_not_command_the_terminal() -> None:
    """Ids, tenants and failures may hold anything."""
    evil = "\x1b[2J\r\n"
    broken = engine(evil, phase=engine_pb.ENGINE_PHASE_FAILED, failure=evil)
    asked = request(0, request_id=evil, model=evil, tenant=evil)
    lines = page(Snapshot("a", [pb.Model(name=evil)], [broken], [asked]))
    lines += page(Snapshot(problem=evil))
    assert not any("\x1b" in line or "\n" in line or "\r" in line for line in lines)


def test_phases() -> None:
    """What an engine last said decides only while the lease is held and nobody ends it."""
    assert request_phase(request(0)) == "generating"
    waits = request(0, engine_phase=engine_pb.REQUEST_PHASE_QUEUED)
    assert request_phase(waits) == "admitted"
    assert request_phase(request(0, phase=pb.INFLIGHT_PHASE_CANCELLING)) == "cancelling"
    assert request_phase(request(0, phase=pb.INFLIGHT_PHASE_QUEUED)) == "queued"
    untold = pb.InflightRequest(phase=pb.INFLIGHT_PHASE_RUNNING)
    assert request_phase(untold) == "running"
    draining = engine("e", phase=engine_pb.ENGINE_PHASE_DRAINING)
    assert engine_phase(draining) == "drained"
    draining.leases = 1
    assert engine_phase(draining) == "draining"
    assert engine_phase(pb.Engine(load=engine_pb.EngineLoad(phase=99))) == "99"  # type: ignore[arg-type]


def test_silence_and_failures_are_noted() -> None:
    """An engine whose reports stay away, and why one cannot load."""
    silent = engine("engine-0")
    silent.report_age.FromMilliseconds(2_900)
    failed = engine("engine-1", phase=engine_pb.ENGINE_PHASE_FAILED, failure="no such file")
    lines = page(Snapshot("a", (), [silent, failed]))
    assert "! engine-0: silent for 2.9 s" in lines
    assert "! engine-1: no such file" in lines


def test_json_holds_the_messages_whole() -> None:
    """Fields at their defaults included, so that programs need not know them."""
    told = json.loads(json.dumps(as_json(snapshot())))
    assert told["models"][0]["queued"] == 0
    assert told["engines"][0]["load"]["phase"] == "ENGINE_PHASE_GENERATING"
    assert told["requests"][0]["age"] == "75s"
    assert told["deployments"][0]["note"] == "0 of 2 engines ready"
    assert told["cache"]["blocks_found"] == "8"
    assert told["reused"] == {"prompt": 12_345, "reused": 7_654}
    assert (as_json(Snapshot())["cache"], as_json(Snapshot())["reused"]) == (None, None)


def test_reused_tokens_are_read_from_metrics() -> None:
    """Sums over models and kinds of hits; other series, and none at all, do not matter."""
    text = """\
# TYPE caravan_gateway_prompt_tokens_total counter
caravan_gateway_prompt_tokens_total{model="demo"} 100.0
caravan_gateway_prompt_tokens_total{model="other"} 20.0
# TYPE caravan_gateway_cached_prompt_tokens_total counter
caravan_gateway_cached_prompt_tokens_total{hit="partial",model="demo"} 30.0
caravan_gateway_cached_prompt_tokens_total{hit="exact",model="demo"} 5.0
# TYPE caravan_gateway_requests gauge
caravan_gateway_requests 3.0
"""
    assert read_metrics(text) == ReusedTokens(120, 35)
    assert read_metrics("") == ReusedTokens()
    with pytest.raises(ValueError):
        read_metrics("caravan_gateway_requests {")
