"""What the readers of answers share: decoding that fails as a ProviderError only, the ending, tool calls, counts. Pure."""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec
from caravan.core.v1 import chat_pb2, generation_pb2

from services.engine.remote.failure import Failure, ProviderError
from services.engine.remote.provider import Provider
from services.engine.remote.wire import Outcome
from services.runtime.clock import IdSource

CALLS_MAX: Final = 1024
"""Tool calls of one answer; no model means so many."""
_COUNT_MAX: Final = (1 << 32) - 1
T = TypeVar("T")


def decoded(decoder: msgspec.json.Decoder[T], data: str, provider: Provider) -> T:
    """One event. Raises ProviderError (SERVER_ERROR) for what is no event of this provider."""
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        raise no_answer(provider) from None


def no_answer(provider: Provider) -> ProviderError:
    """The provider sent something else than an answer. What it was is not quoted: it could be anything."""
    return ProviderError(
        Failure.SERVER_ERROR,
        f"{provider.title} sent something that is not an answer.",
        status="200",
    )


def count(*numbers: int | None) -> int:
    """The sum of what a provider counted, as far as a uint32 holds it; what it did not tell is 0."""
    return min(max(sum(number or 0 for number in numbers), 0), _COUNT_MAX)


def add_told(counts: msgspec.Struct, told: msgspec.Struct) -> None:
    """Takes over what a provider has counted up to an event, into a struct of the same type; its fields are numbers or None.

    Such sums only grow: what an event does not tell, or tells as 0 because it knows no better, stays (W13).
    """
    for name in told.__struct_fields__:
        value = getattr(told, name)
        if value is not None and value > (getattr(counts, name) or 0):
            setattr(counts, name, value)


class Ending:
    """How an answer ends: the first finish reason counts (W13), and without one only the provider's word that it is done."""

    def __init__(self, provider: Provider) -> None:
        self.done = False
        """The provider has said that nothing follows."""
        self.reason: generation_pb2.FinishReason.ValueType | None = None
        self._provider = provider
        self._stop_text = ""

    def finish(
        self, reason: generation_pb2.FinishReason.ValueType, stop_text: str | None = None
    ) -> None:
        """The provider told why it ended."""
        if self.reason is None:
            self.reason = reason
            self._stop_text = stop_text or ""

    def outcome(self, usage: generation_pb2.Usage | None, *, called: bool) -> Outcome:
        """See AnswerReader; `called`: the answer holds tool calls, which some providers end with "stop" all the same."""
        reason = self.reason
        if reason is None:
            if not self.done:
                raise ProviderError(
                    Failure.NETWORK, f"{self._provider.title}'s answer was cut off."
                )
            reason = generation_pb2.FINISH_REASON_STOP
        if called and reason == generation_pb2.FINISH_REASON_STOP:
            reason = generation_pb2.FINISH_REASON_TOOL_CALLS
        return Outcome(reason, usage, self._stop_text)


class CallPieces:
    """Numbers the tool calls of an answer from 0, and tells id and name of each only once, whatever the provider repeats."""

    def __init__(self, provider: Provider, ids: IdSource) -> None:
        self._provider = provider
        self._ids = ids
        self._places: dict[int | str, int] = {}
        self._named: set[int] = set()

    def __len__(self) -> int:
        return len(self._places)

    def knows(self, key: int | str) -> bool:
        """Whether a piece of this call has come."""
        return key in self._places

    def piece(
        self, key: int | str, call_id: str | None, name: str | None, arguments: str | None
    ) -> chat_pb2.ToolCallDelta:
        """The next piece of the call that the provider knows as `key`. Raises ProviderError beyond CALLS_MAX calls."""
        delta = chat_pb2.ToolCallDelta(arguments_json=arguments or "")
        place = self._places.get(key)
        if place is None:
            if len(self._places) >= CALLS_MAX:
                raise no_answer(self._provider)
            place = self._places[key] = len(self._places)
            # Not every provider names its calls, and the result of one must say which it is of.
            delta.id = call_id or self._ids("call")
        delta.index = place
        if name and place not in self._named:
            self._named.add(place)
            delta.name = name
        return delta
