"""A decode step beside llama.cpp's, on the same weights, in turns in one process.

    .venv/bin/pip install llama-cpp-python gguf      # builds llama.cpp for this machine
    .venv/bin/python benchmarks/llama_cpp.py [--rows 8] [--rounds 25]

GPT-2 124M with dummy weights on the CPU, requests 64 tokens long, as many threads on both sides.
llama.cpp caches keys and values in float16, its default. In how many rows both choose the same
token is told beside the times: quote their ratio.
"""

import argparse
import ctypes
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import gguf
import llama_cpp as llama
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from batchbench.batching.engines.torch.attention import Layout
from batchbench.batching.engines.torch.base import best_token
from batchbench.batching.engines.torch.cache import SlotCache
from batchbench.batching.engines.torch.forward import GPT2Forward
from batchbench.batching.models import ModelSpec, find_model
from batchbench.batching.models.loading import LoadedModel, load_model, set_threads

LENGTH = 64
NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
"""Parts of a block, as transformers and as GGUF call them."""


def write(model: LoadedModel, file: Path) -> None:
    """The model as a GGUF file, matrices in its own number format."""
    config, body = model.module.config, model.module.transformer
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    kinds = gguf.GGMLQuantizationType
    kind = kinds.BF16 if model.dtype is torch.bfloat16 else kinds.F32

    def add(name: str, tensor: torch.Tensor, *, matrix: bool = False) -> None:
        numbers = np.ascontiguousarray(tensor.detach().float().numpy())
        stored = kind if matrix else kinds.F32
        writer.add_tensor(name, gguf.quantize(numbers, stored), raw_dtype=stored)

    add("token_embd.weight", body.wte.weight, matrix=True)
    add("position_embd.weight", body.wpe.weight)
    for i, block in enumerate(body.h):
        for theirs, name in NAMES.items():
            part = block.get_submodule(theirs)
            matrix = not theirs.startswith("ln")  # transformers' Conv1D holds [inputs, outputs]
            weight = part.weight.t() if matrix else part.weight
            add(f"blk.{i}.{name}.weight", weight, matrix=matrix)
            add(f"blk.{i}.{name}.bias", part.bias)
    add("output_norm.weight", body.ln_f.weight)
    add("output_norm.bias", body.ln_f.bias)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """llama.cpp with one sequence a row."""

    def __init__(self, file: Path, prompts: Sequence[Sequence[int]], vocabulary: int) -> None:
        self._rows, self._vocabulary = len(prompts), vocabulary
        llama.llama_backend_init()
        silent = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(silent, ctypes.c_void_p(0))
        self._silent = silent  # it is called as long as the library lives
        self._model = llama.llama_model_load_from_file(
            str(file).encode(), llama.llama_model_default_params()
        )
        params = llama.llama_context_default_params()
        params.n_ctx = self._rows * 2 * LENGTH
        params.n_batch = params.n_ubatch = self._rows * LENGTH
        params.n_seq_max = self._rows
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self._context = llama.llama_init_from_model(self._model, params)
        self._batch = llama.llama_batch_init(self._rows * LENGTH, 0, 1)
        self._decode([(row, at, t) for row, p in enumerate(prompts) for at, t in enumerate(p[:-1])])
        self._last = [(row, len(p) - 1, p[-1]) for row, p in enumerate(prompts)]

    def step(self) -> list[int]:
        """One decode step of all rows, then the last position is forgotten again."""
        self._decode(self._last, yields=True)
        logits = [
            np.ctypeslib.as_array(
                llama.llama_get_logits_ith(self._context, row), shape=(self._vocabulary,)
            )
            for row in range(self._rows)
        ]
        tokens = [int(row.argmax()) for row in logits]
        memory = llama.llama_get_memory(self._context)
        for row, position, _ in self._last:
            llama.llama_memory_seq_rm(memory, row, position, -1)
        return tokens

    def _decode(self, tokens: Sequence[tuple[int, int, int]], *, yields: bool = False) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (row, position, token) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = yields
        if llama.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp could not decode")


def ours(model: LoadedModel, prompts: Sequence[Sequence[int]]) -> Callable[[], list[int]]:
    """The same step on the slots engine's forward pass."""
    forward, rows = GPT2Forward(model), len(prompts)
    like = torch.empty(0, dtype=forward.cache_dtype)
    cache, slots = SlotCache(model.module.config, rows, 2 * LENGTH, like), torch.arange(rows)
    ids = torch.tensor(prompts)
    for at in range(LENGTH):
        place = torch.full((rows,), at)
        layout = Layout(cache, slots, place, rows, low=0, high=rows, length=at + 1)
        if at < LENGTH - 1:
            forward(ids[:, at], layout, None)
    return lambda: best_token(forward(ids[:, -1], layout, None)).tolist()


@torch.inference_mode()
def measure(dtype: str, rows: int, rounds: int) -> tuple[dict[str, float], int]:
    """Median milliseconds of each, and how many rows got the same token."""
    spec = ModelSpec(model="gpt2", load_format="dummy", device="cpu", dtype=dtype)
    set_threads(spec)
    model = load_model(find_model(spec), spec, seed=0)
    vocabulary = model.module.config.vocab_size
    prompts = np.random.default_rng(0).integers(0, vocabulary, (rows, LENGTH)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gpt2.gguf"
        write(model, file)
        theirs = LlamaCpp(file, prompts, vocabulary)
    ways = {"batchbench": ours(model, prompts), "llama.cpp": theirs.step}
    same = sum(a == b for a, b in zip(*(way() for way in ways.values()), strict=True))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn >= 2:
                times[name].append((time.perf_counter() - began) * 1e3)
    return {name: statistics.median(spent) for name, spent in times.items()}, same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=25)
    asked = parser.parse_args()
    table = Table(
        title=f"GPT-2 124M, {asked.rows} rows, {torch.get_num_threads()} threads, "
        f"llama-cpp-python {llama.__version__}"
    )
    for column in ("one decode step", "batchbench ms", "llama.cpp ms", "÷ batchbench", "same"):
        table.add_column(column, justify="left" if column.startswith("one") else "right")
    for dtype in ("float32", "bfloat16"):
        found, same = measure(dtype, asked.rows, asked.rounds)
        mine, theirs = found["batchbench"], found["llama.cpp"]
        table.add_row(
            dtype, f"{mine:.1f}", f"{theirs:.1f}", f"{theirs / mine:.2f}", f"{same}/{asked.rows}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
