"""The attempts of one request: permits, the call, its answer, and what follows from how it ended (S3.6-S3.12; W18-W22).

Each attempt asks the rate limit and the breaker anew, and gives both back however it ends, also when it is cancelled (I6). A failure is
tried again only while nothing of the answer has come: after its first event another attempt could say the same text twice (W20).
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping

from caravan.core.v1 import generation_pb2

from services.engine.remote.breaker import Permit
from services.engine.remote.credentials import Credential, CredentialError
from services.engine.remote.dispatcher import deadline_exceeded
from services.engine.remote.endpoint import Endpoint
from services.engine.remote.estimate import tokens_of_text
from services.engine.remote.failure import Failure, ProviderError
from services.engine.remote.metrics import CANCELLED, SUCCEEDED
from services.engine.remote.rate_gate import RatePermit
from services.engine.remote.request import Phase, Request, Work
from services.engine.remote.wire import AnswerReader, Outcome
from services.runtime.errors import CaravanError

_LOG = logging.getLogger(__name__)


class Run:
    """One request at the provider. Ends it in its outbox, exactly once (I1)."""

    def __init__(self, endpoint: Endpoint, request: Request, work: Work) -> None:
        self._endpoint = endpoint
        self._request = request
        self._work = work
        self._retries = 0
        self._has_rebuilt = False
        self._was_called = False
        self._has_begun = False
        self._ends_at = math.inf

    async def attempt(self) -> float | None:
        """Makes a call. Returns None where the request has its end; else it is to be called again after so many seconds."""
        request = self._request
        try:
            while True:
                credential = self._endpoint.credentials.snapshot
                try:
                    outcome = await self._call(credential)
                except ProviderError as error:
                    self._tell(error)
                    if not self._may_repeat(error):
                        raise
                    if await self._rebuilt(error, credential):
                        continue
                    return self._retry_in(error)
                now = self._endpoint.clock.monotonic()
                request.end(outcome.reason, now, outcome.stop_text)
                return None
        except ProviderError as error:
            clean = self._endpoint.redactor.clean_error(error)
            request.outbox.fail(clean.to_error(self._endpoint.provider, self._endpoint.model))
        except CaravanError as error:
            request.outbox.fail(error)
        return None

    def _tell(self, error: ProviderError) -> None:
        """Tells the operator, who may see nothing of it where a retry or a fallback helps."""
        endpoint = self._endpoint
        if self._was_called and (line := endpoint.failures.line(error, endpoint.clock.monotonic())):
            _LOG.warning("%s", endpoint.redactor.clean(line))

    def _may_repeat(self, error: ProviderError) -> bool:
        """Whether a call was made, and nothing of an answer has come; a limit that was reached is waited for only with patience."""
        if error.failure is Failure.RATE_LIMITED and not self._endpoint.patience:
            return False
        return self._was_called and not self._has_begun

    async def _rebuilt(self, error: ProviderError, refused: Credential) -> bool:
        """Whether the provider did not take the credential, and there is another one to try, once (W21)."""
        if error.failure is not Failure.UNAUTHORIZED or self._has_rebuilt or not refused.secret:
            return False
        self._has_rebuilt = True
        try:
            fresh = await self._endpoint.credentials.rebuild(refused.generation)
        except CredentialError:
            return False  # What the provider said tells the caller more.
        return fresh.generation != refused.generation

    def _retry_in(self, error: ProviderError) -> float:
        """Seconds until the next attempt. Raises the error where there is to be none."""
        endpoint = self._endpoint
        wait_s = endpoint.retry.decide(
            self._retries, error, self._remaining_s(), endpoint.fraction()
        )
        if wait_s is None:
            raise error
        self._retries += 1
        endpoint.metrics.retries.inc()
        return wait_s

    def _remaining_s(self) -> float | None:
        ends_at = min(self._ends_at, self._work.deadline)
        if math.isinf(ends_at):
            return None
        return max(0.0, ends_at - self._endpoint.clock.monotonic())

    async def _call(self, credential: Credential) -> Outcome:
        """Waits for the rate limit, asks the breaker, and makes one call. Raises ProviderError or DEADLINE_EXCEEDED."""
        endpoint = self._endpoint
        clock = endpoint.clock
        self._begin()
        self._check_time()
        # Whom the breaker would refuse need not wait for, or use up, what the limit allows.
        endpoint.breaker.acquire(clock.monotonic()).abandon(clock.monotonic())
        rate = await endpoint.gate.enter(self._work.tokens, self._remaining_s(), endpoint.patience)
        try:
            permit = endpoint.breaker.acquire(clock.monotonic())
            try:
                return await self._permitted(credential, rate, permit)
            finally:
                # Nothing happens where it has ended, and the same below: so no path can keep one.
                permit.abandon(clock.monotonic())
        finally:
            rate.withdraw()

    def _begin(self) -> None:
        if self._request.attempts == 0 and self._endpoint.total_s is not None:
            self._ends_at = self._endpoint.clock.monotonic() + self._endpoint.total_s
        self._request.attempts += 1
        self._was_called = False

    async def _permitted(self, credential: Credential, rate: RatePermit, permit: Permit) -> Outcome:
        """One call with both permits, which it gives back."""
        endpoint = self._endpoint
        reader = endpoint.wire.reader()
        span = endpoint.tracing.start(
            "attempt",
            self._work.span.headers(),
            gen_ai__provider__name=endpoint.provider,
            gen_ai__request__model=endpoint.model,
            caravan__attempt=self._request.attempts,
        )
        label, failure = CANCELLED, None
        try:
            outcome = await self._in_time(reader, credential, permit)
            label = SUCCEEDED
        except ProviderError as error:
            failure = error.failure
            label = failure.value.lower()
            if failure is Failure.RATE_LIMITED:
                rate.throttled(error.retry_after_s)
            if its_id := error.provider_request_id:
                span.set(caravan__provider_request_id=endpoint.redactor.clean(its_id))
            raise
        else:
            return outcome
        finally:
            if label is not CANCELLED:
                permit.end(failure, endpoint.clock.monotonic())
            if self._was_called:  # Else it is withdrawn.
                rate.settle(self._used(reader, failure, is_whole=label is SUCCEEDED))
            span.end(None if label is SUCCEEDED else label)
            endpoint.metrics.attempts.labels(label).inc()

    async def _in_time(
        self, reader: AnswerReader, credential: Credential, permit: Permit
    ) -> Outcome:
        """The call, within the time of the caller and the longest time of all attempts."""
        # It may have waited for the limit; and over a connection that is open it could still be sent.
        self._check_time()
        began = self._endpoint.clock.monotonic()
        limit = asyncio.timeout(self._remaining_s())
        try:
            async with limit:
                return await self._answer(reader, credential, permit)
        except TimeoutError:
            if not limit.expired():
                raise
        raise self._too_late(self._endpoint.clock.monotonic() - began)

    def _check_time(self) -> None:
        if self._remaining_s() == 0:
            raise self._too_late(0.0)

    def _too_late(self, took_s: float) -> CaravanError | ProviderError:
        """The time of the caller is over, or that of all attempts."""
        if self._work.deadline <= self._ends_at:
            return deadline_exceeded()
        return ProviderError(
            Failure.TIMEOUT,
            "The provider did not finish its answer in time.",
            waited_for="total",
            elapsed_ms=str(round(took_s * 1000)),
        )

    async def _answer(
        self, reader: AnswerReader, credential: Credential, permit: Permit
    ) -> Outcome:
        """Sends the request and hands on the pieces of the answer, all that came together at a time."""
        endpoint, request = self._endpoint, self._request
        clock, accounts = endpoint.clock, endpoint.accounts
        outbox, read = request.outbox, reader.read
        called = clock.monotonic()
        self._was_called = True
        if request.called is None:
            request.called = called
            # Not before: a request that the breaker or the limit refuses loads nobody, and earns no retries for others.
            endpoint.retry.first_attempt()
            endpoint.metrics.queue_seconds.observe(called - request.arrived)
            self._work.span.event("started")
            outbox.start()
        headers: Mapping[str, str] = {}
        if credential.secret:
            headers = endpoint.wire.credential_headers(credential.secret)
        async with endpoint.client.stream(self._work.call, headers) as answer:
            async for events in answer.batches():
                now = clock.monotonic()
                for name, data in events:
                    piece = read(name, data)
                    if not self._has_begun:
                        self._has_begun = True
                        request.phase = Phase.ANSWERING
                        permit.answering(now)
                        endpoint.metrics.first_byte_seconds.observe(now - called)
                    if piece is not None:
                        if request.first_piece is None:
                            request.first_piece = now
                            # The first one is told at once; behind it, many together are less work for everybody.
                            answer.gather(self._work.gather_s)
                        request.last_piece = now
                        request.pieces += 1
                        request.characters += len(piece.text)
                        accounts.pieces += 1
                        outbox.add(piece)
                    if reader.is_complete:
                        break
                if reader.is_complete:
                    break
                if outbox.is_full:
                    await outbox.room()
        return reader.outcome()

    def _used(self, reader: AnswerReader, failure: Failure | None, *, is_whole: bool) -> int:
        """Notes what the attempt has used; returns its tokens, as far as anybody can know."""
        request = self._request
        if self._has_begun:
            told = reader.usage_so_far()
            if is_whole and told is not None:
                request.usage = told
            else:
                # A piece is a token or more of them; some providers send many together.
                tokens = max(request.pieces, tokens_of_text(request.characters))
                request.usage = estimated(told, self._work.prompt_tokens, tokens)
        elif failure in _GIVEN_UP:
            request.usage = estimated(None, self._work.prompt_tokens, 0)
        else:
            # The provider may have read the prompt; to count the longest answer too, for each of many failures, would use up a
            # limit that the provider has not touched.
            return 0 if failure in _NOTHING_USED else self._work.prompt_tokens
        request.cost_nanousd = self._endpoint.accounts.cost_nanousd(request.usage)
        return request.usage.prompt_tokens + request.usage.completion_tokens


_NOTHING_USED = frozenset(
    {
        Failure.RATE_LIMITED,
        Failure.REJECTED,
        Failure.UNAUTHORIZED,
        Failure.FORBIDDEN,
        Failure.NOT_FOUND,
        Failure.CONTEXT_LENGTH_EXCEEDED,
    }
)
"""What a provider refuses before it computes anything."""
_GIVEN_UP = frozenset({None, Failure.TIMEOUT})
"""How calls end that nobody waits for any more, by their caller's will or by ours: providers charge for prompts that they have read."""


def estimated(
    told: generation_pb2.Usage | None, prompt_tokens: int, completion_tokens: int
) -> generation_pb2.Usage:
    """The tokens of an answer that was cut off, or whose provider tells none: what was told until then, and guesses for the rest.

    First figures that some providers send do not count what follows.
    """
    usage = generation_pb2.Usage(prompt_tokens=prompt_tokens)
    if told is not None:
        usage.CopyFrom(told)
    usage.completion_tokens = max(usage.completion_tokens, completion_tokens)
    return usage
