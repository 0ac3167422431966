"""The page of `caravan status`: what was seen -> lines. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from caravan.cache.v1 import cache_service_pb2 as cache_pb
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import deployment_pb2
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from services.cli.oncall_tables import engine_lines, model_lines, request_lines
from services.cli.remote_tables import Seen, breaker_notes
from services.cli.reused_tokens import ReusedTokens
from services.cli.tables import count, cut, printable, share, size

_REQUESTS_MIN: Final = 3
"""Requests that are shown however low the terminal is."""


@dataclass(frozen=True)
class Snapshot:
    """What one look found.

    `problem` says, for people, why nothing was found. `cache` is None where no cache service answers, `reused` where no
    gateway does. `remotes` are the engines in front of providers.
    """

    address: str = ""
    models: Sequence[pb.Model] = ()
    engines: Sequence[pb.Engine] = ()
    requests: Sequence[pb.InflightRequest] = ()
    deployments: Sequence[deployment_pb2.DeploymentRecord] = ()
    cache: cache_pb.GetStatsResponse | None = None
    reused: ReusedTokens | None = None
    remotes: Sequence[Seen] = ()
    costs: Sequence[pb.DeploymentCosts] = ()
    problem: str = ""


def page(snapshot: Snapshot, columns: int | None = None, rows: int | None = None) -> list[str]:
    """The page, cut to the columns and, where requests are many, to the rows of a terminal; None: as long as it is."""
    if snapshot.problem:
        return [cut(f"caravan: {printable(snapshot.problem)}", columns)]
    lines = [_summary(snapshot), _cache_line(snapshot), ""]
    if snapshot.models or snapshot.deployments:
        lines += [*model_lines(snapshot.models, snapshot.deployments), ""]
    else:
        lines += ["no models", ""]
    if snapshot.engines:
        lines += [*engine_lines(snapshot.engines), *_provider_notes(snapshot), ""]
    lines += _requests(snapshot.requests, None if rows is None else rows - len(lines))
    return [cut(line, columns) for line in lines]


def _provider_notes(snapshot: Snapshot) -> Iterator[str]:
    """Why providers are not asked: clients may not notice, where a fallback serves them."""
    yield from breaker_notes(snapshot.remotes)
    for told in snapshot.costs:
        if told.exceeded:
            yield f"! {printable(told.deployment)}: its budget is spent"


def _summary(snapshot: Snapshot) -> str:
    queued = sum(request.phase == pb.INFLIGHT_PHASE_QUEUED for request in snapshot.requests)
    speed = sum(engine.load.tokens_per_second for engine in snapshot.engines)
    parts = (
        f"caravan {snapshot.address}",
        count(len(snapshot.engines), "engine"),
        f"{len(snapshot.requests) - queued} running",
        f"{queued} queued",
        f"{speed:.0f} tokens/s",
    )
    return "   ".join(parts)


def _cache_line(snapshot: Snapshot) -> str:
    parts = []
    if snapshot.reused is not None and snapshot.reused.prompt:
        reused = share(snapshot.reused.reused, snapshot.reused.prompt)
        parts.append(f"{reused} of {count(snapshot.reused.prompt, 'prompt token')} reused")
    if snapshot.cache is None:
        parts.append("no cache service")
    else:
        parts += _places(snapshot.cache.places)
    return f"cache: {'; '.join(parts)}"


def _places(places: Sequence[cache_pb.PlaceStats]) -> Iterator[str]:
    for tier, name in (
        (cache_pb.TIER_RAM, "ram"),
        (cache_pb.TIER_RAM_FILE, "ram_file"),
        (cache_pb.TIER_DISK, "disk"),
    ):
        found = [place for place in places if place.tier == tier]
        if found:
            held, quota = (
                sum(place.bytes for place in found),
                sum(place.quota_bytes for place in found),
            )
            yield f"{name} {size(held)} of {size(quota)}"


def _requests(requests: Sequence[pb.InflightRequest], rows: int | None) -> list[str]:
    """The oldest of them, as many as fit, and how many more there are."""
    if not requests:
        return ["no requests"]
    # The head and the line that counts the rest take two rows.
    shown = len(requests) if rows is None else max(_REQUESTS_MIN, rows - 2)
    lines = list(request_lines(requests[:shown]))
    if shown < len(requests):
        lines.append(f"and {len(requests) - shown} more")
    return lines


def as_json(snapshot: Snapshot) -> dict[str, Any]:
    """The snapshot for programs: the messages of the contract in their JSON form."""
    return {
        "address": snapshot.address,
        "models": messages(snapshot.models),
        "engines": messages(snapshot.engines),
        "requests": messages(snapshot.requests),
        "deployments": messages(snapshot.deployments),
        "cache": None if snapshot.cache is None else message(snapshot.cache),
        "reused": None if snapshot.reused is None else asdict(snapshot.reused),
        "remotes": [
            {"engine_id": one.engine.engine_id, **message(one.status)}
            for one in snapshot.remotes
            if one.status is not None
        ],
        "costs": messages(snapshot.costs),
    }


def messages(values: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as JSON objects, fields at their defaults included."""
    return [message(value) for value in values]


def message(value: Message) -> dict[str, Any]:
    """A message as a JSON object, fields at their defaults included."""
    return MessageToDict(
        value, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
