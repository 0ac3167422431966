"""What `caravan deploy` prints. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from caravan.coordinator.v1 import deployment_pb2 as pb
from caravan.coordinator.v1 import deployment_service_pb2 as service_pb

from services.cli.tables import age, aligned, enum_word, printable


def changes_text(changes: Sequence[service_pb.DeploymentChange]) -> Iterator[str]:
    """A line per change, under a head."""
    table = [("DEPLOYMENT", "CHANGE", "ENGINES", "FIELDS")]
    table += [
        (
            change.name,
            enum_word(service_pb.ChangeKind, "CHANGE_KIND_", change.kind),
            "started anew" if change.restarts_engines else "-",
            ", ".join(change.fields) or "-",
        )
        for change in changes
    ]
    return aligned(table)


def deployments_text(records: Collection[pb.DeploymentRecord], now_s: float) -> Iterator[str]:
    """A line per deployment, under a head; `now_s` is in seconds since the epoch."""
    table = [
        ("DEPLOYMENT", "STATE", "ENGINES", "FORMER", "REVISION", "AGE", "RUNTIME", "MODEL", "NOTE")
    ]
    table += [
        (
            record.deployment.name,
            enum_word(pb.DeploymentState, "DEPLOYMENT_STATE_", record.state),
            f"{record.ready_engines}/{record.deployment.replicas}",
            str(record.former_engines),
            record.revision,
            age(now_s - record.created.ToMicroseconds() / 1e6),
            enum_word(pb.Runtime, "RUNTIME_", record.deployment.runtime),
            printable(record.deployment.model),
            printable(record.note) or "-",
        )
        for record in records
    ]
    return aligned(table)


def mistakes_text(mistakes: Collection[service_pb.DeploymentMistake]) -> Iterator[str]:
    """A line per mistake."""
    return (printable(f"  {mistake.field}: {mistake.message}") for mistake in mistakes)


def unfinished(records: Collection[pb.DeploymentRecord], names: Collection[str]) -> Iterator[str]:
    """What is still to come about for the deployments of these names, one text for each that waits."""
    for record in records:
        ready = record.ready_engines >= record.deployment.replicas
        if record.deployment.name in names and not ready:
            yield printable(f"{record.deployment.name}: {record.note or 'no engine is ready'}")


def failed(records: Collection[pb.DeploymentRecord], names: Collection[str]) -> Iterator[str]:
    """Why deployments of these names cannot come about, one text for each: also one that is not kept, or not any more."""
    there = [record for record in records if record.state != pb.DEPLOYMENT_STATE_DRAINING]
    for name in sorted(set(names).difference(record.deployment.name for record in there)):
        yield printable(f"{name}: it is not deployed any more")
    for record in there:
        if record.deployment.name in names and record.state == pb.DEPLOYMENT_STATE_FAILED:
            yield printable(f"{record.deployment.name}: {record.note}")
