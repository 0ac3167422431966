"""A plain `llama_decode` loop: the speed that the hardware and llama.cpp allow, with nothing around it.

It runs as a process of its own (contestants.raw_loop), because OpenMP reads its environment once, when the library
is loaded.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import llama_cpp
import numpy as np
import numpy.typing as npt

BATCH_ROWS = 512


@dataclass(frozen=True, slots=True)
class RawRun:
    """One run of the loop. Times are in seconds."""

    streams: int
    tokens: int
    wall_s: float
    prefill_s: float
    step_s: list[float]

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over the time from the first prefill to the last token."""
        return self.tokens / self.wall_s


class RawModel:
    """A loaded model with one context and one batch. Not for more than one thread."""

    def __init__(self, path: str, threads: int, sequences: int, cells: int) -> None:
        llama_cpp.llama_backend_init()
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if model is None:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self.vocabulary: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = cells
        params.n_batch = params.n_ubatch = BATCH_ROWS
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(model, params)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(BATCH_ROWS, 0, 1)

    def tokenize(self, text: str) -> list[int]:
        """Returns the ids of `text`, special tokens parsed."""
        data = text.encode()
        room = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), room, len(room), False, True)  # noqa: FBT003
        return list(room[:count])

    def clear(self) -> None:
        """Forgets all sequences."""
        llama_cpp.llama_memory_clear(self._memory, True)  # noqa: FBT003

    def set_threads(self, threads: int) -> None:
        """Changes the thread count of the following decodes."""
        llama_cpp.llama_set_n_threads(self._context, threads, threads)

    def decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Decodes rows of (token, position, sequence, wants logits); at most BATCH_ROWS."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wants) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wants
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")

    def best(self, row: int) -> int:
        """Returns the likeliest token after batch row `row` of the last decode."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, row)
        logits: npt.NDArray[np.float32] = np.ctypeslib.as_array(pointer, (self.vocabulary,))
        return int(logits.argmax())


def prefill(model: RawModel, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Decodes all prompts in full batches and returns the first token of each answer."""
    rows = [
        (token, position, sequence, position == len(prompt) - 1)
        for sequence, prompt in enumerate(prompts)
        for position, token in enumerate(prompt)
    ]
    firsts: list[int] = []
    for start in range(0, len(rows), BATCH_ROWS):
        chunk = rows[start : start + BATCH_ROWS]
        model.decode(chunk)
        firsts += [model.best(i) for i, row in enumerate(chunk) if row[3]]
    return firsts


def generate(model: RawModel, prompts: Sequence[Sequence[int]], tokens: int) -> RawRun:
    """Prefills the prompts together, then decodes `tokens` greedy tokens of each, one batch per step."""
    model.clear()
    started = time.perf_counter()
    current = prefill(model, prompts)
    prefilled = previous = time.perf_counter()
    steps: list[float] = []
    for step in range(tokens - 1):
        model.decode([(token, len(prompts[s]) + step, s, True) for s, token in enumerate(current)])
        current = [model.best(row) for row in range(len(prompts))]
        now = time.perf_counter()
        steps.append(now - previous)
        previous = now
    return RawRun(
        streams=len(prompts),
        tokens=tokens * len(prompts),
        wall_s=previous - started,
        prefill_s=prefilled - started,
        step_s=steps,
    )


def main() -> None:
    """Answers each line {"prompts": [...], "tokens": N} of stdin with one JSON line, so that rounds can be interleaved."""
    parser = argparse.ArgumentParser(prog="python -m bench.rawloop", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--cells", type=int, default=8192)
    args = parser.parse_args()
    model = RawModel(args.model, args.threads, args.sequences, args.cells)
    generate(model, [model.tokenize("warm up")], 4)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [model.tokenize(text) for text in asked["prompts"]]
        print(json.dumps(asdict(generate(model, prompts, asked["tokens"]))), flush=True)


if __name__ == "__main__":
    main()
