"""Ends conversations: every engine of a model lets go of what it keeps for one."""

from __future__ import annotations

import asyncio
from typing import Final

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as coordinator_pb
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.gateway.coordinator import CoordinatorClient, model_not_found
from services.gateway.engines import EnginePool
from services.runtime.errors import from_rpc_error

_AT_ONCE: Final = 16
"""Engines that are asked at a time."""
_ANSWER_S: Final = 10.0
"""An engine answers between two steps."""


class Conversations:
    """Knows which engines to ask."""

    def __init__(self, coordinator: CoordinatorClient, engines: EnginePool) -> None:
        self._coordinator = coordinator
        self._engines = engines

    async def end(self, model: str, session_id: str, salt: str) -> bool:
        """Whether any engine kept something for a conversation of a salt.

        Raises MODEL_NOT_FOUND, and what a living engine answers but cannot do.
        """
        serving = [
            engine
            for engine in await self._coordinator.list_engines()
            if engine.model.name == model
        ]
        if not serving:
            await self._check_known(model)
        limit = asyncio.Semaphore(_AT_ONCE)
        request = engine_pb.EndSessionRequest(session_id=session_id, salt=salt)
        asked = (self._end(engine, request, limit) for engine in serving)
        # All are asked to the end, also where one fails.
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return any(answers)

    async def _check_known(self, model: str) -> None:
        if all(known.name != model for known in await self._coordinator.list_models()):
            raise model_not_found(model)

    async def _end(
        self,
        engine: coordinator_pb.Engine,
        request: engine_pb.EndSessionRequest,
        limit: asyncio.Semaphore,
    ) -> bool:
        async with limit, self._engines.use(engine.address) as stub:
            try:
                answer = await stub.EndSession(request, timeout=_ANSWER_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    # What an engine keeps resident ends with its process.
                    return False
                raise from_rpc_error(error, service="engine") from None
        return answer.found
