"""The phases of training: how many steps, of what."""

from dataclasses import dataclass

from models.corpus.dialogues import Mixture

_EVEN = {
    "greeting": 4, "identity": 4, "facts": 11, "echo": 6, "echo of invented words": 2,
    "do not know": 10, "stories": 5, "recall in one message": 3, "JSON": 9, "counting": 8,
    "addition": 14, "subtraction": 11, "numbers too big": 3,
}  # fmt: skip
_COPYING = {
    "echo": 8, "echo of invented words": 4, "JSON": 8, "recall in one message": 4, "greeting": 1,
    "facts": 2,
}  # fmt: skip

_FINISHING = {
    **_EVEN, "usual phrases": 5, "stories": 4, "do not know": 6, "echo": 8, "counting": 12,
    "addition": 22, "subtraction": 16, "numbers too big": 4,
}  # fmt: skip

NORMAL = Mixture(_EVEN, recall=0.16, tools=0.2, system=0.35, long=0.07)
COPYING = Mixture(_COPYING, recall=0.3, tools=0.0, system=0.15, long=0.0)
FINISHING = Mixture(_FINISHING, recall=0.13, tools=0.22, system=0.3, long=0.07)


@dataclass(frozen=True)
class Drills:
    """Shares of micro-batches that are no dialogues: runs that are said again and again.

    They teach copying as such: of random tokens, of table words in all their forms, of
    numbers, and of table words in one form, where only their order is to be learned.
    """

    tokens: float = 0.0
    words: float = 0.0
    numbers: float = 0.0
    ordered: float = 0.0


@dataclass(frozen=True)
class Phase:
    """`steps` optimizer steps on a mixture, with some drills.

    `rate` is the learning-rate factor at start and end of a cosine over `horizon` steps (all
    `steps` where 0): with a horizon beyond its steps a phase ends on the way down.
    """

    name: str
    steps: int
    mixture: Mixture
    drills: Drills
    rate: tuple[float, float]
    seed: int
    horizon: int = 0


PHASES = (
    Phase("copying tokens", 400, COPYING, Drills(tokens=0.5), (1.0, 1.0), 1),
    Phase("copying words", 300, COPYING, Drills(tokens=0.05, words=0.35), (1.0, 1.0), 2),
    Phase("everything", 800, NORMAL, Drills(words=0.06), (1.0, 1.0), 3),
    Phase("all, sums first", 600, FINISHING, Drills(words=0.02, numbers=0.03), (1.0, 0.02), 4, 900),
    Phase("order", 300, FINISHING, Drills(numbers=0.12, ordered=0.2), (0.5, 0.02), 5),
)
