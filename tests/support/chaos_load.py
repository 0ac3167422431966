"""Clients that ask all the time while something dies, and what each of them was told in the end."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Final

import grpc
import httpx

from tests.support.chaos_clients import Question, RefusedError, Said, plain, streamed, typed
from tests.support.chaos_stack import Chaos
from tests.support.waiting import wait_for

MODEL: Final = "slow"
SOURCE: Final = "scripted:?step_ms=20"
_BROKEN_STATUSES: Final = {502, 503, 504}
_BROKEN_CODES: Final = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


def questions(random: Random, count: int = 6) -> list[Question]:
    """For a scripted model: prompts of their own, answers of 40 to 80 tokens."""
    return [
        Question(
            {
                "messages": [{"role": "user", "content": f"Question {random.random()}"}],
                "temperature": 0,
                "max_tokens": random.randint(40, 80),
                "ignore_eos": True,
            }
        )
        for _ in range(count)
    ]


@dataclass(frozen=True)
class Failure:
    """A request that was not answered. `broken`: its client saw that the connection or the gateway went away."""

    what: str
    error: Exception
    asked_at: float

    @property
    def broken(self) -> bool:
        """Whether a client can tell that it may ask again."""
        error = self.error
        if isinstance(error, RefusedError):
            return error.status in _BROKEN_STATUSES
        if isinstance(error, grpc.RpcError):
            # INTERNAL is what gRPC makes of a stream that is reset, which is how Envoy ends one that has begun.
            reset = "RST_STREAM" in str(error.details())
            return error.code() in _BROKEN_CODES or reset
        return isinstance(error, httpx.TransportError)

    def __str__(self) -> str:
        return f"{self.what}: {self.error}"


@dataclass
class Load:
    """`clients` threads that ask one question after the other, as streams, plain and typed, until they are stopped."""

    chaos: Chaos
    random: Random
    clients: int = 8
    failures: list[Failure] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    answered: int = 0

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._questions = questions(self.random)
        self._answers: list[Said] = []

    @property
    def asked(self) -> int:
        """Requests that have ended in one way or another."""
        return self.answered + len(self.failures) + len(self.wrong)

    @property
    def told(self) -> str:
        """The failures, a line each."""
        return "\n".join(map(str, self.failures))

    def start(self) -> None:
        """Learns the undisturbed answers, then starts the clients; returns when most of them have an engine."""
        with ThreadPoolExecutor(len(self._questions)) as pool:
            self._answers = list(pool.map(partial(self._ask, "typed"), self._questions))
        for number in range(self.clients):
            thread = threading.Thread(target=self._run, args=(number,), daemon=True)
            self._threads.append(thread)
            thread.start()
        self.wait_until_busy()

    def wait_until_busy(self) -> None:
        """Returns when most of the clients are being served."""
        wait_for(lambda: len(self.chaos.inflight()) > self.clients / 2, "most clients are served")

    def wait_for_answers(self, count: int) -> None:
        """Returns when so many more answers have been complete."""
        wanted = self.answered + count
        wait_for(lambda: self.answered >= wanted, f"{count} more answers", 60)

    def stop(self) -> None:
        """Returns when each client has had the end of its last answer. Fails where one was wrong."""
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a client hangs"
        assert not self.wrong, self.wrong

    def _run(self, number: int) -> None:
        turn = number
        apis = ("streamed", "plain", "typed")
        while not self._stop.is_set():
            index, api = turn % len(self._questions), apis[turn % len(apis)]
            turn += 1 + number
            self._ask_once(api, index)

    def _ask_once(self, api: str, index: int) -> None:
        asked_at = time.monotonic()
        try:
            said = self._ask(api, self._questions[index])
        except AssertionError as error:
            with self._lock:
                self.wrong.append(f"{api}: {error}")
        except (RefusedError, grpc.RpcError, httpx.HTTPError) as error:
            with self._lock:
                self.failures.append(Failure(api, error, asked_at))
        else:
            with self._lock:
                if said == self._answers[index]:
                    self.answered += 1
                else:
                    self.wrong.append(f"{api}: {said} instead of {self._answers[index]}")

    def _ask(self, api: str, question: Question) -> Said:
        if api == "typed":
            return typed(self.chaos.door, MODEL, question, _nothing)
        if api == "streamed":
            return streamed(self.chaos.stack.url, MODEL, question, _nothing)
        return plain(self.chaos.stack.url, MODEL, question)


def _nothing(_: int) -> None:
    """For clients that nobody waits for."""
