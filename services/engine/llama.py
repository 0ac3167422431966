"""llama.cpp through ctypes: vocabulary and context. Above this module nobody knows a pointer.

llama_loading.py makes these objects and llama_sampler.py chooses tokens; no other module calls llama.cpp.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import llama_cpp
import numpy as np

from services.engine.backend import (
    Batch,
    CacheSupport,
    DecodeError,
    Logits,
    ModelFacts,
    StateError,
)
from services.engine.llama_sampler import LlamaSampler, check_grammar
from services.engine.sampling import SamplingSpec

Pointer = Any
_PIECE_BYTES: Final = 256
_TEXT_BYTES: Final = 4096
_NO: Final = False


class LlamaVocabulary:
    """The vocabulary of a loaded model. Read-only, so safe for any thread while the model lives."""

    def __init__(self, vocab: Pointer) -> None:
        self.pointer = vocab
        self._size = int(llama_cpp.llama_vocab_n_tokens(vocab))
        self._bytes: list[bytes | None] = [None] * self._size
        attributes = [llama_cpp.llama_vocab_get_attr(vocab, token) for token in range(self._size)]
        parsed = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
        self._control = tuple(
            self.text(token) for token in range(self._size) if attributes[token] & parsed
        )
        self._eog = frozenset(
            token for token in range(self._size) if llama_cpp.llama_vocab_is_eog(vocab, token)
        )
        bos = int(llama_cpp.llama_vocab_bos(vocab))
        self._bos = bos if bos >= 0 and llama_cpp.llama_vocab_get_add_bos(vocab) else None

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self._size

    @property
    def eog_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self._eog

    @property
    def bos_token(self) -> int | None:
        """The token that the model wants before every prompt."""
        return self._bos

    @property
    def control_texts(self) -> Sequence[str]:
        """Texts of the tokens that llama_tokenize makes with parse_special only."""
        return self._control

    def text(self, token: int) -> str:
        """The text of a token as the file has it; "" for no token (-1)."""
        if not 0 <= token < self._size:
            return ""
        raw: bytes = llama_cpp.llama_vocab_get_text(self.pointer, token) or b""
        return raw.decode(errors="replace")

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        """Tokens of a text, without BOS and EOS."""
        raw = text.encode()
        # No token is shorter than a byte; a few more for the space that some models put in front.
        tokens = np.empty(len(raw) + 16, np.int32)
        pointer = tokens.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
        count = llama_cpp.llama_tokenize(
            self.pointer, raw, len(raw), pointer, len(tokens), _NO, parse_special
        )
        assert count >= 0, "there is a place for every byte"
        result: list[int] = tokens[:count].tolist()
        return result

    def token_bytes(self, token: int) -> bytes:
        """Bytes of a token; b"" for control tokens."""
        found = self._bytes[token]
        if found is None:
            found = self._bytes[token] = self._piece(token)
        return found

    def _piece(self, token: int) -> bytes:
        size = _PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = llama_cpp.llama_token_to_piece(self.pointer, token, buffer, size, 0, _NO)
            if count >= 0:
                return buffer.raw[:count]
            size = -count


ThreadChoice = Callable[[], int]
"""Asked before each batch how many threads are to compute it."""


class LlamaBackend:
    """A model with its context. Calls come from the thread that made it, or fail (invariant I3)."""

    def __init__(
        self,
        model: Pointer,
        context: Pointer,
        facts: ModelFacts,
        vocabulary: LlamaVocabulary,
        threads: ThreadChoice,
        *,
        scratch: int,
    ) -> None:
        self._thread = threading.get_ident()
        self._model = model
        self._context = context
        self._facts = facts
        self._vocabulary = vocabulary
        self._threads = threads
        self._threads_set = 0
        # A sequence of its own, in which state is cut out and put together; empty between calls.
        self._scratch = scratch
        self._memory = llama_cpp.llama_get_memory(context)
        self._outputs: list[int] = []
        self._views: dict[tuple[int, int], Logits] = {}
        self._closed = False
        self._make_batch(facts.batch_tokens)

    def _make_batch(self, capacity: int) -> None:
        """One batch for the life of the context; its arrays are numpy's, so that a slice assignment fills them."""
        self._tokens = np.zeros(capacity, np.int32)
        self._positions = np.zeros(capacity, np.int32)
        self._slots = np.zeros(capacity, np.int32)
        self._wanted = np.zeros(capacity, np.int8)
        self._one_slot_each = np.ones(capacity, np.int32)
        # llama_batch.seq_id is an array of pointers, one per token, each to that token's sequences.
        self._slot_pointers = self._slots.ctypes.data + 4 * np.arange(capacity, dtype=np.uintp)
        integers = ctypes.POINTER(ctypes.c_int32)
        batch: Any = llama_cpp.llama_batch()
        batch.token = self._tokens.ctypes.data_as(integers)
        batch.pos = self._positions.ctypes.data_as(integers)
        batch.n_seq_id = self._one_slot_each.ctypes.data_as(integers)
        batch.seq_id = self._slot_pointers.ctypes.data_as(ctypes.POINTER(integers))
        batch.logits = self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        self._batch = batch

    @property
    def facts(self) -> ModelFacts:
        """What the model is."""
        return self._facts

    def limit_cache(self, support: CacheSupport, note: str) -> None:
        """Its state cannot be cached as it seemed; `note` says why."""
        self._facts = replace(self._facts, cache_support=support, cache_note=note)

    @property
    def vocabulary(self) -> LlamaVocabulary:
        """Its vocabulary."""
        return self._vocabulary

    def decode(self, batch: Batch) -> None:
        """Runs llama_decode. Raises DecodeError."""
        self._check_thread()
        count = len(batch.tokens)
        self._tokens[:count] = batch.tokens
        self._positions[:count] = batch.positions
        self._slots[:count] = batch.slots
        self._wanted[:count] = 0
        self._wanted[batch.outputs] = 1
        self._batch.n_tokens = count
        self._outputs = batch.outputs
        if (threads := self._threads()) != self._threads_set:
            self._threads_set = threads
            llama_cpp.llama_set_n_threads(self._context, threads, threads)
        code = llama_cpp.llama_decode(self._context, self._batch)
        if code != 0:
            raise DecodeError(code, f"llama_decode of {count} tokens returned {code}")

    def logits(self) -> Logits:
        """Logits of the last decode, as llama.cpp holds them: no copy."""
        self._check_thread()
        pointer = llama_cpp.llama_get_logits(self._context)
        key = (ctypes.addressof(pointer.contents), len(self._outputs))
        view = self._views.get(key)
        if view is None:
            if len(self._views) > 2 * self._facts.max_sequences:
                # The buffer moved: views of the old one are of no use any more.
                self._views.clear()
            view = np.ctypeslib.as_array(pointer, (key[1], self._facts.vocabulary_tokens))
            self._views[key] = view
        return view

    def sampler(self, spec: SamplingSpec) -> LlamaSampler:
        """A sampler for one request."""
        self._check_thread()
        return LlamaSampler(self._vocabulary.pointer, self._vocabulary.size, self.logits, spec)

    def check(self, spec: SamplingSpec) -> None:
        """Raises INVALID_VALUE for a grammar that llama.cpp does not take. Any thread: it reads the vocabulary only."""
        if spec.grammar:
            check_grammar(self._vocabulary.pointer, spec.grammar)

    def clear(self, slot: int) -> None:
        """Frees the cells of a sequence."""
        self.cut(slot, 0)

    def cut(self, slot: int, end: int) -> None:
        """Frees the cells of a sequence from token `end` on."""
        self._check_thread()
        llama_cpp.llama_memory_seq_rm(self._memory, slot, end, -1)

    def share(self, source: int, target: int, end: int) -> None:
        """Marks cells as held by a second sequence."""
        self._check_thread()
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, 0, end)

    def pack(self, slot: int, start: int, end: int) -> memoryview:
        """The state of tokens [start, end), which for a moment are a sequence of their own if the state can be cut."""
        self._check_thread()
        if self._facts.cache_support is not CacheSupport.BLOCKS:
            if start or end != self.held_positions(slot):
                raise StateError("the state cannot be cut")
            return self._state_of(slot)
        llama_cpp.llama_memory_seq_cp(self._memory, slot, self._scratch, start, end)
        try:
            return self._state_of(self._scratch)
        finally:
            self.clear(self._scratch)

    def _state_of(self, sequence: int) -> memoryview:
        size = llama_cpp.llama_state_seq_get_size(self._context, sequence)
        state = np.empty(size, np.uint8)
        written = llama_cpp.llama_state_seq_get_data(
            self._context, _bytes_pointer(state), size, sequence
        )
        if written != size:
            raise StateError(f"llama.cpp wrote {written} of {size} bytes")
        return memoryview(state.data)

    def join(self, slot: int, state: memoryview, start: int, end: int, whole_end: int) -> None:
        """Restores tokens [start, end): all of the state into the scratch sequence, and from there what is wanted."""
        self._check_thread()
        if self._facts.cache_support is not CacheSupport.BLOCKS:
            self._join_whole(slot, state, end)
            return
        try:
            self._put_state(self._scratch, state, whole_end)
            # Positions stand in the state: cells of other tokens must not get into this sequence.
            if not 0 <= llama_cpp.llama_memory_seq_pos_min(self._memory, self._scratch) <= start:
                raise StateError("the state begins too late")
            llama_cpp.llama_memory_seq_cp(self._memory, self._scratch, slot, start, end)
        finally:
            self.clear(self._scratch)

    def _join_whole(self, slot: int, state: memoryview, end: int) -> None:
        if self.held_positions(slot):
            raise StateError("the sequence is not empty")
        try:
            self._put_state(slot, state, end)
        except StateError:
            self.clear(slot)
            raise

    def _put_state(self, sequence: int, state: memoryview, end: int) -> None:
        data = np.frombuffer(state, np.uint8)
        read = llama_cpp.llama_state_seq_set_data(
            self._context, _bytes_pointer(data), len(data), sequence
        )
        if read != len(data):
            raise StateError("llama.cpp does not take the state")
        if self.held_positions(sequence) != end:
            raise StateError("the state is not of these tokens")

    def held_positions(self, slot: int) -> int:
        """How many positions the KV of a sequence holds."""
        self._check_thread()
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, slot)) + 1

    def close(self) -> None:
        """Frees the context."""
        self._check_thread()
        if self._closed:
            return
        self._closed = True
        self._views.clear()
        llama_cpp.llama_free(self._context)
        # The model stays until the process ends: worker threads may still be reading its vocabulary.

    def _check_thread(self) -> None:
        assert threading.get_ident() == self._thread, "llama.cpp is called from its own thread only"


def _bytes_pointer(data: Any) -> Pointer:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def model_text(read: Callable[[Any, int], int]) -> str:
    """Text that a function of llama.cpp writes into a buffer of a given size; "" where it has none."""
    buffer = ctypes.create_string_buffer(_TEXT_BYTES)
    count = read(buffer, _TEXT_BYTES)
    return buffer.value.decode(errors="replace") if count > 0 else ""


def model_meta(model: Pointer, key: str) -> str:
    """A value of the model file as text; "" where it has none."""
    return model_text(
        lambda buffer, size: llama_cpp.llama_model_meta_val_str(model, key.encode(), buffer, size)
    )
