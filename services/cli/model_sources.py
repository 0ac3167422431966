"""What `--model NAME=PATH` means, and the mistakes that show before an engine is started."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SCRIPTED: Final = "scripted:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
_GGUF_MAGIC: Final = b"GGUF"
_GGUF_HEADER_BYTES: Final = 24


class ModelSourceError(ValueError):
    """A model cannot be served; the message says why."""


@dataclass(frozen=True)
class ModelSource:
    """A name, and where the model comes from: a GGUF file, or `scripted:?...`, which needs none."""

    name: str
    source: str

    @property
    def scripted(self) -> bool:
        """Whether the answers are scripted: no llama.cpp, hardly any processor time."""
        return self.source.startswith(SCRIPTED)


def parse(text: str) -> ModelSource:
    """`NAME=PATH`. Raises ModelSourceError."""
    name, separator, source = text.partition("=")
    if not separator or not source:
        raise ModelSourceError(f"{text!r} is not NAME=PATH")
    if not _NAME.fullmatch(name):
        raise ModelSourceError(
            f"{name!r} is not a model name: letters, digits and ._:/- after a first letter or digit, at most 128"
        )
    if source.startswith(SCRIPTED):
        return ModelSource(name, source)
    return ModelSource(name, str(Path(source).expanduser().absolute()))


def check(model: ModelSource) -> None:
    """Looks at the file. Raises ModelSourceError if it is missing or no GGUF file."""
    if model.scripted:
        return
    path = Path(model.source)
    try:
        with path.open("rb") as file:
            header = file.read(_GGUF_HEADER_BYTES)
    except OSError as error:
        raise ModelSourceError(
            f"model {model.name}: cannot read {path}: {error.strerror}"
        ) from error
    if header[:4] != _GGUF_MAGIC:
        raise ModelSourceError(f"model {model.name}: {path} is not a GGUF file")
    if len(header) < _GGUF_HEADER_BYTES:
        raise ModelSourceError(f"model {model.name}: {path} is cut off within its header")


def check_names(models: tuple[ModelSource, ...]) -> None:
    """Raises ModelSourceError if a name is given twice."""
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise ModelSourceError(
                f"model {name} is given twice; --engines N starts several engines of a model"
            )
