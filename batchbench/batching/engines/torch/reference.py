"""The reference: one plain forward pass over prompt + output of one request, without a cache."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from batchbench.batching.engines.torch.base import best_token
from batchbench.batching.models.loading import LoadedModel, free_bytes
from batchbench.batching.verification import Deviation

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
        self, prompt: NDArray[np.int32], output: NDArray[np.int32]
    ) -> Sequence[Deviation]:
        """Return the positions of ``output`` at which the model alone prefers another token."""
        sequence = torch.from_numpy(np.concatenate([prompt, output[:-1]]).astype(np.int64))[None]
        generated = torch.from_numpy(output.astype(np.int64))
        logits = self._logits(self._model.module, sequence, len(output))
        finite = torch.isfinite(logits).all(-1)
        if not finite.all():  # the model did not choose this token, whatever it is
            return [Deviation(int(torch.nonzero(~finite)[0]), math.inf, 0.0)]
        differs = torch.flatten(torch.nonzero(best_token(logits) != generated))
        if not len(differs):
            return []
        precise = self._logits(self._more_precise(), sequence, len(output))[differs].double()
        error = logits[differs].double() - precise
        tolerance = TIE * (error - error.mean(-1, keepdim=True)).square().mean(-1).sqrt()
        chosen = precise.gather(-1, generated[differs, None])[:, 0]
        gap = precise.max(-1).values - chosen
        rows = zip(differs.tolist(), gap.tolist(), tolerance.tolist(), strict=True)
        return [Deviation(index, gap, bound) for index, gap, bound in rows]

    @staticmethod
    def _logits(model: torch.nn.Module, sequence: torch.Tensor, keep: int) -> torch.Tensor:
        device = next(model.parameters()).device
        positions = torch.arange(sequence.shape[1], device=device)[None]
        ids = sequence.to(device)
        out = model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep)
        logits: torch.Tensor = out.logits[0].cpu()
        return logits

    def _more_precise(self) -> torch.nn.Module:
        """Return the same weights in float32, or in float64 if they are float32.

        The copy is made for the first difference, on the host if the device has no room.
        """
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
