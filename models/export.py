"""Write the trained weights as GGUF: `python -m models.export`."""

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer

from models.bpe import CONTROL, MARKUP
from models.network import (
    BLOCK_WEIGHTS,
    HEAD_SIZE,
    NORM_EPSILON,
    ROPE_BASE,
    Llama,
    Shape,
    block_weights,
)
from models.template import TEMPLATE

LARGEST_FILE = 8 * 1000 * 1000
"""Bytes: the model is kept in the repository."""
DEFAULT_MODEL = Path(__file__).parent / "caravan-demo.gguf"


def _add_metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("caravan-demo")
    writer.add_description("Caravan's demo model: a very small chat model, trained from scratch")
    writer.add_license("apache-2.0")
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.blocks)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    types = {
        **dict.fromkeys(CONTROL, gguf.TokenType.CONTROL),
        # User-defined tokens print as text, so that servers can parse the calls.
        **dict.fromkeys(MARKUP, gguf.TokenType.USER_DEFINED),
    }
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([types.get(token, gguf.TokenType.NORMAL) for token in tokens])
    writer.add_token_merges(_merges(tokenizer))
    end = vocabulary["<|im_end|>"]
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(end)
    writer.add_bos_token_id(vocabulary["<|endoftext|>"])
    writer.add_pad_token_id(vocabulary["<|endoftext|>"])
    writer.add_add_bos_token(value=False)
    writer.add_chat_template(TEMPLATE)


def _merges(tokenizer: Tokenizer) -> list[str]:
    return [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def _add_tensors(writer: gguf.GGUFWriter, model: Llama) -> None:
    def matrix(name: str, weight: torch.Tensor) -> None:
        values = weight.detach().numpy()
        kind = np.float32 if values.ndim == 1 else np.float16
        writer.add_tensor(name, np.ascontiguousarray(values.astype(kind)))

    # No output.weight: llama.cpp then takes the embedding, as in training.
    matrix("token_embd.weight", model.token_embd)
    for number, parameters in enumerate(model.blocks):
        for name, weight in zip(BLOCK_WEIGHTS, block_weights(parameters), strict=True):
            matrix(f"blk.{number}.{name}.weight", weight)
    matrix("output_norm.weight", model.output_norm)


def export(folder: Path, target: Path) -> int:
    """Write the model of the folder's checkpoint; its size in bytes. Too large is a ValueError."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = Llama(Shape(vocabulary=tokenizer.get_vocab_size()), seed=0)
    model.load_state_dict(torch.load(folder / "checkpoint.pt")["model"])
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _add_metadata(writer, model.shape)
    _add_tokenizer(writer, tokenizer)
    _add_tensors(writer, model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    size = partial.stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(f"{partial} has {size} bytes, more than {LARGEST_FILE}")
    partial.replace(target)
    return size


def main() -> None:
    """Export the last checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/model"))
    parser.add_argument("--target", type=Path, default=DEFAULT_MODEL)
    options = parser.parse_args()
    print(f"{options.target}: {export(options.folder, options.target)} bytes")


if __name__ == "__main__":
    main()
