"""Compile every Triton kernel for a GPU that is not there, as GPT-2 and Qwen3 launch it.

``python -m support.triton_targets 90 bfloat16 float16 float32`` compiles for compute capability
9.0, down to the GPU's own code, and prints a line for each kernel. It needs no GPU and no driver.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from batchbench.batching.engines.torch.architecture import Norm, Rotary, Rotation
from batchbench.batching.engines.torch.triton import ops
from batchbench.workloads.sampling import Sampling

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def _type(value: object) -> str:
    if value is None:
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int)
    return "i32" if value < 2**31 else "i64"


def _is_aligned(value: object) -> bool:
    """Return True if Triton would know that a pointer or a size is a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def compile_for(capability: int, *formats: str) -> None:
    """Compile each kernel where it would be launched."""
    target = GPUTarget("cuda", capability, 32)

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        assert all(0 < size < 2**31 for size in grid)
        signature = {name: _type(arg) for name, arg in zip(kernel.arg_names, args, strict=False)}
        signature |= dict.fromkeys(options, "constexpr")
        assert list(signature) == kernel.arg_names
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, arg in enumerate(args) if _is_aligned(arg)
        }
        absent = {n: None for n, arg in zip(kernel.arg_names, args, strict=False) if arg is None}
        source = ASTSource(kernel, signature, {**options, **absent}, aligned)
        made = triton.compile(source, target=target)
        sizes = f"{len(made.asm['cubin'])} bytes, {made.metadata.shared} shared"
        sys.stdout.write(f"{kernel.__name__}: {sizes}\n")
        assert made.metadata.shared <= 99 * 1024  # what every GPU from Ampere on has

    ops.launch = launch
    for name in formats:
        _launch_all(getattr(torch, name), heads=12, kv_heads=12, size=64, llama=False)
        _launch_all(getattr(torch, name), heads=9, kv_heads=3, size=64, llama=True)


def _launch_all(dtype: torch.dtype, *, heads: int, kv_heads: int, size: int, llama: bool) -> None:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)

    at = torch.zeros(2, dtype=torch.int64)
    width = heads * size
    block = zeros(2, 2, kv_heads, 600, size)
    states = zeros(2, heads, size), zeros(2, kv_heads, size), zeros(2, kv_heads, size)
    attention = ops.SlotAttention(block.device, heads, 600, 2, size)
    head_norm = Norm(zeros(size), None, 1e-6)
    rotary = Rotary(torch.ones(size // 2), 1.0)
    rotation = Rotation(rotary, [head_norm, head_norm]) if llama else None
    attention.decode(*states, block, at, at, rotation=rotation)
    tiles = torch.zeros(1, 5, dtype=torch.int64)
    for tokens in (16, 64):
        attention.tiled(*states, block, tiles, tokens, rotation=rotation)
    norm = Norm(zeros(width), None if llama else zeros(width), 1e-5)
    x, _ = ops.embed_norm(at, at, zeros(3, width), None if llama else zeros(3, width), norm)
    added = None if llama else zeros(width)
    ops.add_norm(x, x, added, norm)
    ops.add_norm(x, x, added, norm, at)
    if llama:
        ops.swiglu(zeros(2, 2 * 3072))
    logits, keys = zeros(2, 50304)[:, :50257], torch.zeros(2, 2, dtype=torch.int32)
    for sampling in (None, Sampling(0.7), Sampling(0.7, 0.9)):
        ops.best_token(logits, sampling, None if sampling is None else keys)


if __name__ == "__main__":
    compile_for(int(sys.argv[1]), *sys.argv[2:])
