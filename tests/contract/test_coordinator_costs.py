"""Costs and budgets over gRPC: engines report, requests are refused or fall back, people ask, and a file keeps the record."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc
from caravan.coordinator.v1 import deployment_pb2
from caravan.coordinator.v1 import deployment_service_pb2 as service_pb
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from caravan.engine.v1 import remote_options_pb2

from services.cli.__main__ import main
from services.coordinator.spend_keeper import SpendKeeper, open_ledger
from services.coordinator.spend_ledger import Amounts, SpendLedger
from services.runtime.channel import open_channel
from services.runtime.settings import SettingsError
from tests.support.coordinator import (
    Coordinator,
    EnginePeer,
    refused,
    running_coordinator,
    until,
)
from tests.support.processes import failure, log_line, process

READY = re.compile(rb"serving on port (\d+)")
USD = 1_000_000_000
BUDGET = deployment_pb2.Budget(usd_per_hour=1, tenant_usd_per_day=0.8)
CHAT = deployment_pb2.Deployment(
    name="chat",
    model="gpt-4o-mini",
    replicas=0,
    remote=remote_options_pb2.RemoteOptions(
        credential=remote_options_pb2.Credential(env="OPENAI_API_KEY")
    ),
    budget=BUDGET,
    fallback=[
        deployment_pb2.Fallback(deployment="local", reasons=[deployment_pb2.FALLBACK_REASON_BUDGET])
    ],
)
LOCAL = deployment_pb2.Deployment(name="local", model="/m.gguf", replicas=0)


def spent(tenant: str, nanousd: int, requests: int = 1) -> pb.SpendCounter:
    """What an engine tells of a tenant: each request has a prompt of 10 tokens, 4 of them cached, and an answer of 3."""
    return pb.SpendCounter(
        tenant=tenant,
        nanousd=nanousd,
        requests=requests,
        prompt_tokens=10 * requests,
        cached_tokens=4 * requests,
        completion_tokens=3 * requests,
    )


async def report(engine: EnginePeer, *counters: pb.SpendCounter) -> None:
    """The engine tells what its requests have cost since it started."""
    load = engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_IDLE)
    await engine.send(pb.JoinEngineRequest(report=pb.EngineReport(load=load, spend=counters)))


async def costs(stub: pb_grpc.CoordinatorServiceAsyncStub) -> list[pb.DeploymentCosts]:
    """What GetCosts tells."""
    return list((await stub.GetCosts(pb.GetCostsRequest(), timeout=10)).deployments)


@asynccontextmanager
async def deployed(*deployments: deployment_pb2.Deployment) -> AsyncIterator[Coordinator]:
    """A coordinator to which these were applied."""
    async with running_coordinator() as coordinator:
        request = service_pb.ApplyDeploymentsRequest(deployments=deployments)
        told = await coordinator.deployments.ApplyDeployments(request, timeout=10)
        assert not told.mistakes
        yield coordinator


async def total(coordinator: Coordinator, nanousd: int) -> None:
    """Returns when the deployment has cost so much."""

    def is_told() -> bool:
        spend = coordinator.state.costs.ledger.find("chat")
        return spend is not None and spend.own.total.nanousd == nanousd

    await until(is_told)


async def test_a_spent_budget_is_a_refusal_with_a_time_or_a_fallback() -> None:
    """The contract of BUDGET_EXCEEDED on the wire, and a lease of the fallback for who may have it."""
    async with deployed(CHAT, LOCAL) as coordinator:
        remote = await coordinator.engine("engine-0", "chat")
        local = await coordinator.engine("engine-1", "local")
        gateway = await coordinator.gateway()
        await report(remote, spent("ants", 800_000_000), spent("", 199_999_999))
        await total(coordinator, 999_999_999)
        assert await gateway.route("req-1", "chat")
        error = await refused(gateway.ask("req-2", "chat", wait_s=5, tenant="ants"))
        assert (error.reason, error.metadata["budget"]) == ("BUDGET_EXCEEDED", "tenant_usd_per_day")
        assert error.retry_after_s is not None
        assert 86_400 - 900 <= error.retry_after_s <= 86_400 + 900
        await report(remote, spent("ants", 800_000_000), spent("", 200_000_000))
        await total(coordinator, USD)
        error = await gateway.refusal("req-3", "chat")
        assert (error.reason, error.metadata) == (
            "BUDGET_EXCEEDED",
            {"model": "chat", "budget": "usd_per_hour"},
        )
        granted = await gateway.ask("req-4", "chat", wait_s=0, may_fall_back=True)
        assert (granted.model, granted.lease.engine_id) == ("local", "engine-1")
        assert coordinator.metric("caravan_budget_exceeded", deployment="chat") == 1
        assert coordinator.metric("caravan_budget_crossings_total", part="deployment") == 1
        assert coordinator.metric("caravan_budget_crossings_total", part="tenant") == 1
        assert coordinator.metric("caravan_cost_usd_total", deployment="chat") == 1.0
        for peer in (remote, local, gateway):
            peer.die()


async def test_a_call_that_waits_is_refused_when_the_budget_is_spent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It does not wait for a place that it will not get; the log tells once."""
    caplog.set_level(logging.INFO)
    async with deployed(CHAT, LOCAL) as coordinator:
        engine, gateway = (
            await coordinator.engine("engine-0", "chat", 1),
            await coordinator.gateway(),
        )
        await gateway.route("req-1", "chat")
        waiting = asyncio.ensure_future(refused(gateway.ask("req-2", "chat", wait_s=9)))
        await until(lambda: len(coordinator.state.waiting) == 1)
        await report(engine, spent("", 2 * USD))
        assert (await waiting).reason == "BUDGET_EXCEEDED"
        await report(engine, spent("", 3 * USD))
        await total(coordinator, 3 * USD)
        assert caplog.text.count("the budget of chat is spent: usd_per_hour; reject") == 1
        engine.die()
        gateway.die()


async def test_costs_are_told_of_lives_that_are_gone_too() -> None:
    """Windows, sums and tenants, the dearest first; deployments without costs or a budget are left out."""
    async with deployed(CHAT, LOCAL) as coordinator:
        assert (
            await costs(coordinator.stub)
            == [pb.DeploymentCosts(deployment="chat", total=pb.Costs(), budget=CHAT.budget)]
            or (await costs(coordinator.stub))[0].budget.usd_per_hour == 1
        )
        engine = await coordinator.engine("engine-0", "chat")
        await report(engine, spent("bees", 300), spent("ants", 500, requests=2))
        await total(coordinator, 800)
        engine.die()
        coordinator.clock.advance(4_000)
        again = await coordinator.engine("engine-0", "chat")
        await report(again, spent("ants", 100))
        await total(coordinator, 900)
        (told,) = await costs(coordinator.stub)
        assert (told.deployment, told.exceeded, told.budget.usd_per_hour) == ("chat", False, 1)
        assert told.total == pb.Costs(
            hour_nanousd=100,
            day_nanousd=900,
            total_nanousd=900,
            requests=4,
            prompt_tokens=40,
            cached_tokens=16,
            completion_tokens=12,
        )
        assert [(one.tenant, one.costs.total_nanousd) for one in told.tenants] == [
            ("ants", 600),
            ("bees", 300),
        ]
        again.die()


@pytest.mark.parametrize(
    "counters", [[spent("t" * 129, 1)], [spent(f"t{n}", 1) for n in range(1_025)]]
)
async def test_reports_out_of_bounds_end_the_session(counters: list[pb.SpendCounter]) -> None:
    """Tables are bounded by what is checked at the door."""
    async with running_coordinator() as coordinator:
        engine = await coordinator.engine("engine-0", "chat")
        await report(engine, *counters)
        assert (await engine.end()).reason == "INVALID_VALUE"


# --- the record -------------------------------------------------------------------------------------------------------


async def test_the_record_outlives_the_process(tmp_path: Path) -> None:
    """After SIGTERM with all that was told, after SIGKILL with what engines tell again: nothing twice, nothing lost."""
    path = tmp_path / "spend.jsonl"
    for end, expected in ((signal.SIGTERM, 500), (signal.SIGKILL, 900), (signal.SIGTERM, 900)):
        async with process("coordinator", CARAVAN_COORDINATOR_SPEND_STATE=str(path)) as running:
            port = int((await log_line(running, READY)).group(1))
            async with open_channel(f"127.0.0.1:{port}") as channel:
                stub = pb_grpc.CoordinatorServiceStub(channel)
                engine = EnginePeer(stub, "engine-0", "chat", incarnation="one-life")
                await engine.join()
                await report(engine, spent("ants", expected))
                async with asyncio.timeout(10):
                    while not (told := await costs(stub)) or told[0].total.total_nanousd < expected:  # noqa: ASYNC110 - another process
                        await asyncio.sleep(0.01)
                assert told[0].total.total_nanousd == expected
                running.send_signal(end)
                async with asyncio.timeout(20):
                    await running.wait()
                engine.die()
    ledger = SpendLedger()
    open_ledger(path, ledger, 0)
    spend = ledger.find("chat")
    assert spend is not None
    assert spend.own.total.nanousd == 900


async def test_a_record_that_makes_no_sense_is_set_aside(tmp_path: Path) -> None:
    """The log says where it is, and the coordinator serves."""
    path = tmp_path / "spend.jsonl"
    path.write_text("{ cut off")
    async with process("coordinator", CARAVAN_COORDINATOR_SPEND_STATE=str(path)) as running:
        assert await log_line(running, re.compile(rb"makes no sense.*spend\.jsonl\.bad"))
        assert await log_line(running, READY)
    assert (tmp_path / "spend.jsonl.bad").read_text() == "{ cut off"


async def test_a_record_that_cannot_be_read_is_a_mistake_of_the_settings(tmp_path: Path) -> None:
    """One line, code 2: to begin at 0 must be wanted."""
    code, errors = await failure("coordinator", CARAVAN_COORDINATOR_SPEND_STATE=str(tmp_path))
    assert code == 2
    assert "CARAVAN_COORDINATOR_SPEND_STATE" in errors
    assert "Traceback" not in errors
    with pytest.raises(SettingsError):
        open_ledger(tmp_path, SpendLedger(), 0)


async def test_a_disk_that_fails_is_told_once_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The coordinator goes on; as soon as the file can be written, it is."""
    folder = tmp_path / "gone"
    folder.write_text("a file where a folder should be")
    ledger = SpendLedger()
    keeper = SpendKeeper(folder / "spend.jsonl", ledger, every_s=0.01)
    running = asyncio.create_task(keeper.run())
    ledger.take("chat", "a", [spent("", 5)], 0)
    await until(lambda: "cannot be written" in caplog.text)
    ledger.take("chat", "a", [spent("", 6)], 0)
    folder.unlink()
    await until((folder / "spend.jsonl").exists)
    keeper.stop()
    async with asyncio.timeout(10):
        await running
    assert caplog.text.count("cannot be written") == 1
    again = SpendLedger()
    open_ledger(folder / "spend.jsonl", again, 0)
    assert again.lives["a"].counters == {"": Amounts(6, 1, 10, 4, 3)}


# --- `caravan costs` --------------------------------------------------------------------------------------------------


async def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """A table with the tenants under each deployment; JSON by the line; nothing to tell is said."""
    async with deployed() as coordinator:

        async def run(*options: str) -> list[str]:
            line = ["costs", "--address", coordinator.address, *options]
            assert await asyncio.to_thread(main, line) == 0
            return capsys.readouterr().out.splitlines()

        assert await run() == ["no costs"]
        engine = await coordinator.engine("engine-0", "chat")
        await report(engine, spent("ants", 1_250 * USD), spent("", 3_000_000))
        await total(coordinator, 1_250 * USD + 3_000_000)
        head, *lines = await run()
        assert head.split() == [
            *("DEPLOYMENT", "HOUR", "DAY", "TOTAL", "BUDGET", "STATE"),
            *("REQUESTS", "PROMPT", "CACHED", "ANSWER"),
        ]
        assert [line.split() for line in lines] == [
            ["chat", *["$1,250.00"] * 3, "-", "-", "2", "20", "8", "6"],
            ["ants", *["$1,250.00"] * 3, "-", "-", "1", "10", "4", "3"],
            ["-", *["$0.003000"] * 3, "-", "-", "1", "10", "4", "3"],
        ]
        (told,) = [json.loads(line) for line in await run("--json")]
        assert told["total"]["total_nanousd"] == str(1_250 * USD + 3_000_000)
        engine.die()


def test_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    """As for the other commands of the person on call."""
    assert main(["costs", "--address", "127.0.0.1:1"]) == 1
    assert capsys.readouterr().err == "caravan costs: no coordinator answers at 127.0.0.1:1\n"
