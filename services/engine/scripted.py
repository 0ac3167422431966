"""A backend without llama.cpp: the same prompt always gets the same text, at the speed asked for.

For tests, benches and demos of all that stands above a model. The KV of each sequence is kept as a list of tokens and every
batch is checked against it, so a scheduler that skips or repeats a position fails here.
"""

from __future__ import annotations

import threading
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl

import numpy as np

from services.engine.backend import (
    Batch,
    CacheSupport,
    DecodeError,
    Logits,
    ModelError,
    ModelFacts,
    Progress,
    StateError,
)
from services.engine.sampling import SamplingSpec
from services.engine.scripted_vocabulary import (
    MESSAGE_END,
    MESSAGE_START,
    SIZE_MIN,
    WORD_COUNT,
    WORDS_FROM,
    ScriptedVocabulary,
)
from services.runtime.errors import CaravanError

PREFIX: Final = "scripted:"
_CERTAIN: Final = np.float32(100.0)
_STATE_MAGIC: Final = 0x53435231
_NOT_NEGATIVE: Final = (
    "step_ms",
    "prefill_ms_per_token",
    "load_ms",
    "fail_at",
    "stall_at",
    "stall_ms",
)


@dataclass(frozen=True)
class Script:
    """How the backend behaves; each field is a key of `scripted:?key=value&...`.

    step_ms and prefill_ms_per_token are the time of a batch; tokens is the length of an answer before its end; text, if
    set, is the answer instead; load_ms the time to load; fail_at the number of the decode call that fails (0: none), stall_at
    of one that takes stall_ms more; load_error a message with which loading fails.
    """

    step_ms: float = 0
    prefill_ms_per_token: float = 0
    tokens: int = 64
    text: str = ""
    vocab: int = SIZE_MIN
    load_ms: float = 0
    context: int = 4096
    fail_at: int = 0
    stall_at: int = 0
    stall_ms: float = 0
    load_error: str = ""

    @classmethod
    def parse(cls, path: str) -> Script:
        """From `scripted:?key=value&...`. Raises ValueError."""
        query = path.removeprefix(PREFIX).removeprefix("?")
        kinds = {"text": str, "load_error": str} | dict.fromkeys(
            ("step_ms", "prefill_ms_per_token", "load_ms", "stall_ms"), float
        )
        values: dict[str, object] = {}
        for key, value in parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)):
            if key not in cls.__dataclass_fields__:
                raise ValueError(f"the scripted backend has no {key!r}")
            try:
                values[key] = kinds.get(key, int)(value)
            except ValueError:
                raise ValueError(f"{key}={value!r} is not a number") from None
        script = cls(**values)  # type: ignore[arg-type]
        least = min(getattr(script, name) for name in _NOT_NEGATIVE)
        if least < 0 or script.tokens < 1 or script.context < 16:
            raise ValueError("a number is too small")
        if script.vocab < SIZE_MIN:
            raise ValueError(f"vocab must be at least {SIZE_MIN}")
        return script


@dataclass(frozen=True)
class ScriptedShape:
    """What a context is made with; see Limits. `context_tokens` 0 is what the script says."""

    max_sequences: int
    context_tokens: int
    cells: int
    batch_tokens: int
    residents: int = 0


class ScriptedBackend:
    """The next token is certain: all logits are 0 except one."""

    def __init__(self, script: Script, shape: ScriptedShape, progress: Progress) -> None:
        self._script = script
        self._pause = threading.Event()
        for share in range(1, 5):
            self._wait(script.load_ms / 4)
            progress(share / 4)
        if script.load_error:
            raise ModelError(script.load_error)
        self._vocabulary = ScriptedVocabulary(script.vocab)
        context = shape.context_tokens or script.context
        self._facts = ModelFacts(
            description="scripted",
            context_tokens=context,
            vocabulary_tokens=script.vocab,
            weight_bytes=0,
            max_sequences=shape.max_sequences,
            cells=shape.cells or context * shape.max_sequences,
            batch_tokens=shape.batch_tokens,
            chat_template=None,
            bos_text="",
            eos_text="<|im_end|>",
            quant="scripted",
            context_identity={"backend": "scripted"},
            cache_support=CacheSupport.BLOCKS,
            cache_note="",
            cell_bytes=4,
        )
        self._kv: list[list[int]] = [[] for _ in range(shape.max_sequences + shape.residents)]
        self._answers: dict[int, tuple[int, list[int]]] = {}
        self._logits = np.zeros((shape.max_sequences, script.vocab), np.float32)
        self._certain: list[int] = []
        self._calls = 0

    @property
    def facts(self) -> ModelFacts:
        """What the model is."""
        return self._facts

    @property
    def vocabulary(self) -> ScriptedVocabulary:
        """Its vocabulary."""
        return self._vocabulary

    def decode(self, batch: Batch) -> None:
        """Takes the time of a batch and says what comes next."""
        self._calls += 1
        if self._calls == self._script.fail_at:
            raise DecodeError(-3, "the script says so")
        if self._calls == self._script.stall_at:
            self._wait(self._script.stall_ms)
        kv = self._kv
        for token, position, slot in zip(batch.tokens, batch.positions, batch.slots, strict=True):
            held = kv[slot]
            if position != len(held):
                raise DecodeError(-1, f"position {position} of {slot}, which holds {len(held)}")
            if slot in self._answers and token != self._next_token(slot):
                # Not what was said: the slot goes on with another prompt.
                del self._answers[slot]
            held.append(token)
        self._set_logits([self._next_token(batch.slots[row]) for row in batch.outputs])
        prefill = max(0, len(batch.tokens) - len(batch.outputs))
        self._wait(self._script.step_ms + prefill * self._script.prefill_ms_per_token)

    def _set_logits(self, certain: list[int]) -> None:
        logits, before = self._logits, self._certain
        logits[range(len(before)), before] = 0
        logits[range(len(certain)), certain] = _CERTAIN
        self._certain = certain

    def _next_token(self, slot: int) -> int:
        held = self._kv[slot]
        answer = self._answers.get(slot)
        if answer is None:
            answer = self._answers[slot] = self._write_answer(held)
        start, script = answer
        # Past its end the answer begins again, for requests that ignore the end.
        return script[(len(held) - start) % len(script)]

    def _write_answer(self, held: list[int]) -> tuple[int, list[int]]:
        """Start and tokens of the answer to what is held: a chat's answer starts after the last header, so that a prompt
        with a part of the answer is continued, and not answered anew."""
        start = len(held)
        header = len(self._vocabulary.tokenize("assistant\n", parse_special=False)) + 1
        if MESSAGE_START in held:
            last = len(held) - 1 - held[::-1].index(MESSAGE_START)
            start = min(start, last + header)
        if self._script.text:
            words = self._vocabulary.tokenize(self._script.text, parse_special=False)
            return start, [*words, MESSAGE_END]
        seed = zlib.crc32(b"".join(token.to_bytes(4, "little") for token in held[:start]))
        words = [
            WORDS_FROM + zlib.crc32(index.to_bytes(4, "little"), seed) % WORD_COUNT
            for index in range(self._script.tokens)
        ]
        return start, [*words, MESSAGE_END]

    def logits(self) -> Logits:
        """Logits of the last decode."""
        return self._logits[: len(self._certain)]

    def sampler(self, spec: SamplingSpec) -> ScriptedSampler:
        """A sampler that heeds bias and penalties; temperature and filters leave what is certain as it is."""
        self.check(spec)
        return ScriptedSampler(self, spec)

    def check(self, spec: SamplingSpec) -> None:
        """Refuses grammars: there is no llama.cpp to follow them."""
        if spec.grammar:
            raise CaravanError(
                "UNSUPPORTED_FIELD",
                "The scripted model follows no grammar.",
                param="sampling.grammar",
            )

    def clear(self, slot: int) -> None:
        """Forgets a sequence."""
        self.cut(slot, 0)

    def cut(self, slot: int, end: int) -> None:
        """Forgets the end of a sequence."""
        del self._kv[slot][end:]
        self._answers.pop(slot, None)

    def share(self, source: int, target: int, end: int) -> None:
        """Copies the tokens: there are no cells to share."""
        assert not self._kv[target]
        self._kv[target] = self._kv[source][:end]

    def pack(self, slot: int, start: int, end: int) -> memoryview:
        """The tokens as numbers, after a mark and their place."""
        tokens = self._kv[slot][start:end]
        if len(tokens) != end - start:
            raise StateError(f"slot {slot} does not hold [{start}, {end})")
        return memoryview(array("I", [_STATE_MAGIC, start, *tokens]).tobytes())

    def join(self, slot: int, state: memoryview, start: int, end: int, whole_end: int) -> None:
        """Appends tokens of what `pack` made."""
        if len(state) % 4 or len(state) < 8:
            raise StateError("the state is cut off")
        mark, first, *tokens = array("I", bytes(state))
        if mark != _STATE_MAGIC or first + len(tokens) != whole_end or first > start:
            raise StateError("the state is not of these tokens")
        assert len(self._kv[slot]) == start
        self._kv[slot] += tokens[start - first : end - first]

    def close(self) -> None:
        """Nothing to free."""

    def _wait(self, milliseconds: float) -> None:
        if milliseconds > 0:
            self._pause.wait(milliseconds / 1000)


class ScriptedSampler:
    """Chooses the likeliest token after bias and penalties."""

    def __init__(self, backend: ScriptedBackend, spec: SamplingSpec) -> None:
        self._backend = backend
        self._spec = spec
        self._counts: dict[int, int] = {}

    def choose(self, output: int, position: int) -> int:
        """The likeliest token."""
        spec = self._spec
        row = self._backend.logits()[output]
        if spec.logit_bias or spec.penalized:
            row = row.copy()
            for token, bias in spec.logit_bias:
                row[token] += bias
            for token, count in self._counts.items():
                scale = spec.repeat_penalty if row[token] <= 0 else 1 / spec.repeat_penalty
                row[token] *= scale
                row[token] -= spec.presence_penalty + count * spec.frequency_penalty
        token = int(row.argmax())
        self.resume((token,))
        return token

    def resume(self, tokens: Sequence[int]) -> None:
        """Goes on behind tokens that were chosen elsewhere."""
        for token in tokens:
            self._counts[token] = self._counts.get(token, 0) + 1

    def close(self) -> None:
        """Nothing to free."""
