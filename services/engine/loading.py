"""Which backend serves a model path."""

from __future__ import annotations

from collections.abc import Callable

from services.engine.backend import Backend, CacheSupport, Loader, Progress
from services.engine.batching import Limits
from services.engine.kv.keys import BLOCK_TOKENS
from services.engine.scripted import PREFIX, Script, ScriptedBackend, ScriptedShape
from services.engine.settings import EngineSettings


def loader(settings: EngineSettings) -> Loader:
    """Loads the model of the settings. Raises ValueError where a scripted path is wrong."""
    if settings.model.path.startswith(PREFIX):
        return _scripted(Script.parse(settings.model.path), settings)
    # Late: llama.cpp loads its thread library, which reads its settings then; see prepare_threads.
    from services.engine.llama_loading import open_model

    return open_model(settings)


def _scripted(script: Script, settings: EngineSettings) -> Loader:
    shape = ScriptedShape(
        settings.max_sequences,
        settings.context_tokens,
        settings.cells,
        settings.batch_tokens,
        settings.slots - settings.max_sequences,
    )

    def load(progress: Progress) -> Backend:
        return ScriptedBackend(script, shape, progress)

    return load


def limits(settings: EngineSettings) -> Callable[[Backend], Limits]:
    """The limits of a loaded model's scheduler."""

    def make(backend: Backend) -> Limits:
        facts = backend.facts
        resident_cells = settings.resident_cells or max(facts.cells // 16, facts.context_tokens)
        return Limits(
            max_sequences=facts.max_sequences,
            cells=facts.cells,
            batch_tokens=settings.batch_tokens,
            block_tokens=BLOCK_TOKENS,
            chunk_tokens=settings.chunk_tokens,
            max_waiting=settings.max_waiting,
            min_shared=settings.kv_min_tokens,
            residents=settings.slots - facts.max_sequences,
            resident_cells=resident_cells,
            session_s=settings.session_seconds,
            swap_bytes=settings.swap_bytes,
            whole_states=facts.cache_support is CacheSupport.WHOLE,
        )

    return make
