"""What an engine in front of a provider says of itself, as messages of its contract."""

from __future__ import annotations

from caravan.engine.v1 import engine_service_pb2 as pb
from caravan.engine.v1 import remote_service_pb2

from services.engine.remote.dispatcher import Dispatcher
from services.engine.remote.endpoint import Endpoint
from services.engine.remote.options import EngineOptions


def model_info(name: str, endpoint: Endpoint, options: EngineOptions) -> pb.ModelInfo:
    """What it runs, under the name by which it is served. How long prompts may be only the provider knows."""
    return pb.ModelInfo(
        name=name,
        description=f"{endpoint.model} at {endpoint.provider}",
        max_sequences=options.workers,
        cache_support=pb.CACHE_SUPPORT_OFF,
        cache_note="a provider runs the model, and caches by rules of its own",
        provider=endpoint.provider,
    )


def remote_status(
    endpoint: Endpoint, options: EngineOptions, dispatcher: Dispatcher
) -> remote_service_pb2.GetRemoteStatusResponse:
    """How it stands with the provider."""
    pool, tariff = dispatcher.pool, endpoint.accounts.tariff
    price = tariff.price
    return remote_service_pb2.GetRemoteStatusResponse(
        provider=endpoint.provider,
        model=endpoint.model,
        base_url=options.base_url,
        breaker=endpoint.breaker.status(endpoint.clock.monotonic()),
        limits=endpoint.gate.status(),
        busy_workers=pool.busy,
        workers=pool.count,
        replaced_workers=pool.replaced,
        queued=dispatcher.waiting,
        queue_capacity=options.queue_capacity if options.patience else 0,
        credential=endpoint.credentials.status(),
        price=None if price is None else price.to_message(),
        price_date="" if price is None else tariff.date,
    )
