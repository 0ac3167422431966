"""The tokenizer: byte-level BPE with the pre-tokenizer of GPT-2, trained on the corpus.

GPT-2 parts a quote from the word that follows and keeps the digits of a number together. So a table
word and a number up to 99 have two forms of one token each, with a space before it and without, and
to copy one is one step. (With the pre-tokenizer of Qwen2 a quote made a third form, and every
number was copied digit by digit, in which order got lost.)
"""

import random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from models.corpus import calls, tables, talk
from models.corpus.dialogues import training_dialogue
from models.mixtures import NORMAL
from models.template import Renderer

VOCABULARY = 2816
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Never printed."""
MARKUP = (
    "<tools>",
    "</tools>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
"""One token each, printed as text."""
NUMBERS = (*map(str, range(100)), *(f"{number:02d}" for number in range(10)))
"""What is one token besides words: small numbers, and the parts of a clock."""


def training_texts(rng: random.Random, count: int) -> list[str]:
    """Dialogues without markup, and everything that is to be one token in both of its forms."""
    renderer = Renderer()
    texts = []
    for _ in range(count):
        dialogue = training_dialogue(rng, NORMAL)
        text = renderer.render(dialogue.messages, dialogue.tools)
        for mark in (*CONTROL, *MARKUP):
            text = text.replace(mark, "\n")
        texts.append(text)
    words = (*tables.COPIED, *tables.ANIMALS, *tables.TOPICS, *calls.CONDITIONS, *calls.DAYS,
             *calls.ROOMS, *NUMBERS)  # fmt: skip
    texts.extend(f"{word}\n {word}" for word in words for _ in range(count // 40))
    texts.extend(f"{word}\n {word}" for word in (talk.invented(rng) for _ in range(count // 4)))
    return texts


def train_tokenizer(seed: int, dialogues: int = 20_000) -> Tokenizer:
    """A tokenizer of exactly VOCABULARY tokens; the marks have the highest ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    marks = (*CONTROL, *MARKUP)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(marks),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(random.Random(seed), dialogues), trainer)
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"the corpus gives only {tokenizer.get_vocab_size()} tokens")
    return tokenizer
