"""What the KV state of a loaded model depends on, and how it should be cached."""

from __future__ import annotations

from typing import Any, Final

import llama_cpp

from services.engine.backend import CacheSupport
from services.engine.llama import model_meta

Pointer = Any
_QUANTS: Final = {
    0: "f32",
    1: "f16",
    2: "q4_0",
    3: "q4_1",
    7: "q8_0",
    8: "q5_0",
    9: "q5_1",
    10: "q2_k",
    11: "q3_k_s",
    12: "q3_k_m",
    13: "q3_k_l",
    14: "q4_k_s",
    15: "q4_k_m",
    16: "q5_k_s",
    17: "q5_k_m",
    18: "q6_k",
    19: "iq2_xxs",
    20: "iq2_xs",
    22: "iq3_xs",
    23: "iq3_xxs",
    24: "iq1_s",
    25: "iq4_nl",
    26: "iq3_s",
    27: "iq3_m",
    28: "iq2_s",
    29: "iq2_m",
    30: "iq4_xs",
    31: "iq1_m",
    32: "bf16",
}
"""llama.cpp's file types by their names in the table of quant bytes (S2.3)."""
_ROPE_KEYS: Final = (
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "attention.key_length",
    "attention.value_length",
)


def quant_name(model: Pointer) -> str:
    """The type of the weights; "unknown" where the file does not say one that has a name."""
    kind = model_meta(model, "general.file_type")
    return _QUANTS.get(int(kind), "unknown") if kind.isdecimal() else "unknown"


def cache_support(model: Pointer) -> tuple[CacheSupport, str]:
    """How the state should be cached, and why not in blocks. Whether it can be is tried: see state_check.py."""
    if llama_cpp.llama_model_is_hybrid(model):
        return CacheSupport.WHOLE, "The model has recurrent layers: their state cannot be cut."
    if llama_cpp.llama_model_is_recurrent(model):
        return CacheSupport.WHOLE, "The model is recurrent: its state cannot be cut."
    window = int(llama_cpp.llama_model_n_swa(model))
    if window > 0:
        return (
            CacheSupport.WHOLE,
            f"The model attends to a sliding window of {window} tokens: its state cannot be cut.",
        )
    return CacheSupport.BLOCKS, ""


def context_identity(model: Pointer) -> dict[str, str]:
    """All that the state of a sequence depends on besides the file of the model and its tokens.

    Not the number of cells or sequences, which only say how many fit. The version stands for what no function tells: the
    format of the state and the kernels that computed it.
    """
    parameters = llama_cpp.llama_context_default_params()
    architecture = model_meta(model, "general.architecture")
    identity = {
        "library": f"llama-cpp-python {llama_cpp.__version__}",
        "architecture": architecture,
        "layers": str(llama_cpp.llama_model_n_layer(model)),
        "embedding": str(llama_cpp.llama_model_n_embd(model)),
        "heads": str(llama_cpp.llama_model_n_head(model)),
        "kv_heads": str(llama_cpp.llama_model_n_head_kv(model)),
        "type_k": str(parameters.type_k),
        "type_v": str(parameters.type_v),
        "flash_attention": str(parameters.flash_attn_type),
        "rope_type": str(llama_cpp.llama_model_rope_type(model)),
        "window": str(llama_cpp.llama_model_n_swa(model)),
    }
    for key in _ROPE_KEYS:
        identity[key] = model_meta(model, f"{architecture}.{key}")
    return identity
