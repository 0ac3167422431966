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

_UINT32_MAX: Final = 2**32 - 1
_DURATION: Final = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)(ms|s|min|h)", re.ASCII)
_MICROSECONDS: Final = {"ms": 1_000, "s": 1_000_000, "min": 60_000_000, "h": 3_600_000_000}
_NOT_YET: Final = {"budget": "budgets are not there yet"}


@dataclass
class DeploymentFile:
    """What a file says. A field with a mistake is left out of its deployment."""

    deployments: list[pb.Deployment] = field(default_factory=list)
    mistakes: list[service_pb.DeploymentMistake] = field(default_factory=list)

    def mistake(self, path: str, message: str) -> None:
        """Notes what is wrong at a path such as `deployments[1].serving.max_wait`."""
        self.mistakes.append(service_pb.DeploymentMistake(field=path, message=message))


def read_deployments(text: str, folder: Path) -> DeploymentFile:
    """Reads a file's text. A relative model that ends in `.gguf` or begins with `./` or `../` is taken from `folder`."""
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
        deployment.model = _from_folder(deployment.model, folder)
        found.deployments.append(deployment)
    return found


def _from_folder(model: str, folder: Path) -> str:
    is_path = model.lower().endswith(".gguf") or model.startswith(("./", "../"))
    if not is_path or model.startswith("scripted:"):
        return model
    return str((folder / Path(model).expanduser()).absolute())


def _fill(message: Message, table: Mapping[str, object], path: str, found: DeploymentFile) -> None:
    for key, value in table.items():
        known = message.DESCRIPTOR.fields_by_name.get(key)
        if known is None:
            found.mistake(f"{path}.{key}", _NOT_YET.get(key, "is not known"))
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
    elif not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("is not a whole number")
    elif not 0 <= value <= _UINT32_MAX:
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
