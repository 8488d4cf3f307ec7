"""The operations of a decode step on the CPU, compiled on this machine from ``kernels.cpp``.

oneDNN's products wait for memory: they ask for a weight when they need it, and the processor's
prefetcher stops at the end of each page. Products that prefetch 4 KiB ahead are up to twice as fast
(docs/performance.md). They need a processor with AVX-512 and GCC (``g++``); without them
:func:`native` returns None, and torch's own operators are used. The compiled file is kept in
:func:`~batchbench.files.cache_folder`, by default ``~/.cache/batchbench``; its name digests the
source, flags and compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from batchbench.batching.engines.torch.architecture import Architecture
from batchbench.batching.machine import Processor, find_compiler
from batchbench.files import cache_folder, replacing
from batchbench.workloads.sampling import Sampling

SOURCE = Path(__file__).with_name("kernels.cpp")
PANEL = 32  # outputs in a panel of packed weights
MAX_HEAD_SIZE = 256


class Through(IntEnum):
    """The function that a product's results go through."""

    NOTHING = 0
    GELU = 1
    SWIGLU = 2


_FLAGS = (
    *("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma"),
)
_COMPILING_S = 120.0
FORMATS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # with their names in C++


@cache
def native() -> Native | None:
    """Return the compiled operations if this machine can run and compile them."""
    processor = Processor.here()
    library = _compiled() if processor.runs_kernels else None
    return Native(library, processor) if library is not None else None


class Native:
    """The operations; all tensors are on the CPU, contiguous, in float32 or bfloat16."""

    def __init__(self, library: ctypes.CDLL, processor: Processor) -> None:
        self.processor, self._library = processor, library

    def _call(self, name: str, dtype: torch.dtype, *args: Tensor | float | None) -> None:
        """Call an operation for a number format, with the arguments that it has in C++."""
        function = getattr(self._library, f"{name}_{FORMATS[dtype]}")
        if function.argtypes is None:
            numbers = {int: ctypes.c_long, Through: ctypes.c_long, float: ctypes.c_float}
            function.argtypes = [numbers.get(type(argument), ctypes.c_void_p) for argument in args]
        function(*[a.data_ptr() if isinstance(a, Tensor) else a for a in args])

    def multiplies(self, weight: Tensor) -> bool:
        """Return True if :meth:`product` suits ``weight``, ``[outputs, inputs]``."""
        if weight.dtype is torch.bfloat16:
            return weight.shape[1] % 2 == 0 and not self.processor.has_amx
        return weight.dtype is torch.float32

    def attends(self, head_size: int, dtype: torch.dtype) -> bool:
        return head_size <= MAX_HEAD_SIZE and dtype in FORMATS

    @staticmethod
    def side_by_side(weight: Tensor) -> Tensor:
        """Return a gate's outputs and those it multiplies, ``[2 × n, …]``, alternating 16 of each.

        Each panel then has both. The last ones are padded with zeros.
        """
        n, half = len(weight) // 2, PANEL // 2
        blocks, rest = -(-n // half), weight.shape[1:]
        whole = weight.new_zeros(2, blocks * half, *rest)
        whole[0, :n], whole[1, :n] = weight[:n], weight[n:]
        return whole.view(2, blocks, half, *rest).transpose(0, 1).flatten(0, 2)

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        """Return ``[outputs, inputs]`` in panels of 32 outputs, as :meth:`product` reads it.

        It is ``[panels, inputs, 32]`` or, in bfloat16, ``[panels, inputs / 2, 32, 2]``.
        """
        outputs, inputs = weight.shape
        panels = -(-outputs // PANEL)
        together = 2 if weight.dtype is torch.bfloat16 else 1
        whole = weight.new_zeros(panels * PANEL, inputs)
        whole[:outputs] = weight
        return whole.view(panels, PANEL, inputs // together, together).transpose(1, 2).contiguous()

    def product(
        self,
        x: Tensor,
        packed: Tensor,
        outputs: int,
        bias: Tensor | None,
        *,
        through: Through = Through.NOTHING,
        add: Tensor | None = None,
    ) -> Tensor:
        """Return ``x @ weight.T + bias``, then an activation or ``+ add``: ``[rows, outputs]``.

        ``x`` is ``[rows, inputs]``, ``packed`` the weight after :meth:`pack`; for SwiGLU, weight
        and bias are first put :meth:`side_by_side`, and ``outputs`` is the number of results.
        """
        x, add = x.contiguous(), None if add is None else add.contiguous()
        rows, inputs = x.shape
        out = x.new_empty(rows, outputs)
        tensors = (x, packed, bias, add, out, self._room_to_widen(x.dtype, rows * inputs))
        self._call("product", x.dtype, *tensors, rows, inputs, outputs, through)
        return out

    def _room_to_widen(self, dtype: torch.dtype, count: int) -> Tensor | None:
        """Return room for ``count`` inputs of products in float32, where they are widened."""
        if dtype is not torch.bfloat16 or self.processor.multiplies_bfloat16:
            return None
        return torch.empty(count)

    def decode(
        self,
        table: Tensor,
        of: Architecture,
        x: Tensor,
        blocks: Sequence[Tensor],
        slots: Tensor,
        positions: Tensor,
        angles: Tensor | None,
    ) -> None:
        """Compute all layers for rows that only decode; ``x``, ``[rows, width]``, is the residual.

        ``table`` has the addresses of ``struct Layer`` for each layer; the last, of its block of
        the cache, is set here. Slots, positions and angles are as in :meth:`attention`.
        """
        table[:, -1] = torch.tensor([block.data_ptr() for block in blocks])
        rows, (_, all_slots, _, max_len, size) = len(x), blocks[0].shape
        between = rows * (of.width + 2 * (of.heads + of.kv_heads) * size + of.inner)
        room, widened = x.new_empty(between), self._room_to_widen(x.dtype, between)
        through = Through.SWIGLU if of.gated else Through.GELU
        counts = (of.layers, rows, of.width, of.inner, through, of.heads, of.kv_heads, size)
        tensors = (table, x, room, widened, slots, positions, angles)
        self._call("decode", x.dtype, *tensors, *counts, all_slots, max_len, size**-0.5, of.eps)

    def attention(
        self,
        qkv: Tensor,
        block: Tensor,
        slots: Tensor,
        positions: Tensor,
        decoding: int,
        angles: Tensor | None = None,
        norms: Sequence[Tensor] = (),
        eps: float = 0.0,
    ) -> Tensor:
        """Write a pass's keys and values into a layer's cache, and attend for its decoding rows.

        Each row reads its slot up to its own position only. ``qkv`` is ``[tokens, heads + 2 ×
        kv_heads, head_dim]``, ``decoding`` rows first; ``block`` is as in SlotLayer; ``slots`` and
        ``positions`` are ``[tokens]``, int64. The result, ``[tokens, heads, head_dim]``, is set for
        the decoding rows only. Queries and keys are normed and rotated in place first, if there are
        ``norms`` of both, ``[head_dim]`` each, and ``angles``, ``[2, tokens, head_dim / 2]``.
        """
        tokens, both, size = qkv.shape
        _, all_slots, kv_heads, max_len, _ = block.shape
        heads = both - 2 * kv_heads
        out = qkv.new_empty(tokens, heads, size)
        tensors = (qkv, block, slots, positions, angles, *(norms or (None, None)), out)
        counts = (tokens, decoding, heads, kv_heads, size, all_slots, max_len)
        self._call("attention", qkv.dtype, *tensors, *counts, size**-0.5, eps)
        return out

    def greedy(self, logits: Tensor) -> Tensor:
        """Return the index of the largest number of each row, ``[rows]``; the first of equals."""
        logits = logits.contiguous()
        rows, vocabulary = logits.shape
        out = torch.empty(rows, dtype=torch.int64)
        self._call("greedy", logits.dtype, logits, out, rows, vocabulary)
        return out

    def sample(self, logits: Tensor, keys: Tensor, sampling: Sampling) -> Tensor:
        """Return the token that is drawn for each row, ``[rows]``; ``keys`` are of its noise."""
        logits, keys = logits.contiguous(), keys.contiguous()
        rows, vocabulary = logits.shape
        out = torch.empty(rows, dtype=torch.int64)
        numbers = (float(sampling.temperature), float(sampling.top_p))
        sizes = (rows, vocabulary, sampling.top_k)
        self._call("sample", logits.dtype, logits, keys, out, *sizes, *numbers)
        return out


def _compiled() -> ctypes.CDLL | None:
    """Load the library from the cache, or compile it; return None if that fails."""
    compiler = find_compiler()
    if compiler is None:
        return None
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, check=True, timeout=_COMPILING_S
        ).stdout
        content = b"\0".join([SOURCE.read_bytes(), " ".join(_FLAGS).encode(), version])
        digest = hashlib.sha256(content).hexdigest()[:16]
        file = cache_folder() / f"kernels-{digest}.so"
        if not file.exists():
            _compile(compiler, file)
        return ctypes.CDLL(str(file))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: no home folder
        return None


def _compile(compiler: str, file: Path) -> None:
    with replacing(file) as temporary:  # other processes may compile it too
        command = [compiler, *_FLAGS, str(SOURCE), "-o", str(temporary)]
        subprocess.run(command, capture_output=True, check=True, timeout=_COMPILING_S)
