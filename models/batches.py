"""The endless, seeded sequence of micro-batches of a phase."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.bpe import CONTROL, MARKUP
from models.corpus.dialogues import training_dialogue
from models.corpus.tables import COPIED
from models.mixtures import Phase
from models.template import Renderer

LENGTHS = (32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 704, 1024)
"""Rows are padded to one of these: one dialogue a row, so attention needs no mask."""
TOKENS = 1536
"""Tokens of a micro-batch, padding included (at most)."""
_JOINS = (" ", " ", ", ", "\n", '" "', '", "', ": ", " and ", " in ", '": "')
_CHUNK = 2000
_SORTED_SHARE = 0.4


@dataclass(frozen=True)
class MicroBatch:
    """tokens and graded, both [rows, length]; graded marks the tokens that count for the loss."""

    tokens: Tensor
    graded: Tensor


def micro_batches(phase: Phase, tokenizer: Tokenizer) -> Iterator[MicroBatch]:
    """Micro-batches without end; the same ones for the same phase and tokenizer."""
    rng = random.Random(phase.seed)
    waiting: dict[int, list[tuple[list[int], list[bool]]]] = {length: [] for length in LENGTHS}
    while True:
        ready = []
        for row in _dialogue_rows(rng, phase, tokenizer):
            length = next(length for length in LENGTHS if length >= len(row[0]))
            waiting[length].append(row)
            if len(waiting[length]) == max(1, TOKENS // length):
                ready.append(_padded(waiting[length], length))
                waiting[length] = []
        drills = phase.drills
        dialogues = 1 - drills.tokens - drills.words - drills.numbers - drills.ordered
        per_share = len(ready) / dialogues
        for share, drill in (
            (drills.tokens, _repeated_runs),
            (drills.words, _repeated_words),
            (drills.numbers, _repeated_numbers),
            (drills.ordered, _ordered_words),
        ):
            ready.extend(drill(rng, tokenizer) for _ in range(round(per_share * share)))
        rng.shuffle(ready)
        yield from ready


def _dialogue_rows(
    rng: random.Random, phase: Phase, tokenizer: Tokenizer
) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids of dialogues, and which of them the assistant wrote."""
    renderers = Renderer(sort_keys=False), Renderer(sort_keys=True)
    texts = []
    for _ in range(_CHUNK):
        dialogue = training_dialogue(rng, phase.mixture)
        renderer = renderers[rng.random() < _SORTED_SHARE]
        texts.append(renderer.render(dialogue.messages, dialogue.tools))
    start = tokenizer.encode("<|im_start|>assistant\n").ids
    end = tokenizer.encode("<|im_end|>").ids[0]
    for encoding in tokenizer.encode_batch(texts):
        if len(encoding.ids) <= LENGTHS[-1]:
            yield encoding.ids, answer_mask(encoding.ids, start, end)


def answer_mask(ids: list[int], start: list[int], end: int) -> list[bool]:
    """True from the token after each `start` to the next `end`, that one included."""
    mask, inside = [], False
    for position, token in enumerate(ids):
        mask.append(inside)
        if token == end:
            inside = False
        elif ids[position + 1 - len(start) : position + 1] == start:
            inside = True
    return mask


def _padded(rows: list[tuple[list[int], list[bool]]], length: int) -> MicroBatch:
    tokens = [ids + [0] * (length - len(ids)) for ids, _ in rows]
    graded = [mask + [False] * (length - len(mask)) for _, mask in rows]
    return MicroBatch(torch.tensor(tokens), torch.tensor(graded))


def _repeated_runs(rng: random.Random, tokenizer: Tokenizer) -> MicroBatch:
    """Rows of a random run of tokens, said again and again; the repetitions are graded.

    Short runs are as frequent as long ones: in them even "say what was said" pays, which is the
    first step towards copying in order.
    """
    length = rng.choice((48, 64, 96, 128))
    top = tokenizer.get_vocab_size() - len(CONTROL) - len(MARKUP)
    rows = []
    for _ in range(TOKENS // length):
        size = round(2 * (length / 4) ** rng.random())
        run = [rng.randrange(top) for _ in range(size)]
        tokens = (run * length)[:length]
        rows.append((tokens, [position >= size for position in range(length)]))
    return _padded(rows, length)


def _repeated_words(rng: random.Random, tokenizer: Tokenizer) -> MicroBatch:
    """Rows of table words.

    A word after a space and a word after a quote are different tokens: the rows teach which token
    repeats which.
    """
    return _repeated_lists(rng, tokenizer, lambda rng: rng.choice(COPIED))


def _repeated_numbers(rng: random.Random, tokenizer: Tokenizer) -> MicroBatch:
    """Rows of numbers, whose digits are easily swapped."""
    return _repeated_lists(
        rng, tokenizer, lambda rng: str(rng.randrange(rng.choice((21, 100, 999))))
    )


def _repeated_lists(
    rng: random.Random, tokenizer: Tokenizer, item: Callable[[random.Random], str]
) -> MicroBatch:
    """Rows of a list, said again on further lines and joined differently on each.

    All lines but the first are graded.
    """
    length = rng.choice((48, 64, 96, 128))
    rows = []
    for _ in range(TOKENS // length):
        items = [item(rng) for _ in range(rng.randint(1, 7))]
        lines = [rng.choice(_JOINS).join(items) for _ in range(length // len(items))]
        first = len(tokenizer.encode(lines[0]).ids)
        ids = tokenizer.encode("\n".join(lines)).ids[:length]
        rows.append((ids, [position >= first for position in range(len(ids))]))
    return _padded(rows, length)


def _ordered_words(rng: random.Random, tokenizer: Tokenizer) -> MicroBatch:
    """Rows of two or three lines of table words, then the same lines in any order.

    Only the word before tells the next one: neither the kind of word nor a fixed distance does.
    """
    length = rng.choice((64, 96, 128))
    rows = []
    for _ in range(TOKENS // length):
        join = rng.choice((" ", " ", ", "))
        lines = [
            join.join(rng.choices(COPIED, k=rng.randint(2, 7))) for _ in range(rng.choice((2, 3)))
        ]
        first = len(tokenizer.encode("\n".join(lines)).ids)
        ids = tokenizer.encode("\n".join(lines + rng.choices(lines, k=length // 3))).ids[:length]
        rows.append((ids, [position >= first for position in range(len(ids))]))
    return _padded(rows, length)
