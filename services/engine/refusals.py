"""The errors with which the decode thread and the engine end a request. Pure."""

from __future__ import annotations

from services.engine.backend import DecodeError
from services.engine.job import Work
from services.runtime.errors import CaravanError

_RETRY_S = 1.0


def draining() -> CaravanError:
    """Another engine is to take the request, or to go on with it."""
    return CaravanError("DRAINING", "The engine is being drained.", retry_after_s=_RETRY_S)


def loading(model: str) -> CaravanError:
    """The model is not there yet."""
    return CaravanError(
        "MODEL_LOADING",
        f"The model {model!r} is still being loaded.",
        retry_after_s=_RETRY_S,
        model=model,
    )


def invalid_model(model: str, path: str, why: str) -> CaravanError:
    """The model will never be there."""
    return CaravanError(
        "MODEL_INVALID", f"The model {model!r} could not be loaded: {why}", path=path
    )


def full() -> CaravanError:
    """The queue of the scheduler holds as many as it may."""
    return CaravanError("CAPACITY_EXHAUSTED", "The engine is full.", retry_after_s=_RETRY_S)


def too_large(work: Work, cells: int) -> CaravanError:
    """The request needs more cells than there are."""
    return CaravanError(
        "CONTEXT_LENGTH_EXCEEDED",
        f"The prompt of {work.prompt_tokens} tokens with {work.max_tokens} tokens of answer does not fit into the {cells} cells "
        "of this engine.",
        param="max_tokens",
        prompt_tokens=str(work.prompt_tokens),
        context_tokens=str(cells),
    )


def decode_failed(error: DecodeError, message: str) -> CaravanError:
    """llama.cpp did not take a batch, or allows no token."""
    return CaravanError("DECODE_FAILED", message, code=str(error.code))


def defect() -> CaravanError:
    """The engine is wrong."""
    return CaravanError("INTERNAL", "The engine failed; its log has the details.")
