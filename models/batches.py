"""The endless, seeded sequence of micro-batches of a phase."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.corpus.dialogues import training_dialogue
from models.mixtures import Phase
from models.template import Renderer

LENGTHS = (32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 704, 1024)
"""Rows are padded to one of these: one dialogue a row, so attention needs no mask."""
TOKENS = 1536
"""Tokens of a micro-batch, padding included (at most)."""
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
        runs = round(len(ready) * phase.runs / (1 - phase.runs))
        ready.extend(_repeated_runs(rng, tokenizer) for _ in range(runs))
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
    end = tokenizer.token_to_id("<|im_end|>")
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
    """Rows of random tokens that are said two or three times; the repetitions are graded."""
    length = rng.choice((64, 96, 128, 192))
    top = tokenizer.get_vocab_size() - 9
    rows = []
    for _ in range(TOKENS // length):
        size = rng.randint(length // 4, length // 2)
        run = [rng.randrange(top) for _ in range(size)]
        tokens = (run * 4)[:length]
        rows.append((tokens, [position >= size for position in range(length)]))
    return _padded(rows, length)
