"""Write a GPT-2 checkpoint as a GGUF file, with the same float32 weights, for llama.cpp's server.

    python benchmarks/gguf_checkpoint.py FOLDER FILE.gguf

The folder is one of `benchmarks/servers.py checkpoint`. Needs the packages gguf and safetensors.
With the same weights on both sides, `batchbench run --verify-model FOLDER` can check the server.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
from safetensors.numpy import load_file

NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
"""Parts of a layer, by their names in transformers and in GGUF."""


def main(folder: Path, file: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(file, "gpt2")
    width = config["n_embd"]
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(4 * width)
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_tokenizer(writer, folder, config)
    add_weights(writer, folder, config["n_layer"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, int]) -> None:
    """Add the vocabulary and the merges of the checkpoint's tokenizer."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    end = config["eos_token_id"]
    types = [gguf.TokenType.NORMAL] * len(tokens)
    types[end] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]] or ["a b"])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)


def add_weights(writer: gguf.GGUFWriter, folder: Path, layers: int) -> None:
    """Add all weights; transformers keeps matrices as [inputs, outputs], GGUF the other way."""
    weights = load_file(folder / "model.safetensors")
    weights = {name.removeprefix("transformer."): value for name, value in weights.items()}
    writer.add_tensor("token_embd.weight", weights["wte.weight"])
    writer.add_tensor("position_embd.weight", weights["wpe.weight"])
    for kind in ("weight", "bias"):
        writer.add_tensor(f"output_norm.{kind}", weights[f"ln_f.{kind}"])
        for layer in range(layers):
            for theirs, ours in NAMES.items():
                value = weights[f"h.{layer}.{theirs}.{kind}"]
                is_matrix = value.ndim == 2
                writer.add_tensor(
                    f"blk.{layer}.{ours}.{kind}", value.T.copy() if is_matrix else value
                )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
