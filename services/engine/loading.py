"""Which backend serves a model path."""

from __future__ import annotations

from collections.abc import Callable

from services.engine.backend import Backend, Loader, Progress
from services.engine.scheduler import Limits
from services.engine.scripted import PREFIX, Script, ScriptedBackend, ScriptedShape
from services.engine.settings import EngineSettings

BLOCK_TOKENS = 256


def loader(settings: EngineSettings) -> Loader:
    """Loads the model of the settings. Raises ValueError where a scripted path is wrong."""
    if settings.model.path.startswith(PREFIX):
        return _scripted(Script.parse(settings.model.path), settings)
    # Late: llama.cpp loads its thread library, which reads its settings then; see prepare_threads.
    from services.engine.llama_loading import open_model

    return open_model(settings)


def _scripted(script: Script, settings: EngineSettings) -> Loader:
    shape = ScriptedShape(
        settings.max_sequences, settings.context_tokens, settings.cells, settings.batch_tokens
    )

    def load(progress: Progress) -> Backend:
        return ScriptedBackend(script, shape, progress)

    return load


def limits(settings: EngineSettings) -> Callable[[Backend], Limits]:
    """The limits of a loaded model's scheduler."""

    def make(backend: Backend) -> Limits:
        return Limits(
            max_sequences=backend.facts.max_sequences,
            cells=backend.facts.cells,
            batch_tokens=settings.batch_tokens,
            block_tokens=BLOCK_TOKENS,
            chunk_tokens=settings.chunk_tokens,
            max_waiting=settings.max_waiting,
        )

    return make
