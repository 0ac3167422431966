"""The phases of training: how many steps, of what."""

from dataclasses import dataclass

from models.corpus.dialogues import Mixture

_EVEN = {
    "greeting": 4, "identity": 4, "facts": 14, "echo": 6, "echo of invented words": 2,
    "do not know": 10, "stories": 5, "recall in one message": 3, "JSON": 9, "counting": 8,
    "addition": 12, "subtraction": 9, "sums too big": 2,
}  # fmt: skip
_COPYING = {
    "echo": 8, "echo of invented words": 4, "JSON": 8, "recall in one message": 4, "greeting": 1,
    "facts": 2,
}  # fmt: skip

NORMAL = Mixture(_EVEN, recall=0.16, tools=0.2, system=0.35, long=0.07)
COPYING = Mixture(_COPYING, recall=0.3, tools=0.0, system=0.15, long=0.0)


@dataclass(frozen=True)
class Phase:
    """`steps` optimizer steps on a mixture.

    `runs` is the share of micro-batches that are runs of random tokens, repeated: they teach
    copying as such. `rate` is the learning-rate factor at start and end, cosine in between.
    """

    name: str
    steps: int
    mixture: Mixture
    runs: float
    rate: tuple[float, float]
    seed: int


PHASES = (
    Phase("copying", 260, COPYING, 0.4, (1.0, 1.0), 1),
    Phase("everything", 2400, NORMAL, 0.03, (1.0, 0.02), 2),
)
