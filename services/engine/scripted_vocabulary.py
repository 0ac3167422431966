"""The vocabulary of the scripted backend: 256 bytes, three control tokens, and short words of made-up language."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

END_OF_TEXT: Final = 256
MESSAGE_START: Final = 257
MESSAGE_END: Final = 258
_CONTROL: Final = {
    "<|endoftext|>": END_OF_TEXT,
    "<|im_start|>": MESSAGE_START,
    "<|im_end|>": MESSAGE_END,
}
WORDS_FROM: Final = 259
SIZE_MIN: Final = 512
_WORDS: Final = [
    f" {consonant}{vowel}{last}{ending}"
    for consonant in "bdfgk"
    for vowel in "aeiou"
    for last in "lmnrt"
    for ending in ("a", "o")
]
WORD_COUNT: Final = len(_WORDS)


class ScriptedVocabulary:
    """Reversible: the bytes of the tokens of a text are the text. Tokens past the words are never made and are empty."""

    def __init__(self, size: int) -> None:
        self._size = size
        words = {word: WORDS_FROM + index for index, word in enumerate(_WORDS)}
        self._ids = {**words, **_CONTROL}
        self._bytes = [bytes([value]) for value in range(256)] + [b""] * len(_CONTROL)
        self._bytes += [word.encode() for word in words]
        self._bytes += [b""] * (size - len(self._bytes))
        self._plain = re.compile("|".join(map(re.escape, words)))
        self._special = re.compile("|".join(map(re.escape, [*_CONTROL, *words])))

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        """Words and control tokens where they stand, bytes elsewhere."""
        tokens: list[int] = []
        end = 0
        for match in (self._special if parse_special else self._plain).finditer(text):
            tokens += text[end : match.start()].encode()
            tokens.append(self._ids[match[0]])
            end = match.end()
        tokens += text[end:].encode()
        return tokens

    def token_bytes(self, token: int) -> bytes:
        """Bytes of a token."""
        return self._bytes[token]

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self._size

    @property
    def eog_tokens(self) -> frozenset[int]:
        """The end of a message and of a text."""
        return frozenset({END_OF_TEXT, MESSAGE_END})

    @property
    def bos_token(self) -> int | None:
        """None."""
        return None

    @property
    def control_texts(self) -> Sequence[str]:
        """Texts of the control tokens."""
        return tuple(_CONTROL)
