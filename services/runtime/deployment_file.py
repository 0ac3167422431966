"""The TOML form of deployments: `[[deployment]]` tables with the fields of caravan.coordinator.v1.Deployment.

The coordinator reads such a file at its start, and `caravan deploy` sends one to it. Only the form is judged here: names of keys,
types, durations, words. What values mean, and whether they agree, is for the coordinator.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from caravan.coordinator.v1 import deployment_pb2 as pb
from caravan.coordinator.v1 import deployment_service_pb2 as service_pb
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

_INTEGERS_MAX: Final = {
    FieldDescriptor.TYPE_UINT32: 2**32 - 1,
    FieldDescriptor.TYPE_UINT64: 2**64 - 1,
}
_DURATION: Final = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)(ms|s|min|h)", re.ASCII)
_MICROSECONDS: Final = {"ms": 1_000, "s": 1_000_000, "min": 60_000_000, "h": 3_600_000_000}
_OF_FILES: Final = (pb.RUNTIME_UNSPECIFIED, pb.RUNTIME_LLAMA_CPP)
"""Runtimes whose models are files; a server of one's own may call a model by the name of its file."""


@dataclass
class DeploymentFile:
    """What a file says. A field with a mistake is left out of its deployment."""

    deployments: list[pb.Deployment] = field(default_factory=list)
    mistakes: list[service_pb.DeploymentMistake] = field(default_factory=list)

    def mistake(self, path: str, message: str) -> None:
        """Notes what is wrong at a path such as `deployments[1].serving.max_wait`."""
        self.mistakes.append(service_pb.DeploymentMistake(field=path, message=message))


def read_deployments(text: str, folder: Path) -> DeploymentFile:
    """Reads a file's text.

    A relative model that ends in `.gguf` or begins with `./` or `../`, and a relative file of a credential, are taken from `folder`.
    """
    found = DeploymentFile()
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found.mistake("file", f"is not TOML: {error}")
        return found
    for key in document.keys() - {"deployment"}:
        found.mistake(key, "is not known: a file has [[deployment]] tables")
    tables = document.get("deployment", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        found.mistake("deployment", "is not a row of [[deployment]] tables")
        return found
    for index, table in enumerate(tables):
        deployment = pb.Deployment()
        _fill(deployment, table, f"deployments[{index}]", found)
        _place(deployment, folder)
        found.deployments.append(deployment)
    return found


def _place(deployment: pb.Deployment, folder: Path) -> None:
    """Makes paths that are relative to the file absolute."""
    model = deployment.model
    is_path = model.lower().endswith(".gguf") or model.startswith(("./", "../"))
    if is_path and deployment.runtime in _OF_FILES and not model.startswith("scripted:"):
        deployment.model = _from_folder(model, folder)
    if deployment.remote.credential.file:
        file = _from_folder(deployment.remote.credential.file, folder)
        deployment.remote.credential.file = file


def _from_folder(path: str, folder: Path) -> str:
    return str((folder / Path(path).expanduser()).absolute())


def _fill(message: Message, table: Mapping[str, object], path: str, found: DeploymentFile) -> None:
    for key, value in table.items():
        known = message.DESCRIPTOR.fields_by_name.get(key)
        if known is None:
            found.mistake(f"{path}.{key}", "is not known")
        elif (other := _set_already(message, known)) is not None:
            found.mistake(f"{path}.{key}", f"contradicts {other}: only one of them may be given")
        elif known.is_repeated:
            _fill_row(message, known, value, f"{path}.{key}", found)
        elif known.message_type is None or known.message_type is Duration.DESCRIPTOR:
            _fill_value(message, known, value, f"{path}.{key}", found)
        elif isinstance(value, dict):
            part = getattr(message, key)
            part.SetInParent()
            _fill(part, value, f"{path}.{key}", found)
        else:
            found.mistake(f"{path}.{key}", "is not a table")


def _set_already(message: Message, known: Any) -> str | None:
    """The other field of those of which only one may be set."""
    group = known.containing_oneof
    return None if group is None else message.WhichOneof(group.name)


def _fill_row(
    message: Message, known: Any, value: object, path: str, found: DeploymentFile
) -> None:
    row: Any = getattr(message, known.name)
    if not isinstance(value, list):
        found.mistake(path, "is not a list")
        return
    for index, item in enumerate(value):
        place = f"{path}[{index}]"
        if known.message_type is None:
            try:
                row.append(_value(known, item))
            except ValueError as error:
                found.mistake(place, str(error))
        elif isinstance(item, dict):
            _fill(row.add(), item, place, found)
        else:
            found.mistake(place, "is not a table")


def _fill_value(
    message: Message, known: Any, value: object, path: str, found: DeploymentFile
) -> None:
    try:
        if known.message_type is None:
            setattr(message, known.name, _value(known, value))
        else:
            getattr(message, known.name).FromMicroseconds(_microseconds(value))
    except ValueError as error:
        found.mistake(path, str(error))


def _value(known: Any, value: object) -> object:
    """The value of a field that is no message. Raises ValueError."""
    if known.enum_type is not None:
        return _word(known.enum_type, value)
    if known.type == FieldDescriptor.TYPE_BOOL:
        if not isinstance(value, bool):
            raise ValueError("is not true or false")
    elif known.type == FieldDescriptor.TYPE_STRING:
        if not isinstance(value, str):
            raise ValueError("is not a text")
    elif known.type == FieldDescriptor.TYPE_DOUBLE:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError("is not a number")
    elif not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("is not a whole number")
    elif not 0 <= value <= _INTEGERS_MAX[known.type]:
        raise ValueError(f"{value} is below 0" if value < 0 else f"{value} is too large")
    return value


def _word(kind: Any, value: object) -> int:
    """The number of a word: `queue` is CAPACITY_POLICY_QUEUE. Raises ValueError."""
    prefix = kind.values[0].name.removesuffix("UNSPECIFIED")
    words: dict[str, int] = {
        item.name.removeprefix(prefix).lower(): item.number for item in kind.values[1:]
    }
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"is not one of {', '.join(words)}")
    return words[value]


def _microseconds(value: object) -> int:
    parts = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if parts is None:
        raise ValueError('is not a duration such as "30s" or "500ms"')
    return round(float(parts[1]) * _MICROSECONDS[parts[2]])
