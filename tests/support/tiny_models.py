"""Tiny GGUF models with seeded random weights whose state cannot be cut: recurrent, hybrid, sliding window.

Their text is noise, but it depends on all that they read, so a wrong state shows in the next tokens. The tokens are the 256
bytes and three control tokens.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Tensors = dict[str, npt.NDArray[np.float32]]
CONTROL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY: Final = 256 + len(CONTROL) + 1
WIDTH: Final = 32
INNER: Final = 2 * WIDTH
STATE: Final = 8
RANK: Final = 4
CONV: Final = 4
FEED_FORWARD: Final = 48
HEADS: Final = 2
LAYERS: Final = 4
WINDOW: Final = 96
"""Tokens that the sliding layers look back."""
CONTEXT: Final = 4096
_ALIGNMENT: Final = 32


class Kind(Enum):
    """The models, by llama.cpp's names of their architectures."""

    RECURRENT = "mamba"
    HYBRID = "jamba"
    SLIDING_WINDOW = "gemma2"


def write_model(kind: Kind, folder: Path) -> Path:
    """Makes the model in `folder`, a few hundred kilobytes."""
    path = folder / f"{kind.value}.gguf"
    metadata, tensors = _MAKERS[kind](np.random.default_rng(7))
    name = kind.value
    common = {
        "general.architecture": name,
        "general.file_type": 0,
        f"{name}.context_length": CONTEXT,
        f"{name}.embedding_length": WIDTH,
        f"{name}.block_count": LAYERS,
        f"{name}.attention.layer_norm_rms_epsilon": 1e-5,
    }
    own = {f"{name}.{key}": value for key, value in metadata.items()}
    path.write_bytes(_gguf({**common, **own, **_vocabulary()}, tensors))
    return path


def _mamba(rng: np.random.Generator) -> tuple[dict[str, Any], Tensors]:
    tensors = _embedding(rng)
    for layer in range(LAYERS):
        tensors |= {**_norm(layer, "attn_norm"), **_recurrent_layer(rng, layer)}
    return {"attention.head_count": 0, "feed_forward_length": 0, **_SSM}, tensors


def _jamba(rng: np.random.Generator) -> tuple[dict[str, Any], Tensors]:
    tensors = _embedding(rng)
    attends = [layer % 2 == 1 for layer in range(LAYERS)]
    for layer, attention in enumerate(attends):
        tensors |= {**_norm(layer, "attn_norm"), **_norm(layer, "ffn_norm")}
        tensors |= _feed_forward(rng, layer)
        if attention:
            tensors |= _attention(rng, layer)
            continue
        tensors |= _recurrent_layer(rng, layer)
        for part, size in (("dt", RANK), ("b", STATE), ("c", STATE)):
            tensors |= _norm(layer, f"ssm_{part}_norm", size)
    heads = {
        "attention.head_count": HEADS,
        "attention.head_count_kv": [HEADS * attention for attention in attends],
        "feed_forward_length": FEED_FORWARD,
    }
    return {**heads, **_SSM}, tensors


def _gemma2(rng: np.random.Generator) -> tuple[dict[str, Any], Tensors]:
    tensors = _embedding(rng)
    for layer in range(LAYERS):
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            tensors |= _norm(layer, norm)
        tensors |= {**_attention(rng, layer), **_feed_forward(rng, layer)}
    return {
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS,
        "attention.key_length": WIDTH // HEADS,
        "attention.value_length": WIDTH // HEADS,
        "attention.sliding_window": WINDOW,
        "feed_forward_length": FEED_FORWARD,
    }, tensors


_MAKERS: Final[Mapping[Kind, Callable[[np.random.Generator], tuple[dict[str, Any], Tensors]]]] = {
    Kind.RECURRENT: _mamba,
    Kind.HYBRID: _jamba,
    Kind.SLIDING_WINDOW: _gemma2,
}
_SSM: Final = {
    "ssm.conv_kernel": CONV,
    "ssm.inner_size": INNER,
    "ssm.state_size": STATE,
    "ssm.time_step_rank": RANK,
}


# --- weights; shapes are (outputs, inputs) ---------------------------------------------------------------------------


def _matrix(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.float32]:
    weights = rng.standard_normal(shape) / np.sqrt(shape[-1])
    return np.asarray(weights, np.float32)


def _embedding(rng: np.random.Generator) -> Tensors:
    return {
        "token_embd.weight": rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32),
        "output_norm.weight": np.ones(WIDTH, np.float32),
    }


def _norm(layer: int, name: str, size: int = WIDTH) -> Tensors:
    return {f"blk.{layer}.{name}.weight": np.ones(size, np.float32)}


def _attention(rng: np.random.Generator, layer: int) -> Tensors:
    names = ("attn_q", "attn_k", "attn_v", "attn_output")
    return {f"blk.{layer}.{name}.weight": _matrix(rng, WIDTH, WIDTH) for name in names}


def _feed_forward(rng: np.random.Generator, layer: int) -> Tensors:
    return {
        f"blk.{layer}.ffn_gate.weight": _matrix(rng, FEED_FORWARD, WIDTH),
        f"blk.{layer}.ffn_up.weight": _matrix(rng, FEED_FORWARD, WIDTH),
        f"blk.{layer}.ffn_down.weight": _matrix(rng, WIDTH, FEED_FORWARD),
    }


def _recurrent_layer(rng: np.random.Generator, layer: int) -> Tensors:
    # Slow decay and small steps: what was read first is not forgotten.
    decay = -rng.uniform(0.001, 0.1, (INNER, STATE)).astype(np.float32)
    parts = {
        "ssm_in.weight": _matrix(rng, 2 * INNER, WIDTH),
        "ssm_conv1d.weight": _matrix(rng, INNER, CONV),
        "ssm_conv1d.bias": np.zeros(INNER, np.float32),
        "ssm_x.weight": _matrix(rng, RANK + 2 * STATE, INNER),
        "ssm_dt.weight": _matrix(rng, INNER, RANK),
        "ssm_dt.bias": np.full(INNER, -2.0, np.float32),
        "ssm_a": decay,
        "ssm_d": np.ones(INNER, np.float32),
        "ssm_out.weight": _matrix(rng, WIDTH, INNER),
    }
    return {f"blk.{layer}.{name}": value for name, value in parts.items()}


# --- vocabulary ------------------------------------------------------------------------------------------------------


def _vocabulary() -> dict[str, Any]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = itertools.count(256)
    alphabet = [chr(b) if b in printable else chr(next(stand_ins)) for b in range(256)]
    # llama.cpp wants at least one merge.
    space = alphabet[32]
    tokens = [*alphabet, space * 2, *CONTROL]
    prefix = "tokenizer.ggml"
    return {
        f"{prefix}.model": "gpt2",
        f"{prefix}.pre": "qwen2",
        f"{prefix}.tokens": tokens,
        f"{prefix}.token_type": [*[1] * 257, *[3] * len(CONTROL)],
        f"{prefix}.merges": [f"{space} {space}"],
        f"{prefix}.bos_token_id": tokens.index(CONTROL[0]),
        f"{prefix}.eos_token_id": tokens.index(CONTROL[2]),
        f"{prefix}.add_bos_token": False,
        "tokenizer.chat_template": (
            "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    }


# --- GGUF, version 3 -------------------------------------------------------------------------------------------------

_BOOL, _STRING, _ARRAY, _UINT32, _INT32, _FLOAT32 = 7, 8, 9, 4, 5, 6


def _gguf(metadata: Mapping[str, object], tensors: Tensors) -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    head += b"".join(_string(key) + _typed(value) for key, value in metadata.items())
    data = b""
    for name, values in tensors.items():
        sizes = values.shape[::-1]
        head += _string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, 0, len(data))
        data += _aligned(values.tobytes())
    return _aligned(head) + data


def _aligned(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: object) -> bytes:
    if isinstance(value, Sequence) and not isinstance(value, str):
        kind = _STRING if isinstance(value[0], str) else _INT32
        parts = [_string(one) if kind == _STRING else struct.pack("<i", one) for one in value]
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(parts)
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    assert isinstance(value, str)
    return struct.pack("<I", _STRING) + _string(value)
