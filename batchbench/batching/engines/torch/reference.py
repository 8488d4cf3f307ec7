"""The reference: one plain forward pass over prompt + output of one request, without a cache."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchbench.batching.engines.torch.sampling import best_token, keys_at, noise, perturbed
from batchbench.batching.models.loading import LoadedModel, free_bytes
from batchbench.batching.verification import Deviation
from batchbench.workloads.request import Stream
from batchbench.workloads.sampling import Sampling

TIE = 8.0
"""Two logits are a tie when they differ by less than this many times the error of a logit. The
error is measured at the same position: the root mean square, over the vocabulary, of the change
that a higher precision makes. Both sides of a comparison have that error (docs/verification.md)."""


class TeacherForced:
    """Read a whole sequence at once, and compare each token with the model's own choice."""

    name = "teacher-forced: one plain forward pass over prompt + output, alone, without a cache"

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        model.module.set_attn_implementation("sdpa")
        self._precise: torch.nn.Module | None = None

    @torch.inference_mode()
    def deviations(
        self, prompt: NDArray[np.int32], output: NDArray[np.int32], stream: Stream | None = None
    ) -> Sequence[Deviation]:
        """Return the positions of ``output`` at which the model alone chooses another token."""
        sequence = torch.from_numpy(np.concatenate([prompt, output[:-1]]).astype(np.int64))[None]
        generated = torch.from_numpy(output.astype(np.int64))
        logits = self._logits(self._model.module, sequence, len(output))
        finite = torch.isfinite(logits).all(-1)
        if not finite.all():  # the model did not choose this token, whatever it is
            return [Deviation(int(torch.nonzero(~finite)[0]), math.inf, 0.0)]
        if stream is None:
            chosen = best_token(logits)
        else:
            at = torch.arange(len(output)) + (len(prompt) - 1)
            keys = keys_at(torch.from_numpy(stream.words)[None], at)
            chosen = best_token(perturbed(logits, stream.sampling, keys))
        differs = torch.flatten(torch.nonzero(chosen != generated))
        if not len(differs):
            return []
        precise = self._logits(self._more_precise(), sequence, len(output))[differs].double()
        error = logits[differs].double() - precise
        tolerance = TIE * (error - error.mean(-1, keepdim=True)).square().mean(-1).sqrt()
        tokens = generated[differs, None]
        if stream is None:
            gap = precise.max(-1).values - precise.gather(-1, tokens)[:, 0]
        else:
            gap = _change_to_draw(tokens, precise, stream.sampling, keys[differs])
            largest = precise.abs().amax(-1) + _MOST_NOISE * stream.sampling.temperature
            tolerance += _ROUNDING * largest
        rows = zip(differs.tolist(), gap.tolist(), tolerance.tolist(), strict=True)
        return [Deviation(index, gap, bound) for index, gap, bound in rows]

    @staticmethod
    def _logits(model: torch.nn.Module, sequence: Tensor, keep: int) -> Tensor:
        device = next(model.parameters()).device
        positions = torch.arange(sequence.shape[1], device=device)[None]
        ids = sequence.to(device)
        out = model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep)
        logits: Tensor = out.logits[0].cpu()
        return logits

    def _more_precise(self) -> torch.nn.Module:
        """Return the model in float32, or in float64 if it is float32; on the host if too large."""
        if self._precise is None:
            dtype = torch.float64 if self._model.dtype is torch.float32 else torch.float32
            device = self._model.device
            needed = self._model.weight_bytes * dtype.itemsize // self._model.dtype.itemsize
            if device.type == "mps" or needed * 1.2 > free_bytes(device):
                device = torch.device("cpu")
            try:
                self._precise = _copied(self._model.module, device, dtype)
            except torch.OutOfMemoryError:
                self._precise = _copied(self._model.module, torch.device("cpu"), dtype)
        return self._precise


def _copied(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Return a copy on a device and in a number format; no weight is copied twice."""
    copies: dict[int, object] = {}
    for weight in module.parameters():
        copies[id(weight)] = torch.nn.Parameter(weight.to(device, dtype, copy=True), False)
    for buffer in module.buffers():
        kind = dtype if buffer.is_floating_point() else buffer.dtype
        copies[id(buffer)] = buffer.to(device, kind, copy=True)
    return copy.deepcopy(module, copies)


_MOST_NOISE = 32.0  # a bound
_ROUNDING = 2.0**-22  # error of a sum of logit and noise in float32, as a share of the largest sum
_MASS_ROUNDING = 1e-5  # error of a sum of probabilities over the vocabulary in float32


def _change_to_draw(tokens: Tensor, logits: Tensor, sampling: Sampling, keys: Tensor) -> Tensor:
    """Return the smallest change of logits for which ``tokens``, ``[rows, 1]``, are drawn.

    Every token that is ahead with its noise must fall behind or be cut, and the drawn one must be
    kept by top-k and top-p.
    """
    sums = logits + sampling.temperature * noise(keys, logits.shape[1], logits.dtype)
    enter, leave = torch.zeros_like(logits), torch.full_like(logits, torch.inf)
    probabilities = (logits / sampling.temperature).softmax(-1)
    if 0 < sampling.top_k < logits.shape[1]:
        edge = logits.topk(sampling.top_k).values[:, -1:]
        enter, leave = _distances(logits, edge)
        probabilities = probabilities.masked_fill(logits < edge, 0)
    if sampling.top_p < 1:
        probabilities /= probabilities.sum(-1, keepdim=True)
        ordered, order = logits.sort(-1, descending=True)
        likely = probabilities.gather(1, order)
        above = likely.cumsum(-1) - likely
        edge = ordered.gather(1, (above < sampling.top_p).sum(-1, keepdim=True) - 1)
        to_enter, to_leave = _distances(logits, edge)
        # The cut also moves if the tokens above gain or lose probability.
        above = torch.empty_like(above).scatter_(1, order, above)
        odds = math.log(sampling.top_p / (1 - sampling.top_p))
        fall = (above - _MASS_ROUNDING).logit(1e-300) - odds
        rise = odds - (above + _MASS_ROUNDING).logit(1e-300)
        enter = torch.maximum(enter, torch.minimum(to_enter, sampling.temperature * fall.clamp(0)))
        to_leave = torch.minimum(to_leave, sampling.temperature * rise.clamp(0))
        leave = torch.minimum(leave, to_leave)
    ahead = sums - sums.gather(1, tokens)
    return torch.maximum(torch.minimum(ahead, leave).amax(-1), enter.gather(1, tokens)[:, 0])


def _distances(logits: Tensor, edge: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far each token is below the least kept one, ``edge``, or above all cut ones."""
    below = logits.masked_fill(logits >= edge, -torch.inf).amax(-1, keepdim=True)
    above = torch.where(logits >= edge, logits - below, 0.0)
    return (edge - logits).clamp(min=0), above
