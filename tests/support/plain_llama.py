"""The plainest way to run a model: one llama_decode per token, nothing of the engine."""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _silent(_level: int, _text: bytes, _data: object) -> None:
    """Nobody reads llama.cpp's log in a test."""


_NO, _YES = False, True


class PlainLlama:
    """A GGUF file in a context of one sequence."""

    def __init__(self, path: str, context: int = 1024) -> None:
        llama_cpp.llama_log_set(_silent, None)
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        self._model: Any = llama_cpp.llama_model_load_from_file(path.encode(), model)
        assert self._model, path
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._size = llama_cpp.llama_vocab_n_tokens(self._vocab)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = context
        parameters.n_threads = parameters.n_threads_batch = 1
        self._context: Any = llama_cpp.llama_init_from_model(self._model, parameters)

    def close(self) -> None:
        """Frees everything."""
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def tokens(self, text: str) -> list[int]:
        """Tokens of a rendered prompt."""
        raw = text.encode()
        room = (llama_cpp.llama_token * (len(raw) + 8))()
        count = llama_cpp.llama_tokenize(
            self._vocab,
            raw,
            len(raw),
            room,
            len(room),
            _NO,
            _YES,
        )
        return list(room[:count])

    def greedy(self, prompt: list[int], most: int) -> list[int]:
        """The likeliest continuation, its end token included."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), 0, -1, -1)
        tokens, answer = list(prompt), list[int]()
        while len(answer) < most:
            array = (llama_cpp.llama_token * len(tokens))(*tokens)
            batch = llama_cpp.llama_batch_get_one(array, len(tokens))
            assert llama_cpp.llama_decode(self._context, batch) == 0
            pointer = llama_cpp.llama_get_logits_ith(self._context, -1)
            token = int(np.ctypeslib.as_array(pointer, (self._size,)).argmax())
            answer.append(token)
            if llama_cpp.llama_vocab_is_eog(self._vocab, token):
                break
            tokens = [token]
        return answer
