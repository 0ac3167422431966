"""What every provider's wire has in common: a request to send, pieces of the answer, and how it ended. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.engine.v1 import engine_service_pb2 as pb

from services.engine.remote.failure import ProviderError


@dataclass(frozen=True, slots=True)
class WireRequest:
    """A POST, relative to the base URL, without the credential. `body` is JSON."""

    path: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


PLAIN: Final[Mapping[str, str]] = {"accept": "application/json"}
"""Headers of a call whose answer is to come in one piece."""


@dataclass(slots=True)
class Piece:
    """What one event of the provider's stream adds to the answer; nothing of it twice."""

    text: str = ""
    refusal: str = ""
    calls: list[chat_pb2.ToolCallDelta] = field(default_factory=list)
    logprobs: list[generation_pb2.TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an answer ended: why, the stop text that was met, and the tokens that the provider counted, all of them.

    `usage` is None where the provider told none.
    """

    reason: generation_pb2.FinishReason.ValueType
    usage: generation_pb2.Usage | None
    stop_text: str = ""


class AnswerReader(Protocol):
    """Reads one answer. The first finish reason counts, and usage is taken as the provider means it: as a sum or as a part (W13)."""

    @property
    def is_complete(self) -> bool:
        """Whether the provider has said that nothing follows; what comes behind it is not read."""
        ...

    def read(self, event: str, data: str) -> Piece | None:
        """The next server-sent event, by name ("" for none) and data; None adds nothing. Raises ProviderError."""
        ...

    def usage_so_far(self) -> generation_pb2.Usage | None:
        """The tokens that the provider has told of until now, for an answer that ends early."""
        ...

    def outcome(self) -> Outcome:
        """How the answer ended. Raises ProviderError (NETWORK) for one that was cut off before its end."""
        ...


class Wire(Protocol):
    """The API of one kind of provider."""

    def request(
        self, generate: pb.GenerateRequest, model: str, *, plain: bool = False
    ) -> WireRequest:
        """The call for a request, whose answer comes as a stream, or `plain`: in one piece. Raises CaravanError (UNSUPPORTED_FIELD and the like, with `param`)."""
        ...

    def credential_headers(self, secret: str) -> Mapping[str, str]:
        """The headers that carry the credential."""
        ...

    def reader(self) -> AnswerReader:
        """A reader for the answer to one call."""
        ...

    def error(self, status: int, headers: Mapping[str, str], body: bytes) -> ProviderError:
        """What an answer other than 200 means; `body` is at most 64 KiB of it. `headers` has lower-case names."""
        ...
