"""What routing by affinity saves: prompt tokens reused and time to the first token, beside round robin.

`python -m bench.affinity [--turns 3]`. Four engines of the demo model, a thread each, and 32 conversations that share four system
prompts and take turns in random order, four at a time. Each engine keeps what it computed for itself: no shared folder and
no fetches, as on four hosts; and its memory (cells for finished conversations, and blocks) holds a third of them, because memory is
what hosts run out of. The turns are long: the more of a prompt is the conversation's own, the more it matters where it goes. Both
policies serve the same conversations in the same order, one stack after the other.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from caravan.core.v1 import chat_pb2

from bench import contestants, prompts
from bench.engine_client import PublicClient, TokenAnswer
from bench.measures import percentile
from bench.report import Report, Table, arguments, ceiling, finish, floor, progress
from services.runtime.channel import open_channel

ENGINES = 4
SYSTEMS = 4
CONVERSATIONS = 32
AT_ONCE = 4
SYSTEM_SENTENCES = 7
USER_SENTENCES = 19
ANSWER_TOKENS = 24
KV_RAM = "8MiB"
RESIDENT_CELLS = 8_192
POLICIES = ("affinity", "round_robin")
REUSED_RATIO = 1.8
DEMO = Path(__file__).resolve().parents[1] / "models" / "caravan-demo.gguf"


@dataclass(slots=True)
class Conversation:
    """What was said so far, and the answers."""

    number: int
    messages: list[chat_pb2.ChatMessage]
    answers: list[TokenAnswer] = field(default_factory=list)

    @classmethod
    def begin(cls, number: int) -> Conversation:
        """The `number`-th conversation, with the system prompt that it shares with others."""
        text = _sentences(random.Random(-1 - number % SYSTEMS), SYSTEM_SENTENCES)
        return cls(number, [chat_pb2.ChatMessage(role=chat_pb2.ROLE_SYSTEM, content=text)])

    async def turn(self, public: PublicClient) -> None:
        """Says something and hears the answer."""
        rng = random.Random(repr((self.number, len(self.messages))))
        self._add(chat_pb2.ROLE_USER, _sentences(rng, USER_SENTENCES))
        answer = await public.converse(contestants.MODEL_NAME, self.messages, ANSWER_TOKENS)
        self.answers.append(answer)
        self._add(chat_pb2.ROLE_ASSISTANT, answer.text)

    def _add(self, role: chat_pb2.Role.ValueType, content: str) -> None:
        self.messages.append(chat_pb2.ChatMessage(role=role, content=content))


def _sentences(rng: random.Random, count: int) -> str:
    words = prompts.SUBJECTS, prompts.VERBS, prompts.SUBJECTS
    return " ".join(f"The {' '.join(rng.choice(kind) for kind in words)}." for _ in range(count))


async def talk(port: int, turns: int) -> list[Conversation]:
    """All conversations: each turn in an order of its own, some at a time."""
    talks = [Conversation.begin(number) for number in range(CONVERSATIONS)]
    order = random.Random(1)
    async with open_channel(f"127.0.0.1:{port}") as channel:
        public = PublicClient(channel)
        for number in range(turns):
            waiting = iter(order.sample(talks, len(talks)))

            async def lane(waiting: Iterator[Conversation] = waiting) -> None:
                for talk_ in waiting:
                    await talk_.turn(public)

            await asyncio.gather(*(lane() for _ in range(AT_ONCE)))
            progress(f"turn {number + 1} of {turns}")
    return talks


@dataclass(frozen=True, slots=True)
class Found:
    """What one policy did: tokens of all prompts, those reused, and times to the first token in ms."""

    prompt_tokens: int
    reused_tokens: int
    first_ms: list[float]

    @classmethod
    def of(cls, talks: list[Conversation]) -> Found:
        """From the answers."""
        answers = [answer for talk_ in talks for answer in talk_.answers]
        return cls(
            sum(answer.prompt_tokens for answer in answers),
            sum(answer.cached_tokens for answer in answers),
            [1000 * answer.first_s for answer in answers],
        )


def measure(policy: str, turns: int) -> Found:
    """Runs the conversations on a stack of its own."""
    environment = {
        "CARAVAN_COORDINATOR_ROUTING": policy,
        "CARAVAN_ENGINE_KV_RAM_BYTES": KV_RAM,
        "CARAVAN_ENGINE_RESIDENT_CELLS": str(RESIDENT_CELLS),
    }
    options = ["--engines", str(ENGINES), "--threads", "1", "--no-cache"]
    models = [f"{contestants.MODEL_NAME}={DEMO}"]
    progress(policy)
    with contestants.caravan(models, options=options, environment=environment) as stack:
        return Found.of(asyncio.run(talk(stack.server.port, turns)))


def report(found: dict[str, Found], turns: int) -> Report:
    """The table and the claims."""
    result = Report("affinity")
    result.notes.append(
        f"demo model, {ENGINES} engines with a thread, {RESIDENT_CELLS} cells for finished conversations and {KV_RAM} of"
        f" blocks each; {CONVERSATIONS} conversations of {turns} turns, {SYSTEMS} system prompts, {AT_ONCE} at a time"
    )
    rows = tuple(
        (
            name,
            f"{seen.prompt_tokens:,}",
            f"{seen.reused_tokens:,}",
            f"{seen.reused_tokens / seen.prompt_tokens:.0%}",
            f"{percentile(seen.first_ms, 0.5):.1f}",
            f"{percentile(seen.first_ms, 0.95):.1f}",
        )
        for name, seen in found.items()
    )
    columns = ("policy", "prompt tokens", "reused", "share", "first token p50 ms", "p95 ms")
    result.tables.append(Table("all turns", columns, rows))
    ours, theirs = (found[name] for name in POLICIES)
    result.claims += [
        floor(
            "reused prompt tokens, affinity / round robin",
            ours.reused_tokens / theirs.reused_tokens,
            REUSED_RATIO,
        ),
        ceiling(
            "time to the first token p95, affinity / round robin",
            percentile(ours.first_ms, 0.95) / percentile(theirs.first_ms, 0.95),
            1.0,
        ),
    ]
    return result


def main() -> int:
    """Parses the command line, runs, prints."""
    parser = arguments("affinity", __doc__)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    found = {policy: measure(policy, args.turns) for policy in POLICIES}
    return finish(report(found, args.turns), args.json)


if __name__ == "__main__":
    sys.exit(main())
