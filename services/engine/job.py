"""One request on the decode thread: its tokens, its text, its times."""

from __future__ import annotations

from collections.abc import Sequence as Blocks
from dataclasses import dataclass

from caravan.core.v1 import generation_pb2

from services.engine.answer import Answer
from services.engine.backend import TokenSampler
from services.engine.inflight import Inflight
from services.engine.key_chain import KeyChain
from services.engine.kv.store import FoundBlock
from services.engine.outbox import Ending
from services.engine.sampling import SamplingSpec
from services.engine.saving import Saving
from services.engine.sequence import Piece, Sequence, TokenArray

COLD = generation_pb2.CACHE_HIT_COLD
PARTIAL = generation_pb2.CACHE_HIT_PARTIAL
EXACT = generation_pb2.CACHE_HIT_EXACT
RESIDENT = generation_pb2.CACHE_HIT_RESIDENT


@dataclass(frozen=True, slots=True)
class CacheUse:
    """What a request wants of the KV cache: the validated core.v1.CacheOptions.

    `sharable` says that state in the cells may be shared; `chain` holds the keys if there is a store, and is None if blocks
    are neither looked for nor saved.
    """

    sharable: bool
    salt: bytes
    session_id: str
    parent_key: bytes
    chain: KeyChain | None


@dataclass(frozen=True, slots=True)
class Work:
    """A request that was validated, rendered and tokenized.

    `tokens` are there before one is chosen: the prompt, `prompt_tokens` long, and what another engine has produced of the
    answer. `token_array` is the same again, for comparing. `max_tokens` of answer is what the context leaves at most, 0 for a
    prompt that is only computed. `answer` knows the part that is there already. `top_logprobs` is None for no log
    probabilities.
    """

    tokens: list[int]
    token_array: TokenArray
    prompt_tokens: int
    max_tokens: int
    sampling: SamplingSpec
    answer: Answer
    top_logprobs: int | None
    cache: CacheUse

    @property
    def resumed(self) -> list[int]:
        """What another engine has produced of the answer."""
        return self.tokens[self.prompt_tokens :]


class Job:
    """A request that the decode thread runs. Only that thread touches it."""

    __slots__ = (
        "answer",
        "cache_hit",
        "cached_tokens",
        "chain",
        "ended",
        "finish_key",
        "first_token_at",
        "inflight",
        "prefill_at",
        "restore_s",
        "sampler",
        "saving",
        "sequence",
        "work",
    )

    def __init__(
        self,
        inflight: Inflight,
        work: Work,
        found: Blocks[FoundBlock] = (),
        restore_s: float = 0.0,
    ) -> None:
        self.inflight = inflight
        self.work = work
        self.answer = work.answer
        self.sequence: Sequence[Job] = Sequence(
            self,
            work.tokens,
            work.prompt_tokens + work.max_tokens - len(work.tokens),
            prompt_array=work.token_array,
            sharable=work.cache.sharable,
            salt=work.cache.salt,
            session_id=work.cache.session_id,
        )
        self.sequence.pieces.extend(
            Piece(block.start, block.end, block.whole_end, block.state, block.key)
            for block in found
        )
        self.chain = work.cache.chain
        self.saving: Saving | None = None
        if self.chain is not None:
            self.saving = Saving(self.chain, self.sequence.tokens, len(work.tokens))
        self.sampler: TokenSampler | None = None
        self.prefill_at: float | None = None
        self.first_token_at: float | None = None
        self.restore_s = restore_s
        self.cached_tokens = 0
        self.cache_hit: generation_pb2.CacheHit.ValueType = COLD
        self.finish_key = b""
        self.ended = False

    def started(self, now: float) -> None:
        """The first batch with tokens of it begins: what was reused is known."""
        self.prefill_at = now
        sequence = self.sequence
        self.cached_tokens = min(sequence.computed, self.work.prompt_tokens)
        if self.saving is not None:
            self.saving.reused = sequence.computed
        if sequence.restored_tokens:
            whole = self.cached_tokens >= self.work.prompt_tokens - 1
            self.cache_hit = EXACT if whole else PARTIAL
        elif sequence.computed:
            self.cache_hit = RESIDENT

    def ending(self, reason: int, now: float) -> Ending:
        """How the answer ended, at `now`."""
        prefill_at = now if self.prefill_at is None else self.prefill_at
        first_token_at = now if self.first_token_at is None else self.first_token_at
        return Ending(
            reason=reason,
            stop_text=self.answer.stop_text,
            prompt_tokens=self.work.prompt_tokens,
            completion_tokens=self.answer.tokens,
            queue_s=prefill_at - self.inflight.arrived,
            prefill_s=first_token_at - prefill_at,
            decode_s=now - first_token_at,
            cached_tokens=self.cached_tokens,
            cache_hit=self.cache_hit,
            restore_s=self.restore_s,
            finish_key=self.finish_key,
        )
