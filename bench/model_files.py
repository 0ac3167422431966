"""The models that the benches make: their shapes, and where they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.report import progress

MODELS = Path(__file__).parent / "models"


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that decide how long a step takes. Widths are in elements."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    context: int

    @property
    def kv_width(self) -> int:
        """Width of one layer's keys (and of its values)."""
        return self.width // self.heads * self.kv_heads


SHAPES = {
    "qwen-0.5b": Shape(24, 896, 14, 2, 4864, 151_936, 32_768),
    "tiny": Shape(2, 64, 2, 1, 128, 2_048, 2_048),
}


def ensure(name: str) -> Path:
    """Returns the path of the model `name` of SHAPES, made now if it is not there yet."""
    target = MODELS / f"{name}.gguf"
    if not target.exists():
        # Imported late: the package that writes GGUF files is installed by `make bench` only.
        from bench import make_model

        progress(f"making {target}")
        make_model.make(name, target)
    return target
