"""Bytes on disk and hit rate of conversations that share a system prompt.

`python -m bench.conversations [--conversations 10] [--turns 20]`. A 0.5B-shaped Q8_0 model, the typed API, tokens as prompts. Each
conversation begins with the same 1,024 tokens; each turn sends all that came before, the answer included, and 24 tokens more,
and gets 16. Conversations take turns, so that each finds the others' in between. Bytes on disk count every file; the distinct
text counts each token once wherever conversations share what is before it, at the bytes that a token takes in a block file.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

from bench import contestants, model_files
from bench.engine_client import PublicClient
from bench.report import Report, Table, arguments, ceiling, finish, floor, progress
from services.runtime.channel import open_channel

SYSTEM_TOKENS = 1024
USER_TOKENS = 24
ANSWER_TOKENS = 16
BLOCK_TOKENS = 256
MOST_BYTES = 1.2
HIT_RATE = 0.95
QUIET_S = 1.0


@dataclass(slots=True)
class Conversation:
    """Its tokens so far, and what each turn reused of its prompt: (prompt, cached) tokens."""

    rng: random.Random
    tokens: list[int]
    turns: list[tuple[int, int]] = field(default_factory=list)

    async def turn(self, public: PublicClient) -> None:
        """Says something and hears the answer."""
        self.tokens += [self.rng.randrange(1000, 100_000) for _ in range(USER_TOKENS)]
        answer = await public.complete(contestants.MODEL_NAME, self.tokens, ANSWER_TOKENS)
        self.turns.append((len(self.tokens), answer.cached_tokens))
        self.tokens += answer.token_ids


def distinct_tokens(texts: list[list[int]]) -> int:
    """Tokens of a prefix tree of the texts."""
    seen: set[int] = set()
    for tokens in texts:
        prefix = 0
        for token in tokens:
            prefix = hash((prefix, token))
            seen.add(prefix)
    return len(seen)


def sizes(folder: Path) -> list[int]:
    """Bytes of the files, largest first."""
    return sorted((path.stat().st_size for path in folder.rglob("*.kvc")), reverse=True)


async def until_quiet(folder: Path) -> list[int]:
    """Waits until the files change no more; returns their sizes."""
    before: list[int] = []
    while not before or (now := sizes(folder)) != before:
        before = sizes(folder)
        await asyncio.sleep(QUIET_S)
    return now


async def talk(stack: contestants.Stack, conversations: int, turns: int) -> list[Conversation]:
    """All conversations, a turn each in turn."""
    rng = random.Random(0)
    system = [rng.randrange(1000, 100_000) for _ in range(SYSTEM_TOKENS)]
    talks = [Conversation(random.Random(n + 1), list(system)) for n in range(conversations)]
    async with open_channel(f"127.0.0.1:{stack.server.port}") as channel:
        public = PublicClient(channel)
        for number in range(turns):
            for talk_ in talks:
                await talk_.turn(public)
            progress(f"turn {number + 1} of {turns}")
    return talks


def report(talks: list[Conversation], files: list[int]) -> Report:
    """The table and the claims."""
    result = Report("conversations")
    turns = len(talks[0].turns)
    result.notes.append(
        f"0.5B-shaped Q8_0 model, {len(talks)} conversations of {turns} turns, one system prompt of {SYSTEM_TOKENS} tokens"
    )
    distinct = distinct_tokens([talk.tokens for talk in talks])
    bytes_per_token = files[0] / BLOCK_TOKENS
    needed = distinct * bytes_per_token
    later = [turn for talk in talks for turn in talk.turns[1:]]
    prompts, cached = (sum(turn[i] for turn in later) for i in (0, 1))
    rows = (
        ("files", f"{len(files)}"),
        ("bytes of the files", f"{sum(files):,}"),
        ("distinct tokens", f"{distinct:,}"),
        ("bytes of the distinct blocks", f"{needed:,.0f}"),
        ("prompt tokens after the first turn", f"{prompts:,}"),
        ("of them reused", f"{cached:,}"),
    )
    result.tables.append(Table("all conversations", ("what", "how many"), rows))
    result.claims += [
        ceiling("bytes on disk / bytes of the distinct blocks", sum(files) / needed, MOST_BYTES),
        floor("prompt tokens reused after the first turn", cached / prompts, HIT_RATE),
    ]
    return result


def run(model: Path, conversations: int, turns: int, threads: int) -> Report:
    """Talks, waits until all is saved, counts."""
    with (
        contestants.state_folder() as state,
        contestants.caravan(
            [f"{contestants.MODEL_NAME}={model}"],
            options=["--threads", str(threads)],
            state_dir=state,
        ) as stack,
    ):
        talks = asyncio.run(talk(stack, conversations, turns))
        files = asyncio.run(until_quiet(state))
    return report(talks, files)


def main() -> int:
    """Parses the command line, runs, prints."""
    parser = arguments("conversations", __doc__)
    parser.add_argument("--conversations", type=int, default=10)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    model = model_files.ensure("qwen-0.5b")
    return finish(run(model, args.conversations, args.turns, args.threads), args.json)


if __name__ == "__main__":
    sys.exit(main())
