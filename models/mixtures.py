"""The phases of training: how many steps, of what."""

from dataclasses import dataclass

from models.corpus.dialogues import Mixture

_EVEN = {
    "greeting": 4, "identity": 4, "facts": 11, "echo": 8, "echo of invented words": 3,
    "do not know": 9, "stories": 4, "recall in one message": 3, "JSON": 8, "counting": 8,
    "addition": 13, "subtraction": 11, "numbers too big": 3, "usual phrases": 2,
}  # fmt: skip
_COPYING = {
    "echo": 8, "echo of invented words": 4, "JSON": 8, "recall in one message": 4, "greeting": 1,
    "facts": 2,
}  # fmt: skip
_SUMS = {**_EVEN, "addition": 32, "subtraction": 30, "greeting": 10}
_MORE_SUMS = {**_SUMS, "addition": 46, "subtraction": 50, "echo of invented words": 6}
_SUMS_AND_ECHO = {**_MORE_SUMS, "echo": 30, "echo of invented words": 12, "subtraction": 30}

COPYING = Mixture(_COPYING, recall=0.3, tools=0.0, system=0.15, long=0.0)
NORMAL = Mixture(_EVEN, recall=0.18, tools=0.26, system=0.35, long=0.06)
SUMS = Mixture(_SUMS, recall=0.14, tools=0.3, system=0.35, long=0.04)
MORE_SUMS = Mixture(_MORE_SUMS, recall=0.1, tools=0.32, system=0.35, long=0.04)
SUMS_AND_ECHO = Mixture(_SUMS_AND_ECHO, recall=0.12, tools=0.24, system=0.35, long=0.04)


@dataclass(frozen=True)
class Drills:
    """Shares of micro-batches that are no dialogues: runs that are said again.

    They teach copying as such: of random tokens, and of lists of words or numbers, whose items
    change their form from line to line.
    """

    tokens: float = 0.0
    lists: float = 0.0


@dataclass(frozen=True)
class Phase:
    """`steps` optimizer steps on a mixture, with some drills.

    `rate` is the learning-rate factor at start and end of a cosine over all steps. A step has
    `micro_batches`, over all processes.
    """

    name: str
    steps: int
    mixture: Mixture
    drills: Drills
    rate: tuple[float, float]
    seed: int
    micro_batches: int = 4


PHASES = (
    Phase("copying tokens", 150, COPYING, Drills(tokens=0.8), (1.0, 1.0), 1),
    Phase("copying words", 100, COPYING, Drills(tokens=0.1, lists=0.3), (1.0, 1.0), 2),
    Phase("everything", 1250, NORMAL, Drills(tokens=0.02, lists=0.08), (1.0, 1.0), 3, 2),
    Phase("slower and slower", 1000, NORMAL, Drills(tokens=0.02, lists=0.04), (1.0, 0.02), 4, 2),
    Phase("sums", 800, SUMS, Drills(tokens=0.02, lists=0.04), (0.6, 0.02), 5, 2),
    Phase("more sums", 900, MORE_SUMS, Drills(tokens=0.02, lists=0.04), (0.8, 0.02), 6, 2),
    Phase("sums and echo", 600, SUMS_AND_ECHO, Drills(tokens=0.03, lists=0.08), (0.6, 0.0), 7, 2),
)
