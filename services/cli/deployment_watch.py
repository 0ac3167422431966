"""What the coordinator wants to be run, told again after each change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import aclosing
from typing import Final, TypeAlias

import grpc
from caravan.coordinator.v1 import deployment_pb2
from caravan.coordinator.v1 import deployment_service_pb2 as pb
from caravan.coordinator.v1 import deployment_service_pb2_grpc as pb_grpc
from google.protobuf import json_format

from services.cli.fleet import Wanted
from services.cli.tables import enum_word
from services.runtime.channel import open_channel
from services.runtime.remote_options import PROVIDERS

Records: TypeAlias = Collection[deployment_pb2.DeploymentRecord]

_AGAIN_S: Final = 0.2


async def watch_deployments(address: str) -> AsyncIterator[tuple[Wanted, ...]]:
    """What is wanted at once and after each change, for ever; nothing while no coordinator answers at host:port."""
    async with (
        open_channel(address) as channel,
        aclosing(watch_records(pb_grpc.DeploymentServiceStub(channel))) as watch,
    ):
        async for records in watch:
            yield tuple(map(_wanted, records))


async def watch_records(
    stub: pb_grpc.DeploymentServiceAsyncStub,
) -> AsyncGenerator[Records, None]:
    """All deployments at once and after each change, for ever; nothing while no coordinator answers. To be closed by the caller."""
    while True:
        call = stub.WatchDeployments(pb.WatchDeploymentsRequest(), wait_for_ready=True)
        try:
            async for told in call:
                yield told.deployments
        except grpc.aio.AioRpcError:
            await asyncio.sleep(_AGAIN_S)
        finally:
            call.cancel()


def _wanted(record: deployment_pb2.DeploymentRecord) -> Wanted:
    deployment, engine = record.deployment, record.deployment.engine
    runtime = enum_word(deployment_pb2.Runtime, "RUNTIME_", deployment.runtime)
    options = json_format.MessageToJson(
        deployment.remote, preserving_proto_field_name=True, indent=None
    )
    return Wanted(
        name=deployment.name,
        model=deployment.model,
        revision=record.revision,
        replicas=deployment.replicas,
        is_scripted=deployment.runtime == deployment_pb2.RUNTIME_SCRIPTED,
        provider=runtime if runtime in PROVIDERS else "",
        remote_options=options if runtime in PROVIDERS else "",
        is_removed=record.state == deployment_pb2.DEPLOYMENT_STATE_DRAINING,
        former_engines=record.former_engines,
        context_tokens=engine.context_tokens,
        max_sequences=engine.max_sequences,
        threads=engine.threads,
    )
