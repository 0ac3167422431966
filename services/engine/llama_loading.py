"""Loads a GGUF file into a LlamaBackend, or says in plain words why it cannot be served."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import llama_cpp

from services.engine.backend import Batch, Loader, ModelError, ModelFacts, Progress
from services.engine.llama import LlamaBackend, LlamaVocabulary, model_meta, model_text
from services.engine.llama_state import cache_support, context_identity, quant_name
from services.engine.settings import EngineSettings, physical_cores
from services.engine.state_check import settle_cache_support
from services.engine.threads import thread_choice

_LOG = logging.getLogger("llama.cpp")
CONTEXT_TOKENS_DEFAULT_MAX: Final = 8192
KV_BYTES_DEFAULT_MAX: Final = 1 << 30
CELLS_STEP: Final = 256
_ERROR_LEVEL: Final = 4
_CONTINUED_LEVEL: Final = 5
_EMBEDDERS: Final = frozenset(
    {
        "bert",
        "modern-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "neo-bert",
        "jina-bert-v2",
        "jina-bert-v3",
        "gemma-embedding",
    }
)


class _Log:
    """Keeps llama.cpp's errors; everything else it says is of no interest."""

    def __init__(self) -> None:
        self.last_error = ""
        # Kept, since llama.cpp holds the pointer for the life of the process.
        self.callback = llama_cpp.llama_log_callback(self._receive)
        self._level = 0

    def _receive(self, level: int, text: bytes, _user_data: object) -> None:
        self._level = self._level if level == _CONTINUED_LEVEL else level
        message = text.decode(errors="replace").strip()
        if not message:
            return
        if self._level == _ERROR_LEVEL:
            self.last_error = message
            _LOG.error("%s", message)
        else:
            _LOG.debug("%s", message)


_log = _Log()


@dataclass(frozen=True)
class _Shape:
    context_tokens: int
    cells: int


def open_model(settings: EngineSettings) -> Loader:
    """A loader of the GGUF file of the settings."""

    def load(progress: Progress) -> LlamaBackend:
        return _load(settings, progress)

    return load


def _load(settings: EngineSettings, progress: Progress) -> LlamaBackend:
    path = Path(settings.model.path)
    _check_file(path)
    llama_cpp.llama_log_set(_log.callback, None)
    llama_cpp.llama_backend_init()
    model = _load_model(path, progress)
    try:
        _check_kind(model)
        shape = _shape(model, settings)
        context = _make_context(model, shape, settings)
    except ModelError:
        llama_cpp.llama_model_free(model)
        raise
    vocabulary = LlamaVocabulary(llama_cpp.llama_model_get_vocab(model))
    facts = _facts(model, vocabulary, shape, settings)
    backend = LlamaBackend(
        model,
        context,
        facts,
        vocabulary,
        thread_choice(settings.threads, facts.weight_bytes),
        scratch=settings.slots,
    )
    # The first decode touches every weight and makes the compute buffers: nobody's request should wait for that.
    backend.decode(Batch([vocabulary.bos_token or 0], [0], [0], [0]))
    backend.clear(0)
    settle_cache_support(backend)
    return backend


def _check_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"the file cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise ModelError("the file is not a GGUF file")


def _load_model(path: Path, progress: Progress) -> Any:
    def report(share: float, _user_data: object) -> bool:
        progress(share)
        return True

    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    # Held in a variable until the load is done: llama.cpp has only its address.
    callback = llama_cpp.llama_progress_callback(report)
    parameters.progress_callback = callback
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise ModelError(f"llama.cpp does not load the file: {_log.last_error}")
    return model


def _check_kind(model: Any) -> None:
    architecture = model_meta(model, "general.architecture")
    if llama_cpp.llama_model_has_encoder(model) or not llama_cpp.llama_model_has_decoder(model):
        raise ModelError(f"models with an encoder are not served ({architecture})")
    if (
        architecture in _EMBEDDERS
        or model_meta(model, f"{architecture}.attention.causal") == "false"
    ):
        raise ModelError(f"the model makes embeddings, not text ({architecture})")
    if llama_cpp.llama_model_is_diffusion(model):
        raise ModelError(f"diffusion models are not served ({architecture})")
    if llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)) <= 0:
        raise ModelError("the file has no vocabulary")


def _shape(model: Any, settings: EngineSettings) -> _Shape:
    trained = int(llama_cpp.llama_model_n_ctx_train(model)) or CONTEXT_TOKENS_DEFAULT_MAX
    context = settings.context_tokens or min(trained, CONTEXT_TOKENS_DEFAULT_MAX)
    if settings.cells:
        cells = settings.cells
    else:
        affordable = KV_BYTES_DEFAULT_MAX // _cell_bytes(model)
        cells = max(context, min(context * settings.max_sequences, affordable))
    cells = -(-cells // CELLS_STEP) * CELLS_STEP
    return _Shape(min(context, cells), cells)


def _cell_bytes(model: Any) -> int:
    """Bytes of one token's keys and values in f16, as if all layers attended: an upper bound for hybrid models."""
    if llama_cpp.llama_model_is_recurrent(model):
        return 1  # There is a state per sequence, and nothing per token.
    architecture = model_meta(model, "general.architecture")
    heads = max(1, int(llama_cpp.llama_model_n_head(model)))
    head_size = int(llama_cpp.llama_model_n_embd(model)) // heads
    key = int(model_meta(model, f"{architecture}.attention.key_length") or head_size)
    value = int(model_meta(model, f"{architecture}.attention.value_length") or head_size)
    groups = max(1, int(llama_cpp.llama_model_n_head_kv(model)))
    return max(1, int(llama_cpp.llama_model_n_layer(model)) * groups * (key + value) * 2)


def _make_context(model: Any, shape: _Shape, settings: EngineSettings) -> Any:
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = shape.cells
    parameters.n_batch = settings.batch_tokens
    parameters.n_ubatch = settings.batch_tokens
    # One more than there are slots, in which state is cut out and put together.
    parameters.n_seq_max = settings.slots + 1
    # One row of logits per sequence and batch; without this, compute buffers hold one for every token. llama.cpp takes no
    # less than n_seq_max.
    parameters.n_outputs_max = settings.slots + 1
    parameters.kv_unified = True
    parameters.n_threads = settings.threads or physical_cores()
    parameters.n_threads_batch = parameters.n_threads
    parameters.no_perf = True
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        raise ModelError(
            f"llama.cpp makes no context of {shape.cells} cells: {_log.last_error or 'no reason given'}"
        )
    return context


def _facts(
    model: Any, vocabulary: LlamaVocabulary, shape: _Shape, settings: EngineSettings
) -> ModelFacts:
    vocab = vocabulary.pointer
    template: bytes | None = llama_cpp.llama_model_chat_template(model, None)
    support, note = cache_support(model)
    return ModelFacts(
        description=_description(model),
        context_tokens=shape.context_tokens,
        vocabulary_tokens=vocabulary.size,
        weight_bytes=int(llama_cpp.llama_model_size(model)),
        max_sequences=settings.max_sequences,
        cells=shape.cells,
        batch_tokens=settings.batch_tokens,
        chat_template=template.decode(errors="replace") if template else None,
        bos_text=vocabulary.text(llama_cpp.llama_vocab_bos(vocab)),
        eos_text=vocabulary.text(llama_cpp.llama_vocab_eos(vocab)),
        quant=quant_name(model),
        context_identity=context_identity(model),
        cache_support=support,
        cache_note=note,
        cell_bytes=_cell_bytes(model),
    )


def _description(model: Any) -> str:
    return model_text(lambda buffer, size: llama_cpp.llama_model_desc(model, buffer, size))
