"""DeploymentService over gRPC: translates, keeps what was applied in a file, and tells watchers."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
from caravan.coordinator.v1 import deployment_pb2
from caravan.coordinator.v1 import deployment_service_pb2 as pb
from caravan.coordinator.v1 import deployment_service_pb2_grpc as pb_grpc

from services.coordinator import deployment_store, refusals
from services.coordinator.checks import checked_id
from services.coordinator.deployment import Deployment
from services.coordinator.deployment_messages import (
    from_messages,
    to_change,
    to_mistake,
    to_record,
)
from services.coordinator.deployments import Deployments
from services.coordinator.effects import Effects
from services.runtime.clock import Clock
from services.runtime.errors import CaravanError

_Answer = TypeVar("_Answer")

WATCHERS_MAX: Final = 64
"""Watches at a time; each holds no more than what it sends."""


class DeploymentServicer(pb_grpc.DeploymentServiceServicer):
    """The deployments at the edge, on the event loop of the coordinator.

    `perform` carries out effects. What is applied is first kept in the file `state`, where one is given.
    """

    def __init__(
        self,
        deployments: Deployments,
        perform: Callable[[Effects], None],
        clock: Clock,
        state: Path | None = None,
    ) -> None:
        self._deployments = deployments
        self._perform = perform
        self._clock = clock
        self._state = state
        # The file is written aside of the event loop: meanwhile nothing else is applied.
        self._applying = asyncio.Lock()
        self._tasks: set[asyncio.Future[Any]] = set()
        self._watchers: set[asyncio.Event] = set()
        self._draining = False
        deployments.on_change = self._wake

    async def ApplyDeployments(
        self,
        request: pb.ApplyDeploymentsRequest,
        context: grpc.aio.ServicerContext[pb.ApplyDeploymentsRequest, pb.ApplyDeploymentsResponse],
    ) -> pb.ApplyDeploymentsResponse:
        return await self._whole(self._apply(request))

    async def RemoveDeployment(
        self,
        request: pb.RemoveDeploymentRequest,
        context: grpc.aio.ServicerContext[pb.RemoveDeploymentRequest, pb.RemoveDeploymentResponse],
    ) -> pb.RemoveDeploymentResponse:
        return await self._whole(self._remove(request))

    async def ListDeployments(
        self,
        request: pb.ListDeploymentsRequest,
        context: grpc.aio.ServicerContext[pb.ListDeploymentsRequest, pb.ListDeploymentsResponse],
    ) -> pb.ListDeploymentsResponse:
        return pb.ListDeploymentsResponse(deployments=self._records())

    async def WatchDeployments(
        self,
        request: pb.WatchDeploymentsRequest,
        context: grpc.aio.ServicerContext[pb.WatchDeploymentsRequest, pb.WatchDeploymentsResponse],
    ) -> AsyncIterator[pb.WatchDeploymentsResponse]:
        if len(self._watchers) >= WATCHERS_MAX:
            raise refusals.table_full("watches of deployments", WATCHERS_MAX)
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            told: list[deployment_pb2.DeploymentRecord] | None = None
            while not self._draining:
                # Changes while the one before is being sent come as one.
                changed.clear()
                records = self._records()
                if records != told:
                    told = records
                    yield pb.WatchDeploymentsResponse(deployments=records)
                await changed.wait()
        finally:
            self._watchers.discard(changed)
        raise refusals.draining()

    def drain(self) -> None:
        """Ends the watches, so that they join the next coordinator."""
        self._draining = True
        self._wake()

    async def _whole(self, work: Coroutine[Any, Any, _Answer]) -> _Answer:
        """Does all of the work although the call may end: what is in the file is what is applied."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _apply(self, request: pb.ApplyDeploymentsRequest) -> pb.ApplyDeploymentsResponse:
        wanted, mistakes = from_messages(request.deployments)
        async with self._applying:
            changes, more = self._deployments.check(wanted, remove_others=request.remove_others)
            mistakes += more
            if mistakes:
                return pb.ApplyDeploymentsResponse(mistakes=map(to_mistake, mistakes))
            if not request.validate_only:
                kept = {} if request.remove_others else dict(self._deployments.current())
                kept.update({deployment.name: deployment for deployment in wanted})
                await self._keep(kept.values())
                self._perform(
                    self._deployments.apply(
                        wanted,
                        remove_others=request.remove_others,
                        now=self._clock.monotonic(),
                        wall=self._clock.wall(),
                    )
                )
        return pb.ApplyDeploymentsResponse(changes=map(to_change, changes))

    async def _remove(self, request: pb.RemoveDeploymentRequest) -> pb.RemoveDeploymentResponse:
        name = checked_id("name", request.name)
        async with self._applying:
            kept = dict(self._deployments.current())
            if kept.pop(name, None) is None:
                raise CaravanError(
                    "DEPLOYMENT_NOT_FOUND", f"No deployment '{name}' is kept.", name=name
                )
            dependents = self._deployments.dependents(name)
            if dependents:
                raise CaravanError(
                    "INVALID_VALUE",
                    f"'{name}' is a fallback of {', '.join(dependents)}: change that first.",
                    param="name",
                )
            await self._keep(kept.values())
            self._perform(self._deployments.remove(name, self._clock.monotonic()))
        return pb.RemoveDeploymentResponse()

    def _wake(self) -> None:
        for changed in self._watchers:
            changed.set()

    def _records(self) -> list[deployment_pb2.DeploymentRecord]:
        return [to_record(kept) for kept in self._deployments]

    async def _keep(self, deployments: Iterable[Deployment]) -> None:
        """Writes what is about to be kept. Raises CaravanError: INTERNAL where that is not possible."""
        if self._state is None:
            return
        wall = self._clock.wall()
        kept = [
            (deployment, self._deployments.created_at(deployment.name) or wall)
            for deployment in deployments
        ]
        try:
            await asyncio.to_thread(deployment_store.save, self._state, kept)
        except OSError as error:
            raise CaravanError(
                "INTERNAL", f"The deployments cannot be kept: {error.strerror}."
            ) from error
