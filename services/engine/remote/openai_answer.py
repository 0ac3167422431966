"""Answers of the OpenAI API: chunks of chats and texts, and whole answers where a server does not stream. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import msgspec
from caravan.core.v1 import chat_pb2, generation_pb2

from services.engine.remote.answer_values import CallPieces, Ending, count, decoded, no_answer
from services.engine.remote.openai_errors import error_of_event
from services.engine.remote.openai_logprobs import Logprobs, token_logprobs
from services.engine.remote.provider import Provider
from services.engine.remote.wire import Outcome, Piece
from services.runtime.clock import IdSource

_DONE: Final = "[DONE]"
_REASONS: Final[Mapping[str, generation_pb2.FinishReason.ValueType]] = {
    "stop": generation_pb2.FINISH_REASON_STOP,
    "end_turn": generation_pb2.FINISH_REASON_STOP,
    "length": generation_pb2.FINISH_REASON_LENGTH,
    "tool_calls": generation_pb2.FINISH_REASON_TOOL_CALLS,
    "function_call": generation_pb2.FINISH_REASON_TOOL_CALLS,
    "content_filter": generation_pb2.FINISH_REASON_CONTENT_FILTER,
}


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Part(msgspec.Struct):
    type: str = ""
    text: str | None = None


class _Words(msgspec.Struct):
    """The delta of a chunk, or the message of a whole answer. Thoughts (`reasoning_content`) are no part of the answer."""

    content: str | list[_Part] | None = None
    """Parts where a model of Mistral thinks; what is no text is a thought."""
    refusal: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    index: int | None = None
    delta: _Words | None = None
    message: _Words | None = None
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: Any = None
    """vLLM's: the stop text that was met, or the id of a token."""
    logprobs: Any = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_CHUNKS: Final = msgspec.json.Decoder(_Chunk)


class OpenAiReader:
    """Reads one answer. Usage comes as a sum: the last one counts."""

    def __init__(self, provider: Provider, redact: Callable[[str], str], ids: IdSource) -> None:
        self._provider = provider
        self._redact = redact
        self._calls = CallPieces(provider, ids)
        self._last_call: int | str = 0
        self._ending = Ending(provider)
        self._usage: _Usage | None = None

    @property
    def is_complete(self) -> bool:
        """See AnswerReader."""
        return self._ending.done

    def read(self, event: str, data: str) -> Piece | None:
        """See AnswerReader. The API does not name its events."""
        if data == _DONE:
            self._ending.done = True
            return None
        if not data:
            return None  # A comment or an id alone.
        chunk = decoded(_CHUNKS, data, self._provider)
        if chunk.error:
            raise error_of_event(self._provider, chunk.error, self._redact)
        if chunk.usage is not None:
            self._usage = chunk.usage
        for choice in chunk.choices or ():
            if not choice.index:  # There is one; others were not asked for.
                return self._piece(choice)
        return None

    def usage_so_far(self) -> generation_pb2.Usage | None:
        """See AnswerReader."""
        usage = self._usage
        if usage is None:
            return None
        details = usage.prompt_tokens_details
        return generation_pb2.Usage(
            prompt_tokens=count(usage.prompt_tokens),
            completion_tokens=count(usage.completion_tokens),
            cached_tokens=count(details.cached_tokens if details else 0),
        )

    def outcome(self) -> Outcome:
        """See AnswerReader."""
        return self._ending.outcome(self.usage_so_far(), called=len(self._calls) > 0)

    def _piece(self, choice: _Choice) -> Piece | None:
        if choice.finish_reason:
            met = choice.stop_reason
            self._ending.finish(
                _REASONS.get(choice.finish_reason, generation_pb2.FINISH_REASON_STOP),
                met if isinstance(met, str) else None,
            )
        words = choice.delta or choice.message
        if choice.message is not None:
            self._ending.done = True  # A whole answer: nothing follows it.
        piece = Piece(text=choice.text or "")
        if words is not None:
            piece.text += _text(words.content)
            piece.refusal = words.refusal or ""
            if words.tool_calls:
                piece.calls = list(self._call_pieces(words.tool_calls))
        if choice.logprobs:
            piece.logprobs = self._logprobs(choice.logprobs)
        something = piece.text or piece.refusal or piece.calls or piece.logprobs
        return piece if something else None

    def _logprobs(self, given: Any) -> list[generation_pb2.TokenLogprob]:
        """Not decoded with the rest: some servers put something else there when nobody has asked."""
        try:
            return token_logprobs(msgspec.convert(given, Logprobs))
        except msgspec.ValidationError:
            raise no_answer(self._provider) from None

    def _call_pieces(self, calls: list[_Call]) -> Iterator[chat_pb2.ToolCallDelta]:
        for place, call in enumerate(calls):
            function = call.function or _Function()
            key = self._key(call, place)
            yield self._calls.piece(key, call.id, function.name, function.arguments)

    def _key(self, call: _Call, place: int) -> int | str:
        """What tells a call from others: its index; for servers that give none, its id, and then that it goes on."""
        if call.index is not None:
            return call.index
        if call.id:
            self._last_call = call.id
            return call.id
        return self._last_call or place


def _text(content: str | list[_Part] | None) -> str:
    if isinstance(content, list):
        return "".join(part.text or "" for part in content if part.type == "text")
    return content or ""
