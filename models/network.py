"""The network: a small Llama, laid out as llama.cpp expects it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

HEAD_SIZE = 32
BLOCK_WEIGHTS = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output",
    "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
)  # fmt: skip
"""Names of a block's parameters, in the order in which `block` takes them."""
ROPE_BASE = 500.0
"""Smaller than usual: more of the angles tell neighbouring positions apart, which copying needs."""
NORM_EPSILON = 1e-5
EMBEDDING_STD = 0.04
PREVIOUS_TOKEN_GAIN = 4.5
"""Length of a pair of query or key; with 4.5 most of the attention is on the token before."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the network; the output matrix is the embedding."""

    vocabulary: int = 2816
    width: int = 192
    blocks: int = 6
    heads: int = 6
    kv_heads: int = 2
    feed_forward: int = 512
    context: int = 1024


def rope_table(context: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, each [context, HEAD_SIZE / 2]."""
    powers = torch.arange(0, HEAD_SIZE, 2, dtype=torch.float64) / HEAD_SIZE
    angles = torch.arange(context, dtype=torch.float64)[:, None] / ROPE_BASE**powers
    return angles.cos().float(), angles.sin().float()


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPSILON) * weight


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """A product in bfloat16: twice as fast, and exact enough for training."""
    return functional.linear(x.bfloat16(), weight.bfloat16())


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs, as arch "llama" does: no permutation at export."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def block(  # noqa: PLR0917 - compiled once, so weights are arguments
    x: Tensor, cos: Tensor, sin: Tensor, attn_norm: Tensor, q: Tensor, k: Tensor, v: Tensor,
    out: Tensor, ffn_norm: Tensor, gate: Tensor, up: Tensor, down: Tensor,
) -> Tensor:  # fmt: skip
    """One transformer block; x is [rows, length, width] in float32."""
    rows, length, _ = x.shape
    h = _norm(x, attn_norm)

    def heads(weight: Tensor) -> Tensor:
        return _linear(h, weight).view(rows, length, -1, HEAD_SIZE).transpose(1, 2)

    # In float32: on a CPU this attention is up to three times as fast as the one in bfloat16.
    queries = _rotate(heads(q).float(), cos, sin)
    keys = _rotate(heads(k).float(), cos, sin)
    values = heads(v).float()
    repeats = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
    mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    x = x + _linear(mixed.transpose(1, 2).reshape(rows, length, -1), out).float()
    h = _norm(x, ffn_norm)
    return x + _linear(functional.silu(_linear(h, gate)) * _linear(h, up), down).float()


@torch.no_grad()
def start_with_previous_token_heads(
    embedding: Tensor, first_block: nn.Module, shape: Shape
) -> None:
    """Let one head per group of the first block look at the token before, from the first step on.

    Copying in order takes two heads in a row: one that notes at each token which token came before
    it, and one that looks for the note of the current token (Olsson et al., "In-context Learning
    and Induction Heads", 2022). Neither pays without the other, so such a small network may train
    for thousands of steps and have neither. With the first given, the second takes about 120.

    A head that looks by position needs something in queries and keys that does not depend on the
    token. There are no biases, so the first coordinate of all embeddings starts out equal and
    stands in for one; the output does not notice, as it moves all logits alike.
    """
    constant = EMBEDDING_STD * shape.width**0.5
    embedding[:, 0] = constant
    # Half of the squared length of an embedding is now the constant; the norm scales both.
    amplitude = PREVIOUS_TOKEN_GAIN / (shape.width / 2) ** 0.5
    turn = ROPE_BASE ** -(torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
    query, key = first_block.get_parameter("attn_q"), first_block.get_parameter("attn_k")
    for group in range(shape.kv_heads):
        head = group * (shape.heads // shape.kv_heads) * HEAD_SIZE
        query[head : head + HEAD_SIZE : 2, 0] = amplitude
        # Keys start one position ahead, so that they meet the query of the token after.
        start, end = group * HEAD_SIZE, (group + 1) * HEAD_SIZE
        key[start:end:2, 0] = amplitude * turn.cos()
        key[start + 1 : end : 2, 0] = amplitude * turn.sin()


class Llama(nn.Module):
    """Embedding, blocks, norm; parameters carry the names of the GGUF tensors."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Parameter(torch.empty(shape.vocabulary, shape.width))
        self.output_norm = nn.Parameter(torch.ones(shape.width))
        self.blocks = nn.ModuleList(_block_parameters(shape) for _ in range(shape.blocks))
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.token_embd, std=EMBEDDING_STD, generator=generator)
        for parameters in self.blocks:
            for name, weight in parameters.named_parameters():
                if name == "ffn_down":
                    nn.init.zeros_(weight)
                elif weight.ndim == 2:
                    std = 0.7 / weight.shape[1] ** 0.5
                    nn.init.normal_(weight, std=std, generator=generator)
        start_with_previous_token_heads(self.token_embd, self.blocks[0], shape)
        cos, sin = rope_table(shape.context)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.run_block = block

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states [rows, length, width] after the last norm."""
        length = tokens.shape[1]
        x = functional.embedding(tokens, self.token_embd)
        for parameters in self.blocks:
            weights = block_weights(parameters)
            x = self.run_block(x, self.cos[:length], self.sin[:length], *weights)
        return _norm(x, self.output_norm)

    def loss(self, tokens: Tensor, graded: Tensor) -> Tensor:
        """Sum of the cross entropies of the tokens where `graded` (both [rows, length])."""
        wanted = graded[:, 1:]
        hidden = self(tokens)[:, :-1][wanted]
        logits = _linear(hidden, self.token_embd).float()
        return functional.cross_entropy(logits, tokens[:, 1:][wanted], reduction="sum")


def block_weights(parameters: nn.Module) -> list[Tensor]:
    """The weights of one of `Llama.blocks`, in the order of BLOCK_WEIGHTS."""
    return [parameters.get_parameter(name) for name in BLOCK_WEIGHTS]


def _block_parameters(shape: Shape) -> nn.ParameterDict:
    kv = shape.kv_heads * HEAD_SIZE
    width, wide = shape.width, shape.feed_forward
    sizes = {
        "attn_norm": (width,), "attn_q": (shape.heads * HEAD_SIZE, width), "attn_k": (kv, width),
        "attn_v": (kv, width), "attn_output": (width, shape.heads * HEAD_SIZE),
        "ffn_norm": (width,), "ffn_gate": (wide, width), "ffn_up": (wide, width),
        "ffn_down": (width, wide),
    }  # fmt: skip
    weights = {name: nn.Parameter(torch.ones(size)) for name, size in sizes.items()}
    return nn.ParameterDict(weights)
