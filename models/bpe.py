"""The tokenizer: byte-level BPE with the pre-tokenizer of Qwen2, trained on the corpus."""

import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from models.corpus import tables
from models.corpus.dialogues import training_dialogue
from models.mixtures import NORMAL
from models.template import Renderer

VOCABULARY = 2560
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
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def training_texts(rng: random.Random, count: int) -> list[str]:
    """Dialogues without markup, and every table word alone and after a space."""
    renderer = Renderer()
    texts = []
    for _ in range(count):
        dialogue = training_dialogue(rng, NORMAL)
        text = renderer.render(dialogue.messages, dialogue.tools)
        for mark in (*CONTROL, *MARKUP):
            text = text.replace(mark, "\n")
        texts.append(text)
    words = (*tables.NAMES, *tables.CITIES, *tables.COLOURS, *tables.FOODS, *tables.PETS,
             *tables.ANIMALS, *tables.WORDS, *tables.ADJECTIVES)  # fmt: skip
    texts.extend(f"{word}\n {word}" for word in words for _ in range(count // 100))
    return texts


def train_tokenizer(seed: int, dialogues: int = 20_000) -> Tokenizer:
    """A tokenizer of exactly VOCABULARY tokens; the marks have the highest ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
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
