"""Engines that tell one story, fail where a test wants, and go on where another has stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from caravan.core.v1 import generation_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.runtime.errors import CaravanError
from tests.support.gateway_peers import KEY, Event, FakeEngine, hang, started

BEFORE_START = -1
TOKENS = 9
PROMPT_TOKENS = 5


class Way(Enum):
    """How an engine fails a request."""

    DIES = "dies"
    """Its connections break, and nobody listens any more."""
    ENDS = "ends"
    """Its stream ends without a terminal event."""
    STALLS = "stalls"
    """It says nothing more."""
    DRAINS = "drains"
    """It asks for the request to be moved."""
    FULL = "full"
    """It has no room."""
    FAILS = "fails"
    """It cannot compute the request."""


_ERRORS = {Way.DRAINS: "DRAINING", Way.FULL: "CAPACITY_EXHAUSTED", Way.FAILS: "DECODE_FAILED"}


@dataclass(frozen=True)
class Fate:
    """What happens to a request once its answer has so many tokens; BEFORE_START: before the engine has said anything."""

    way: Way
    at: int = 0


@dataclass
class Story:
    """The fates of the calls to come, whichever engine gets them; after them all goes well."""

    fates: list[Fate] = field(default_factory=list)
    tokens: int = TOKENS
    step: int = 1
    calls: list[engine_pb.GenerateRequest] = field(default_factory=list)

    def next_fate(self) -> Fate | None:
        """The fate of the next call."""
        return self.fates.pop(0) if self.fates else None


def token_id(seed: int, position: int) -> int:
    """The token at a position of the answer: it depends on both, as sampling noise does."""
    return (seed * 31 + position * 7) % 1000


def text_of(ids: Sequence[int]) -> str:
    """The text of tokens from the first on: every third one completes a character that those before it have begun."""
    whole = len(ids) // 3 * 3
    return "".join(f"{'é'}{value}" for value in ids[:whole])


def whole_text(seed: int, tokens: int = TOKENS) -> str:
    """The answer."""
    return text_of([token_id(seed, position) for position in range(tokens)])


class MortalEngine(FakeEngine):
    """Tells the story; `Resume` is taken at its word and checked."""

    def __init__(self, story: Story, address: str = "127.0.0.1:0") -> None:
        super().__init__(address=address)
        self.story = story

    async def Generate(
        self, request: engine_pb.GenerateRequest, context: Any
    ) -> AsyncIterator[Event]:
        """Goes on behind the tokens that are there, until the fate of the call."""
        self.story.calls.append(request)
        self.requests.append(request)
        self.running += 1
        try:
            async for event in self._tell(request, self.story.next_fate()):
                yield event
        except asyncio.CancelledError:
            self.cancelled.append(request.request_id)
            raise
        finally:
            self.running -= 1

    async def _tell(
        self, request: engine_pb.GenerateRequest, fate: Fate | None
    ) -> AsyncIterator[Event]:
        seed = request.sampling.seed
        ids = list(request.resume.token_ids)
        assert ids == [token_id(seed, position) for position in range(len(ids))]
        if fate is not None and fate.at == BEFORE_START:
            # It waits there for a while.
            yield Event(progress=engine_pb.Progress())
            if await self._meet(fate):
                return
            fate = None
        yield started(PROMPT_TOKENS, cached_tokens=1 + len(ids))
        while True:
            if fate is not None and len(ids) >= fate.at and await self._meet(fate):
                return
            if len(ids) >= self.story.tokens:
                break
            more = range(len(ids), min(len(ids) + self.story.step, self.story.tokens))
            before = text_of(ids)
            new = [token_id(seed, position) for position in more]
            ids += new
            yield Event(delta=engine_pb.Delta(text=text_of(ids)[len(before) :], token_ids=new))
        yield Event(
            finished=engine_pb.Finished(
                reason=generation_pb2.FINISH_REASON_STOP,
                usage=generation_pb2.Usage(
                    prompt_tokens=PROMPT_TOKENS, completion_tokens=len(ids), cached_tokens=4
                ),
                finish_key=KEY,
                cache_hit=generation_pb2.CACHE_HIT_EXACT,
            )
        )

    async def _meet(self, fate: Fate) -> bool:
        """Whether the call just ends."""
        if fate.way is Way.ENDS:
            return True
        if fate.way in _ERRORS:
            raise CaravanError(_ERRORS[fate.way], "Not here.", retry_after_s=1.0)
        if fate.way is Way.DIES:
            self.dying = asyncio.create_task(self.kill())
        await hang()
        return True
