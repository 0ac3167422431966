"""Events of one request on their way from the decode thread to the gRPC writer, merged while the writer is busy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.engine.news import News
from services.engine.sampling import TokenLogprobs
from services.engine.tool_calls import ParsedCall
from services.runtime.errors import CaravanError


@dataclass(frozen=True, slots=True)
class Ending:
    """How an answer ended: a FinishReason, the stop text that was met, token counts, and times in seconds.

    `cached_tokens` of the prompt were reused, from where `cache_hit` (a CacheHit) says; `finish_key` is the key of the state
    that is kept, b"" if none is.
    """

    reason: int
    stop_text: str
    prompt_tokens: int
    completion_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    cached_tokens: int = 0
    cache_hit: int = 0
    restore_s: float = 0.0
    finish_key: bytes = b""


@dataclass(slots=True)
class Update:
    """What became known of a request since the update before.

    `started` and `ending` come once; `error` ends the request instead of `ending`. `cached_tokens` and `cache_hit` come with
    `started`. `prompt_tokens_done` is there if nothing else was to be told for a while.
    """

    started: bool = False
    cached_tokens: int = 0
    cache_hit: int = 0
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    calls: list[ParsedCall] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    ending: Ending | None = None
    error: CaravanError | None = None
    prompt_tokens_done: int | None = None

    @property
    def has_delta(self) -> bool:
        """Whether there is something for a delta."""
        return bool(self.token_ids or self.text or self.calls)


class Outbox(News[Update]):
    """Lives on the event loop; one writer takes from it. What waits is bounded by the tokens that the request may have (I4)."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(Update)

    def start(self, cached_tokens: int = 0, cache_hit: int = 0) -> None:
        """The request was admitted; so many tokens of its prompt are reused, from where a CacheHit says."""
        self._pending.started = True
        self._pending.cached_tokens = cached_tokens
        self._pending.cache_hit = cache_hit
        self._wake()

    def add(
        self,
        token_id: int | None,
        text: str,
        calls: Sequence[ParsedCall] = (),
        logprobs: TokenLogprobs | None = None,
    ) -> None:
        """A token, with the text and calls that it completed."""
        pending = self._pending
        if token_id is not None:
            pending.token_ids.append(token_id)
        if text:
            pending.text.append(text)
        if calls:
            pending.calls.extend(calls)
        if logprobs is not None:
            pending.logprobs.append(logprobs)
        self._wake_in_time()

    def end(self, ending: Ending) -> None:
        """The answer is complete."""
        self._pending.ending = ending
        self._wake()

    def fail(self, error: CaravanError) -> None:
        """The request failed."""
        self._pending.error = error
        self._wake()

    def alive(self, prompt_tokens_done: int) -> None:
        """Called once an interval: where nothing was told since the last time, this is, and so much of the prompt is done."""
        if self._was_silent():
            self._pending.prompt_tokens_done = prompt_tokens_done
            self._announce()
