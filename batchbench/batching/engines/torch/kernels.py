"""The operations of a decode step on the CPU, compiled on this machine from ``kernels.cpp``.

oneDNN's products wait for memory: they ask for a weight when they need it, and the processor's
prefetcher stops at the end of each page. Products that ask ahead are up to twice as fast
(docs/performance.md). They need a processor with AVX-512 and GCC (``g++``); without them
:func:`native` is None, and torch's own operators do the work. The compiled file is kept in
``$XDG_CACHE_HOME/batchbench``, by default ``~/.cache/batchbench``, under a digest of its source,
flags and compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from batchbench.batching.machine import Processor
from batchbench.files import replacing

SOURCE = Path(__file__).with_name("kernels.cpp")
PANEL = 32
"""Outputs whose weights lie together."""
MAX_HEAD_SIZE = 256

_FLAGS = (
    *("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma"),
)
_COMPILING_S = 60.0
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@cache
def native() -> Native | None:
    """The compiled operations, if this machine can have them."""
    processor = Processor.here()
    if not processor.runs_kernels:
        return None
    library = _compiled()
    return None if library is None else Native(library, processor)


class Native:
    """The operations. All tensors lie on the CPU, contiguous, in float32 or bfloat16."""

    def __init__(self, library: ctypes.CDLL, processor: Processor) -> None:
        self.processor = processor
        self._products = _functions(library, "product", pointers=6, integers=4)
        self._attentions = _functions(library, "attention", pointers=5, integers=6, numbers=1)
        self._choices = _functions(library, "greedy", pointers=2, integers=2)

    def multiplies(self, weight: torch.Tensor) -> bool:
        """Whether products with ``weight``, ``[outputs, inputs]``, are for :meth:`product`."""
        if weight.dtype is torch.bfloat16:
            return weight.shape[1] % 2 == 0 and not self.processor.has_amx
        return weight.dtype is torch.float32

    def attends(self, head_size: int, dtype: torch.dtype) -> bool:
        """Whether heads of this size are for :meth:`attention`."""
        return head_size <= MAX_HEAD_SIZE and dtype in _NAMES

    def chooses(self, logits: torch.Tensor) -> bool:
        """Whether :meth:`greedy` can choose among ``logits``."""
        return logits.dtype in _NAMES and logits.shape[1] > 0

    @staticmethod
    def pack(weight: torch.Tensor) -> torch.Tensor:
        """``[outputs, inputs]`` as the products read it: panels of 32 outputs.

        ``[panels, inputs, 32]`` in float32 and ``[panels, inputs / 2, 32, 2]`` in bfloat16, with
        zeros for outputs that there are not.
        """
        outputs, inputs = weight.shape
        panels = -(-outputs // PANEL)
        together = 2 if weight.dtype is torch.bfloat16 else 1
        whole = weight.new_zeros(panels * PANEL, inputs)
        whole[:outputs] = weight
        return whole.view(panels, PANEL, inputs // together, together).transpose(1, 2).contiguous()

    def product(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        outputs: int,
        bias: torch.Tensor | None,
        *,
        through_gelu: bool = False,
        add: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x @ weight.T + bias``, then GPT-2's GELU or ``+ add`` if asked: ``[rows, outputs]``.

        Args:
            x: ``[rows, inputs]``.
            packed: what :meth:`pack` made of the weight, ``[outputs, inputs]``.
            bias: ``[outputs]``, or None.
            add: ``[rows, outputs]``, or None.
        """
        x = x.contiguous()
        add = add if add is None else add.contiguous()
        rows, inputs = x.shape
        out = x.new_empty(rows, outputs)
        widened = None
        if x.dtype is torch.bfloat16 and not self.processor.multiplies_bfloat16:
            widened = torch.empty(rows, inputs)
        self._products[x.dtype](
            x.data_ptr(),
            packed.data_ptr(),
            bias if bias is None else bias.data_ptr(),
            add if add is None else add.data_ptr(),
            out.data_ptr(),
            widened if widened is None else widened.data_ptr(),
            rows,
            inputs,
            outputs,
            through_gelu,
        )
        return out

    def attention(
        self,
        qkv: torch.Tensor,
        block: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        decoding: int,
    ) -> torch.Tensor:
        """Write a pass's keys and values into a layer's cache, and let its decoding rows attend.

        Each of them sees its slot up to its own position, and no more is read.

        Args:
            qkv: ``[tokens, 3, heads, head_dim]``, decoding rows first.
            block: ``[2, slots, heads, max_len, head_dim]``, keys and values, written in place.
            slots, positions: ``[tokens]``, int64.
            decoding: how many rows decode.

        Returns:
            ``[tokens, heads, head_dim]``, set for the decoding rows only.
        """
        tokens, _, heads, size = qkv.shape
        out = qkv.new_empty(tokens, heads, size)
        self._attentions[qkv.dtype](
            qkv.data_ptr(),
            block.data_ptr(),
            slots.data_ptr(),
            positions.data_ptr(),
            out.data_ptr(),
            tokens,
            decoding,
            heads,
            size,
            block.shape[1],
            block.shape[3],
            size**-0.5,
        )
        return out

    def greedy(self, logits: torch.Tensor) -> torch.Tensor:
        """The place of the largest number of each row, ``[rows]``; the first of equals."""
        logits = logits.contiguous()
        rows, vocabulary = logits.shape
        out = torch.empty(rows, dtype=torch.int64)
        self._choices[logits.dtype](logits.data_ptr(), out.data_ptr(), rows, vocabulary)
        return out


def _functions(
    library: ctypes.CDLL, name: str, *, pointers: int, integers: int, numbers: int = 0
) -> dict[torch.dtype, Callable[..., None]]:
    """An operation's function for each number format; it takes pointers, integers, then numbers."""
    found: dict[torch.dtype, Callable[..., None]] = {}
    for dtype, suffix in _NAMES.items():
        function = library[f"{name}_{suffix}"]
        function.argtypes = (
            *[ctypes.c_void_p] * pointers,
            *[ctypes.c_long] * integers,
            *[ctypes.c_float] * numbers,
        )
        function.restype = None
        found[dtype] = function
    return found


def _compiled() -> ctypes.CDLL | None:
    """The compiled source: from the cache, or made now; None where that cannot be."""
    compiler = find_compiler()
    if compiler is None:
        return None
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, check=True, timeout=_COMPILING_S
        ).stdout
        made_from = b"\0".join([SOURCE.read_bytes(), " ".join(_FLAGS).encode(), version])
        file = _cache() / f"kernels-{hashlib.sha256(made_from).hexdigest()[:16]}.so"
        if not file.exists():
            _compile(compiler, file)
        return ctypes.CDLL(str(file))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: no home
        return None


def find_compiler() -> str | None:
    """Return the path of ``g++``; None if it is missing or the system is not Linux."""
    return shutil.which("g++") if sys.platform.startswith("linux") else None


def _compile(compiler: str, file: Path) -> None:
    """Put the compiled source there whole: other processes may be at it too."""
    with replacing(file) as made:
        command = [compiler, *_FLAGS, str(SOURCE), "-o", str(made)]
        subprocess.run(command, capture_output=True, check=True, timeout=_COMPILING_S)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchbench"
