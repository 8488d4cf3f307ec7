"""The choice of next tokens: greedy, or drawn from one random stream for each request.

The drawn token at a position is the largest of ``logit + temperature * noise`` over the tokens that
top-k and top-p keep. With noise from Gumbel's distribution this draws from softmax(logits /
temperature) (Gumbel-max; Maddison et al. 2014). The noise is a hash of seed, request, position and
token, computed in 32-bit integers, so it is the same on every device and in every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from batchbench.batching.engines.torch.kernels import FORMATS, Native, native
from batchbench.batching.plan import Chunk
from batchbench.workloads.request import Stream
from batchbench.workloads.sampling import Sampling


class Choose(Protocol):
    """Choose a token of each row, ``[rows, vocabulary]`` to ``[rows]``.

    Without ``sampling``, the first of the largest; with it a drawn one, for ``keys`` of the noise
    as :func:`keys_at` returns them.
    """

    def __call__(
        self, logits: Tensor, sampling: Sampling | None = None, keys: Tensor | None = None
    ) -> Tensor: ...


def choose(logits: Tensor, sampling: Sampling | None = None, keys: Tensor | None = None) -> Tensor:
    """Return the next token of each row, as :class:`Choose` says."""
    if sampling is None or keys is None:
        return best_token(logits)
    if kernels := _kernels_for(logits):
        return kernels.sample(logits, keys, sampling)
    return best_token(perturbed(logits, sampling, keys))


def _is_eager_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _kernels_for(logits: Tensor) -> Native | None:
    kernels = native() if _is_eager_on_cpu(logits) else None
    return kernels if kernels and logits.dtype in FORMATS else None


def perturbed(logits: Tensor, sampling: Sampling, keys: Tensor) -> Tensor:
    """Return ``logit + temperature * noise``, and -inf for the tokens that are cut."""
    logits = logits.float()
    sums = noise(keys, logits.shape[1]).mul_(sampling.temperature).add_(logits)
    least = smallest_kept(logits, sampling)
    return sums if least is None else sums.masked_fill_(logits < least, -torch.inf)


class Chooser:
    """The choice of the next tokens of an engine's slots; ``sampling`` is None for greedy.

    ``streams``, ``[slots, 2]``, has the stream of the request in each slot. Prepared passes read
    it, so it stays where it is.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.choose: Choose = choose
        self.sampling: Sampling | None = None
        self._seated = np.zeros((slots, 2), np.int32)
        self.streams = torch.zeros(slots, 2, dtype=torch.int32, device=device)

    def seat(self, chunks: Sequence[Chunk]) -> None:
        """Note which requests are in the slots of the chunks."""
        if self.sampling is None or not chunks:
            return
        for chunk in chunks:
            self._seated[chunk.slot] = Stream(self.sampling, chunk.request.index).words
        on_cuda = self.streams.device.type == "cuda"  # MPS copies later, when the array has changed
        self.streams.copy_(torch.from_numpy(self._seated.copy()), non_blocking=on_cuda)

    def __call__(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """Return the next token of each row; each row's last token is at a position of a slot."""
        if self.sampling is None:
            return self.choose(logits)
        return self.choose(logits, self.sampling, keys_at(self.streams[slots], positions))


# The noise

# Shifts and multipliers of 32-bit hashes that Chris Wellons found by searching for little bias.
_SHORT = ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, None))
_LONG = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB), (14, None))


def _hash(x: Tensor, rounds: Sequence[tuple[int, int | None]], key: Tensor | None = None) -> Tensor:
    """Return a hash of int32 numbers; ``key`` is added after the first multiplication."""
    for shift, factor in rounds:
        x = x ^ ((x >> shift) & (2 ** (32 - shift) - 1))  # >> is arithmetic
        if factor is not None:
            x = x * (factor - 2**32 if factor >= 2**31 else factor)
        if key is not None:
            x, key = x + key, None
    return x


def keys_at(streams: Tensor, positions: Tensor) -> Tensor:
    """Return the keys of the noise at positions, ``[rows]``, of streams, ``[rows, 2]``."""
    return _hash(streams ^ positions.to(torch.int32)[:, None], _SHORT)


def noise(keys: Tensor, vocabulary: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return Gumbel noise, ``[rows, vocabulary]``, for the keys of rows, ``[rows, 2]``."""
    tokens = torch.arange(vocabulary, dtype=torch.int32, device=keys.device)
    x = _hash(tokens ^ keys[:, :1], _LONG, keys[:, 1:])
    # 31 bits as a number between 0 and 1: those near 0, which give the most noise, are the finest.
    uniform = (
        ((x >> 1) & (2**31 - 1)).float().mul_(2**-31).add_(2**-32).clamp_(max=1 - 2**-24)
    )  # below 1
    return uniform.to(dtype).neg_().log1p_().neg_().log_().neg_()


# The cuts

_LIKELY = 1024  # tokens among which a CPU looks for the cut of top-p, before it sorts all


def smallest_kept(logits: Tensor, sampling: Sampling) -> Tensor | None:
    """Return the smallest logit that is kept in each row, ``[rows, 1]``; None if all are kept."""
    vocabulary, top_p = logits.shape[1], sampling.top_p
    most = min(sampling.top_k or vocabulary, vocabulary)
    if top_p == 1:
        return logits.topk(most).values[:, -1:] if most < vocabulary else None
    top = logits.amax(-1, keepdim=True)
    weights = ((logits - top) / sampling.temperature).exp_()
    if most < vocabulary:
        values = logits.topk(most).values
        weights.masked_fill_(logits < values[:, -1:], 0)
    few = most == vocabulary and _is_eager_on_cpu(logits)
    window = min(_LIKELY, vocabulary) if few else most
    while True:
        values = logits.topk(window).values  # the largest first
        likely = ((values - top) / sampling.temperature).exp_()
        above = likely.cumsum(-1).sub_(likely)
        fits = above < top_p * weights.sum(-1, keepdim=True)
        if window == most or not fits[:, -1].any():
            last = (fits.sum(-1, keepdim=True) - 1).clamp(min=0)  # NaN fits nowhere
            return values.gather(1, last)
        window = most


# The greedy choice

_WINDOW = 256


def best_token(logits: Tensor) -> Tensor:
    """Return the greedy choice, ``[rows, vocabulary]`` to ``[rows]``; the first of equals.

    ``argmax`` and ``max`` with indices are not vectorised on a CPU. Without a native kernel the
    largest value is found first, then its place in the window that has it: several times as fast.
    """
    if kernels := _kernels_for(logits):
        return kernels.greedy(logits)
    width = logits.shape[1]
    if logits.device.type != "cpu" or width <= _WINDOW:
        return logits.max(-1).indices
    whole = width // _WINDOW * _WINDOW
    largest = logits[:, :whole].view(len(logits), whole // _WINDOW, _WINDOW).amax(-1)
    if whole < width:
        largest = torch.cat([largest, logits[:, whole:].amax(-1, keepdim=True)], 1)
    start = (largest.max(-1).indices * _WINDOW).clamp_(max=width - _WINDOW)[:, None]
    within = logits.gather(1, start + torch.arange(_WINDOW))
    return within.max(-1).indices + start[:, 0]
