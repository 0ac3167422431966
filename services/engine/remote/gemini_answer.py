"""Answers of the Gemini API: a stream of responses, each with what is new, and whole ones where a server does not stream. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import msgspec
from caravan.core.v1 import generation_pb2

from services.engine.remote.answer_values import CallPieces, Ending, add_told, count, decoded
from services.engine.remote.gemini_errors import blocked_prompt, error_of_event
from services.engine.remote.provider import Provider
from services.engine.remote.wire import Outcome, Piece
from services.runtime.clock import IdSource

_GEMINI: Final = Provider.GEMINI
_FILTERS: Final = (
    "SAFETY",
    "RECITATION",
    "BLOCKLIST",
    "PROHIBITED_CONTENT",
    "SPII",
    "IMAGE_SAFETY",
)
_REASONS: Final[Mapping[str, generation_pb2.FinishReason.ValueType]] = {
    "STOP": generation_pb2.FINISH_REASON_STOP,
    "MAX_TOKENS": generation_pb2.FINISH_REASON_LENGTH,
    **dict.fromkeys(_FILTERS, generation_pb2.FINISH_REASON_CONTENT_FILTER),
}


class _Struct(msgspec.Struct, rename="camel"):
    """The API writes camelCase."""


class _Call(_Struct):
    name: str | None = None
    id: str | None = None
    args: msgspec.Raw = msgspec.Raw()


class _Part(_Struct):
    text: str | None = None
    thought: bool | None = None
    function_call: _Call | None = None


class _Content(_Struct):
    parts: list[_Part] | None = None


class _Token(_Struct):
    token: str = ""
    log_probability: float = 0.0


class _Alternatives(_Struct):
    candidates: list[_Token] | None = None


class _Logprobs(_Struct):
    chosen_candidates: list[_Token] | None = None
    top_candidates: list[_Alternatives] | None = None


class _Candidate(_Struct):
    index: int | None = None
    content: _Content | None = None
    finish_reason: str | None = None
    logprobs_result: _Logprobs | None = None


class _Usage(_Struct):
    """All counts are sums up to the response; the prompt's holds what came from the cache."""

    prompt_token_count: int | None = None
    tool_use_prompt_token_count: int | None = None
    candidates_token_count: int | None = None
    thoughts_token_count: int | None = None
    cached_content_token_count: int | None = None


class _Feedback(_Struct):
    block_reason: str | None = None


class _Response(_Struct):
    candidates: list[_Candidate] | None = None
    usage_metadata: _Usage | None = None
    prompt_feedback: _Feedback | None = None
    error: Any = None


_RESPONSES: Final = msgspec.json.Decoder(_Response | list[_Response])


class GeminiReader:
    """Reads one answer. Usage comes as a sum with each response (W13)."""

    def __init__(self, redact: Callable[[str], str], ids: IdSource) -> None:
        self._redact = redact
        self._calls = CallPieces(_GEMINI, ids)
        self._ending = Ending(_GEMINI)
        self._usage: _Usage | None = None

    @property
    def is_complete(self) -> bool:
        """See AnswerReader. The API has no word for its end: the finish reason and the usage come last."""
        return self._ending.reason is not None and self._usage is not None

    def read(self, event: str, data: str) -> Piece | None:
        """See AnswerReader. The API does not name its events."""
        if not data:
            return None
        given = decoded(_RESPONSES, data, _GEMINI)
        responses = given if isinstance(given, list) else [given]
        piece = Piece()
        for response in responses:
            self._add(response, piece)
        something = piece.text or piece.calls or piece.logprobs
        return piece if something else None

    def usage_so_far(self) -> generation_pb2.Usage | None:
        """See AnswerReader. Thoughts are generated, and charged, like the answer."""
        usage = self._usage
        if usage is None:
            return None
        return generation_pb2.Usage(
            prompt_tokens=count(usage.prompt_token_count, usage.tool_use_prompt_token_count),
            completion_tokens=count(usage.candidates_token_count, usage.thoughts_token_count),
            cached_tokens=count(usage.cached_content_token_count),
        )

    def outcome(self) -> Outcome:
        """See AnswerReader."""
        return self._ending.outcome(self.usage_so_far(), called=len(self._calls) > 0)

    def _add(self, response: _Response, piece: Piece) -> None:
        if response.error:
            raise error_of_event(response.error, self._redact)
        feedback = response.prompt_feedback
        if feedback is not None and feedback.block_reason:
            raise blocked_prompt(feedback.block_reason, self._redact)
        if response.usage_metadata is not None:
            if self._usage is None:
                self._usage = _Usage()
            add_told(self._usage, response.usage_metadata)
        for candidate in response.candidates or ():
            if not candidate.index:  # There is one; others were not asked for.
                self._add_candidate(candidate, piece)

    def _add_candidate(self, candidate: _Candidate, piece: Piece) -> None:
        for part in (candidate.content.parts if candidate.content else None) or ():
            if part.text and not part.thought:
                piece.text += part.text
            call = part.function_call
            if call is not None:
                # A call comes whole; only its place tells it from others.
                arguments = bytes(call.args).decode() or "{}"
                piece.calls.append(
                    self._calls.piece(len(self._calls), call.id, call.name, arguments)
                )
        if candidate.logprobs_result is not None:
            piece.logprobs.extend(_token_logprobs(candidate.logprobs_result))
        if candidate.finish_reason:
            self._ending.finish(
                _REASONS.get(candidate.finish_reason, generation_pb2.FINISH_REASON_STOP)
            )


def _token_logprobs(given: _Logprobs) -> Iterator[generation_pb2.TokenLogprob]:
    tops = given.top_candidates or []
    for place, chosen in enumerate(given.chosen_candidates or ()):
        top = tops[place].candidates if place < len(tops) else None
        yield generation_pb2.TokenLogprob(
            token=chosen.token.encode(),
            logprob=chosen.log_probability,
            top=[
                generation_pb2.TopLogprob(token=other.token.encode(), logprob=other.log_probability)
                for other in top or ()
            ],
        )
