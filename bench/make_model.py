"""Makes a GGUF of a real model's shape with random weights, so that speed is measured without a download.

`python -m bench.make_model [--shape qwen-0.5b|tiny]` writes bench/models/SHAPE.gguf. The default has the shape
of Qwen2.5-0.5B in Q8_0 (about 530 MB). The weights are seeded noise, so the text is nonsense but every matrix
has the size that decides the speed. The vocabulary is synthetic: the 256 byte tokens of GPT-2's alphabet, then
words of two to four letters with the merges that build them, so that any text tokenizes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import string
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from bench.model_files import MODELS, SHAPES, Shape

Q8_BLOCK = 32
# Weights of this spread keep activations of a 24-layer network finite and its logits well apart.
WEIGHT_SPREAD = 0.02
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte value, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = itertools.count(256)
    return [chr(b) if b in printable else chr(next(stand_ins)) for b in range(256)]


def word_merges() -> Iterator[tuple[str, str]]:
    """Yields (left, right) merges: letter pairs first, then each longer word from a shorter one and a letter."""
    starts = [byte_alphabet()[ord(" ")], *string.ascii_lowercase]
    words = starts
    while True:
        merges = [(word, letter) for word in words for letter in string.ascii_lowercase]
        yield from merges
        words = [left + right for left, right in merges]


def vocabulary(size: int) -> tuple[list[str], list[int], list[str]]:
    """Returns tokens, their GGUF types and the merges of a vocabulary with `size` tokens."""
    alphabet = byte_alphabet()
    merges = list(itertools.islice(word_merges(), size - len(alphabet) - len(CONTROL_TOKENS)))
    tokens = [*alphabet, *(left + right for left, right in merges), *CONTROL_TOKENS]
    types = [int(gguf.TokenType.NORMAL)] * (size - len(CONTROL_TOKENS))
    types += [int(gguf.TokenType.CONTROL)] * len(CONTROL_TOKENS)
    return tokens, types, [f"{left} {right}" for left, right in merges]


def random_q8(rng: np.random.Generator, rows: int, columns: int) -> npt.NDArray[np.uint8]:
    """Returns random Q8_0 rows, shape (rows, columns // 32 * 34): a float16 scale, then 32 signed bytes, per block."""
    blocks = rows * columns // Q8_BLOCK
    packed = np.empty((blocks, 2 + Q8_BLOCK), np.uint8)
    # Uniform in -127..127 has a spread of 73: the scale brings it to WEIGHT_SPREAD.
    packed[:, :2] = np.frombuffer(np.float16(WEIGHT_SPREAD / 73.0).tobytes(), np.uint8)
    packed[:, 2:] = rng.integers(-127, 128, (blocks, Q8_BLOCK), np.int8).view(np.uint8)
    return packed.reshape(rows, -1)


def embeddings(rng: np.random.Generator, shape: Shape) -> npt.NDArray[np.uint8]:
    """Returns the tied embedding, with the control tokens' rows so small that greedy decoding never picks one."""
    packed = random_q8(rng, shape.vocabulary, shape.width)
    quiet = np.frombuffer(np.float16(1e-6).tobytes(), np.uint8)
    controls = packed[-len(CONTROL_TOKENS) :].reshape(len(CONTROL_TOKENS), -1, 2 + Q8_BLOCK)
    controls[:, :, :2] = quiet
    return packed


def describe(writer: gguf.GGUFWriter, shape: Shape, name: str) -> None:
    """Writes the metadata that llama.cpp needs to load the file as a Qwen2 chat model."""
    tokens, types, merges = vocabulary(shape.vocabulary)
    writer.add_name(f"random weights of the shape {name}")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q8_0))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(value=False)
    writer.add_chat_template(CHATML)


def add_tensors(writer: gguf.GGUFWriter, shape: Shape, rng: np.random.Generator) -> None:
    """Adds all weights; the output matrix is tied to the embedding, as in Qwen2.5-0.5B."""

    def matrix(name: str, rows: int, columns: int) -> None:
        packed = random_q8(rng, rows, columns)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    def vector(name: str, length: int, value: float) -> None:
        writer.add_tensor(name, np.full(length, value, np.float32))

    writer.add_tensor(
        "token_embd.weight", embeddings(rng, shape), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    vector("output_norm.weight", shape.width, 1.0)
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        vector(f"{block}.attn_norm.weight", shape.width, 1.0)
        vector(f"{block}.ffn_norm.weight", shape.width, 1.0)
        for name, rows in (("q", shape.width), ("k", shape.kv_width), ("v", shape.kv_width)):
            matrix(f"{block}.attn_{name}.weight", rows, shape.width)
            vector(f"{block}.attn_{name}.bias", rows, 0.0)
        matrix(f"{block}.attn_output.weight", shape.width, shape.width)
        matrix(f"{block}.ffn_gate.weight", shape.feed_forward, shape.width)
        matrix(f"{block}.ffn_up.weight", shape.feed_forward, shape.width)
        matrix(f"{block}.ffn_down.weight", shape.width, shape.feed_forward)


def make(name: str, target: Path, seed: int = 7) -> Path:
    """Writes the model `name` of SHAPES to `target`, replacing it in one step, and returns the path."""
    shape = SHAPES[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.partial")
    writer = gguf.GGUFWriter(str(partial), "qwen2")
    describe(writer, shape, name)
    add_tensors(writer, shape, np.random.default_rng(seed))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(target)
    return target


def main() -> None:
    """Writes a model and prints its path, size and the time it took."""
    parser = argparse.ArgumentParser(prog="python -m bench.make_model", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen-0.5b")
    parser.add_argument("--out", type=Path, help="default: bench/models/SHAPE.gguf")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    started = time.perf_counter()
    path = make(args.shape, args.out or MODELS / f"{args.shape}.gguf", args.seed)
    size = path.stat().st_size
    print(f"{path}  {size / 1e6:.0f} MB  {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
