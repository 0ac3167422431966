"""The endless, seeded sequence of micro-batches of a phase."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.bpe import CONTROL, MARKUP
from models.corpus.dialogues import training_dialogue
from models.corpus.tables import COPIED
from models.corpus.talk import invented
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
        per_share = len(ready) / (1 - drills.tokens - drills.lists)
        for share, drill in ((drills.tokens, _repeated_spans), (drills.lists, _repeated_lists)):
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


def _repeated_spans(rng: random.Random, tokenizer: Tokenizer) -> MicroBatch:
    """Rows of random tokens, among which spans of the row occur again.

    All but the first token of such a span are graded. Only the token before tells the next one:
    neither the kind of token nor a fixed distance does.
    """
    length = rng.choice((32, 48, 64, 96, 128))
    top = tokenizer.get_vocab_size() - len(CONTROL) - len(MARKUP)
    rows = []
    for _ in range(TOKENS // length):
        tokens: list[int] = []
        graded: list[bool] = []
        while len(tokens) < length:
            if len(tokens) >= 4 and rng.random() < 0.6:
                size = rng.randint(2, min(24, len(tokens) - 1))
                start = rng.randrange(len(tokens) - size + 1)
                tokens.extend(tokens[start : start + size])
                graded.extend([False] + [True] * (size - 1))
            else:
                size = rng.randint(2, 10)
                tokens.extend(rng.randrange(top) for _ in range(size))
                graded.extend([False] * size)
        rows.append((tokens[:length], graded[:length]))
    return _padded(rows, length)


def _repeated_lists(rng: random.Random, tokenizer: Tokenizer) -> MicroBatch:
    """Rows of one to three lists, a line each, then the same lists in any order, joined anew.

    A word after a space and a word after a quote are different tokens: the rows teach which token
    repeats which. All lines but the first ones are graded.
    """
    length = rng.choice((48, 64, 96, 128))
    rows = []
    for _ in range(TOKENS // length):
        lists = [_items(rng) for _ in range(rng.choice((1, 2, 3)))]
        again = rng.choices(lists, k=length // 3)
        first = "\n".join(rng.choice(_JOINS).join(items) for items in lists)
        text = first + "".join("\n" + rng.choice(_JOINS).join(items) for items in again)
        told = len(tokenizer.encode(first).ids)
        ids = tokenizer.encode(text).ids[:length]
        rows.append((ids, [position > told for position in range(len(ids))]))
    return _padded(rows, length)


def _items(rng: random.Random) -> list[str]:
    """One to seven table words, numbers or invented words."""
    roll, count = rng.random(), rng.randint(1, 7)
    if roll < 0.6:
        return rng.choices(COPIED, k=count)
    if roll < 0.85:
        return [str(rng.randrange(rng.choice((21, 100, 100, 9999)))) for _ in range(count)]
    return [invented(rng) for _ in range(count)]
