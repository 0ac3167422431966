"""What the coordinator keeps of its deployments across starts: a file that is replaced as a whole, and one that it only reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from caravan.coordinator.v1 import deployment_pb2 as pb
from caravan.coordinator.v1 import deployment_service_pb2 as service_pb
from google.protobuf import json_format

from services.coordinator.deployment import Deployment
from services.coordinator.deployment_messages import from_messages, to_message
from services.coordinator.deployment_rules import find_mistakes
from services.coordinator.messages import to_timestamp
from services.coordinator.whole_file import replace_file
from services.runtime.deployment_file import read_deployments
from services.runtime.settings import SettingsError


def load_kept(state: str, file: str, wall: float) -> list[tuple[Deployment, float]]:
    """The deployments to start with, each with when it was first applied, in seconds since the epoch.

    They come from `state`, where the file exists, else from `file`; an empty path is none. Raises SettingsError, which lists all
    mistakes.
    """
    if state and Path(state).exists():
        return _from_state(Path(state))
    if not file:
        return []
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"CARAVAN_COORDINATOR_DEPLOYMENTS={file!r}: {error}") from error
    found = read_deployments(text, path.parent)
    mistakes = {mistake.field: mistake.message for mistake in found.mistakes}
    deployments = _checked(found.deployments, mistakes, file)
    return [(deployment, wall) for deployment in deployments]


def _from_state(path: Path) -> list[tuple[Deployment, float]]:
    kept = service_pb.ListDeploymentsResponse()
    try:
        json_format.Parse(path.read_text(encoding="utf-8"), kept)
    except (OSError, UnicodeDecodeError, json_format.ParseError) as error:
        raise SettingsError(
            f"CARAVAN_COORDINATOR_DEPLOYMENTS_STATE={str(path)!r}: {error}"
        ) from error
    deployments = _checked([record.deployment for record in kept.deployments], {}, str(path))
    created = (record.created.ToMicroseconds() / 1e6 for record in kept.deployments)
    return list(zip(deployments, created, strict=True))


def _checked(
    told: Sequence[pb.Deployment], mistakes: dict[str, str], path: str
) -> list[Deployment]:
    deployments, unknown = from_messages(told)
    for mistake in (*unknown, *find_mistakes(deployments, {})):
        # What was left out of a deployment for a mistake of form is not missing.
        mistakes.setdefault(mistake.field, mistake.message)
    if mistakes:
        lines = "".join(f"\n  {field}: {message}" for field, message in sorted(mistakes.items()))
        raise SettingsError(f"the deployments of {path} have mistakes:{lines}")
    return deployments


def save(path: Path, kept: Iterable[tuple[Deployment, float]]) -> None:
    """Replaces the file of a former `save`; a crash leaves the one or the other. Raises OSError."""
    document = service_pb.ListDeploymentsResponse(
        deployments=[
            pb.DeploymentRecord(deployment=to_message(deployment), created=to_timestamp(created))
            for deployment, created in kept
        ]
    )
    text = json_format.MessageToJson(document, preserving_proto_field_name=True)
    replace_file(path, (text, "\n"))
