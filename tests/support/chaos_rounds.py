"""Rounds of kill -9: clients that ask while their engine is killed at a random token, and what they would have been told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from random import Random
from typing import Any, Final

from tests.support.chaos_clients import Question, Said, plain, streamed, typed
from tests.support.chaos_stack import Chaos
from tests.support.stack import DEMO
from tests.support.waiting import wait_for

MODEL: Final = "demo"
ENGINES: Final = ("demo-0", "demo-1")
APIS: Final = ("streamed", "plain", "typed")
_STABLE_SEEDS: Final = (2, 3, 6, 7, 11, 17)
"""Seeds with which every choice of a story has a clear margin, as the stable prompts have: resumed at random tokens, alone and in
company, they gave the same tokens. An engine that takes over computes in chunks what the other computed token by token, which
changes the last bits of the logits; so about one long story in a hundred takes another turn, at a near tie."""
_STORY_TOKENS: Final = 100


def _stable() -> Iterator[dict[str, Any]]:
    yield from json.loads(DEMO.with_name("stable_prompts.json").read_text())


def questions() -> list[Question]:
    """Greedy answers with a clear margin, calls of tools, and long answers that are sampled with a seed."""
    asked = [
        {"messages": prompt["messages"], "tools": prompt["tools"]}
        if prompt["tools"]
        else {"messages": prompt["messages"]}
        for prompt in _stable()
        if prompt["tokens"] >= 16
    ]
    greedy = [Question({**body, "temperature": 0, "max_tokens": 160}) for body in asked]
    story = [{"role": "user", "content": "Tell me a story."}]
    sampled = [
        Question(
            {
                "messages": story,
                "temperature": 0.8,
                "seed": seed,
                "max_tokens": _STORY_TOKENS,
                "ignore_eos": True,
            }
        )
        for seed in _STABLE_SEEDS
    ]
    return greedy + sampled * 3


@dataclass
class Client:
    """One question of one round. `ask` calls back with the number of events that its client has had."""

    api: str
    question: Question

    def ask(self, chaos: Chaos, seen: Callable[[int], None]) -> Said:
        """The answer."""
        if self.api == "typed":
            return typed(chaos.door, MODEL, self.question, seen)
        if self.api == "streamed":
            return streamed(chaos.stack.url, MODEL, self.question, seen)
        return plain(chaos.stack.url, MODEL, self.question)


class Rounds:
    """`answers` are what undisturbed clients are told, asked for once each."""

    def __init__(self, chaos: Chaos, random: Random) -> None:
        self.chaos = chaos
        self.random = random
        self.questions = questions()
        self.answers: dict[str, Said] = {}
        self.kills = 0

    def undisturbed(self, question: Question) -> Said:
        """The answer of engines that are left alone."""
        key = json.dumps(question.body)
        if key not in self.answers:
            self.answers[key] = typed(self.chaos.door, MODEL, question, lambda _: None)
        return self.answers[key]

    def run(self, clients: int, *, deaths: int = 1, engines_left: bool = True) -> None:
        """While all clients are being served, each time the first has had a random part of its answer its engine is killed, `deaths` times.

        With `engines_left` false all engines are killed, so that the answer of one client goes on when one has come back.
        """
        assert engines_left or clients == 1
        # One that loses the only engine waits for the next; one that has had none yet is refused then, and that is right.
        self.chaos.wait_until_ready(MODEL, 1 if clients == 1 else len(ENGINES))
        asking = [Client(self._api(), self.random.choice(self.questions)) for _ in range(clients)]
        expected = [self.undisturbed(client.question) for client in asking]
        last = max(1, expected[0].completion_tokens * 2 // 3)
        at = sorted(self.random.randint(1, last) for _ in range(deaths))
        said_of_it = f"{asking[0].api}, {asking[0].question.body}, killed at {at}"
        print(said_of_it)

        def kill(events: int) -> None:
            if at and events >= at[0]:
                at.pop(0)
                self._kill(engines_left=engines_left)

        before = self._requests()
        with ThreadPoolExecutor(clients) as pool:
            others = [pool.submit(client.ask, self.chaos, _nothing) for client in asking[1:]]
            self._wait_until_known(others, before)
            first = pool.submit(asking[0].ask, self.chaos, kill)
            if asking[0].api == "plain":
                self._wait_until_known([*others, first], before)
                self._watch(first, kill)
            said = [future.result() for future in (first, *others)]
        for client, told, wanted in zip(asking, said, expected, strict=True):
            assert told == wanted, f"{said_of_it}; {client}"
            if client.api == "typed":
                assert told.token_ids == wanted.token_ids, f"{said_of_it}; {client}"

    def _api(self) -> str:
        return self.random.choice(APIS)

    def _requests(self) -> set[str]:
        return {request.request_id for request in self.chaos.inflight()}

    def _wait_until_known(self, answers: list[Future[Said]], before: set[str]) -> None:
        """Who comes when both engines have just died is refused, and rightly; so nothing dies before all have come."""
        came = set[str]()

        def all_have_come() -> bool:
            came.update(self._requests() - before)
            return len(came) >= len(answers) or all(answer.done() for answer in answers)

        wait_for(all_have_come, f"{len(answers)} requests are known")

    def _watch(self, answer: Future[Said], seen: Callable[[int], None]) -> None:
        """The client sees nothing before the end, so what its engine says counts."""
        while not answer.done():
            seen(max(self.chaos.engine_tokens(name) for name in ENGINES))

    def _kill(self, *, engines_left: bool) -> None:
        serving = self.chaos.serving(MODEL)
        for name in [serving] if engines_left else list(ENGINES):
            if name:
                self.chaos.engines[name].kill()
                self.chaos.engines[name].start()
                self.kills += 1


def _nothing(_: int) -> None:
    """For clients that nobody waits for."""
