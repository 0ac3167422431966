"""One request on the decode thread: its tokens, its text, its times."""

from __future__ import annotations

from dataclasses import dataclass

from services.engine.answer import Answer
from services.engine.backend import TokenSampler
from services.engine.inflight import Inflight
from services.engine.outbox import Ending
from services.engine.sampling import SamplingSpec
from services.engine.scheduler import Sequence


@dataclass(frozen=True, slots=True)
class Work:
    """A request that was validated, rendered and tokenized.

    `max_tokens` is what the context leaves at most; `top_logprobs` is None for no log probabilities.
    """

    prompt: list[int]
    max_tokens: int
    sampling: SamplingSpec
    stops: tuple[str, ...]
    ignore_eos: bool
    top_logprobs: int | None
    parse_tools: bool


class Job:
    """A request that the decode thread runs. Only that thread touches it."""

    __slots__ = (
        "answer",
        "ended",
        "first_token_at",
        "inflight",
        "prefill_at",
        "push_plain",
        "sampler",
        "sequence",
        "work",
    )

    def __init__(self, inflight: Inflight, work: Work, answer: Answer) -> None:
        self.inflight = inflight
        self.work = work
        self.answer = answer
        self.push_plain = answer.push_plain if answer.plain else None
        self.sequence: Sequence[Job] = Sequence(self, work.prompt, work.max_tokens)
        self.sampler: TokenSampler | None = None
        self.prefill_at: float | None = None
        self.first_token_at: float | None = None
        self.ended = False

    def ending(self, reason: int, now: float) -> Ending:
        """How the answer ended, at `now`."""
        prefill_at = now if self.prefill_at is None else self.prefill_at
        first_token_at = now if self.first_token_at is None else self.first_token_at
        return Ending(
            reason=reason,
            stop_text=self.answer.stop_text,
            prompt_tokens=len(self.work.prompt),
            completion_tokens=self.inflight.completion_tokens,
            queue_s=prefill_at - self.inflight.arrived,
            prefill_s=first_token_at - prefill_at,
            decode_s=now - first_token_at,
        )
