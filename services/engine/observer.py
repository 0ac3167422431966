"""Who looks on while the decode thread works."""

from __future__ import annotations

from typing import Protocol

from services.engine.job import Job
from services.engine.kv.store import SaveReason


class StepObserver(Protocol):
    """Told of every step, on the decode thread; must be quick."""

    def stepped(self, seconds: float, prefill_tokens: int, generated_tokens: int) -> None:
        """A batch was decoded."""
        ...

    def admitted(self, job: Job, queue_s: float) -> None:
        """A request left the queue; what it reuses is known."""
        ...

    def resumed(self) -> None:
        """A request goes on with the answer of another engine."""
        ...

    def moved(self, requests: int) -> None:
        """Requests ended so that others go on with them."""
        ...

    def restored(self, seconds: float) -> None:
        """A piece of saved state was joined."""
        ...

    def refused(self) -> None:
        """llama.cpp did not take a piece of saved state."""
        ...

    def packed(self, seconds: float, reason: SaveReason) -> None:
        """A block was packed to be saved."""
        ...
