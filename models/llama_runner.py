"""Greedy answers of a GGUF, through llama.cpp's C interface."""

# ruff: noqa: FBT003 - C functions take their flags by position

import ctypes
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray

# llama.cpp reports every tensor; errors come back as return values.
_SILENT = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)


@dataclass(frozen=True)
class Answer:
    """`text` without the end mark; `stopped` says whether the model ended it by itself.

    `margin` is the smallest distance of the two highest logits over all tokens of the answer: where
    it is small, rounding that differs between batches can change the text.
    """

    text: str
    tokens: int
    stopped: bool
    margin: float


class LlamaRunner:
    """One model with one context of one sequence. Not for concurrent use."""

    def __init__(self, path: Path, context: int = 1024) -> None:
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise FileNotFoundError(f"{path} is no model that llama.cpp can load")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = context
        parameters.n_threads = parameters.n_threads_batch = 1
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._size = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self._limit = context

    def chat_template(self) -> str:
        """The template that the file carries."""
        return (llama_cpp.llama_model_chat_template(self._model, None) or b"").decode()

    def tokenize(self, text: str) -> list[int]:
        """Token ids; the marks of the template become single tokens."""
        data = text.encode()
        room = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), room, len(room), False, True)
        return list(room[:count])

    def piece(self, token: int) -> bytes:
        """The bytes that a token prints, control tokens none."""
        room = ctypes.create_string_buffer(256)
        count = llama_cpp.llama_token_to_piece(self._vocab, token, room, len(room), 0, False)
        return room.raw[: max(count, 0)]

    def greedy(self, prompt: str, limit: int = 400) -> Answer:
        """The most probable token each time, up to `limit` tokens or the end of the context."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        pending = self.tokenize(prompt)
        used, text, margin, stopped, count = 0, b"", float("inf"), False, 0
        while count < limit and used + len(pending) <= self._limit:
            logits = self._decode(pending)
            used += len(pending)
            second, first = np.argsort(logits)[-2:]
            margin = min(margin, float(logits[first] - logits[second]))
            count += 1
            if llama_cpp.llama_vocab_is_eog(self._vocab, int(first)):
                stopped = True
                break
            text += self.piece(int(first))
            pending = [int(first)]
        return Answer(text.decode(errors="replace"), count, stopped, margin)

    def _decode(self, tokens: list[int]) -> NDArray[np.float32]:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(
            self._context, llama_cpp.llama_batch_get_one(array, len(tokens))
        )
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, shape=(self._size,)).copy()

    def close(self) -> None:
        """Free the context and the model."""
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)
