"""The notebook engine: left padding, and past key-values rebuilt whenever the batch changes.

It does what most tutorials on continuous batching do: prompts are padded on the left and computed
in a pass of their own, their past key-values are padded to equal length and concatenated with those
of the running requests, and finished rows are filtered out. It follows the same plans as the slots
engine and is its baseline.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from batchbench.batching.engines.torch.attention import cache_argument
from batchbench.batching.engines.torch.base import TorchEngine
from batchbench.batching.models.loading import LoadedModel
from batchbench.batching.plan import Plan
from batchbench.errors import UsageError
from batchbench.workloads import Workload

PastKeyValues = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, ``[rows, heads, columns, head_dim]`` each."""


class NotebookEngine(TorchEngine):
    """Any causal LM of transformers, with a cache that grows by one column a step."""

    pads_prompts = True

    def __init__(self, model: LoadedModel, slots: int) -> None:
        super().__init__(model, slots)
        self._cache_argument = cache_argument(model.module)
        self._calls = 0
        self._forget()

    def begin(self, workload: Workload) -> None:
        self._model.module.set_attn_implementation("sdpa")
        super().begin(workload)

    @property
    def _computed(self) -> int:
        return self._calls

    def _forget(self) -> None:
        self._rows: list[int] = []  # slot of each row of the batch
        self._mask = torch.zeros(0, 0, dtype=torch.int64, device=self._device)
        self._past: PastKeyValues = []

    def _prepare(self, plan: Plan) -> None:
        if plan.chunks and (len(plan.slots) or any(c.start or not c.yields for c in plan.chunks)):
            raise UsageError(
                "--prefill mixed: the notebook engine computes prompts in separate passes"
            )
        if plan.released:
            self._filter([slot not in plan.released for slot in self._rows])
        super()._prepare(plan)

    def _forward(self, plan: Plan, step: int) -> Tensor:
        return self._prefill(plan) if plan.chunks else self._decode(plan, step)

    def _prefill(self, plan: Plan) -> Tensor:
        """Compute the new requests' prompts and merge them into the batch."""
        prompts = [self._workload.prompt(chunk.request.index) for chunk in plan.chunks]
        longest = max(map(len, prompts))
        ids, mask = np.zeros((2, len(prompts), longest), np.int64)
        for prompt, own_ids, own_mask in zip(prompts, ids, mask, strict=True):
            own_ids[-len(prompt) :], own_mask[-len(prompt) :] = prompt, 1
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        new_mask = self._tensor(mask)
        slots = [chunk.slot for chunk in plan.chunks]
        best, past = self._compute(self._tensor(ids), new_mask, positions, [], slots)
        columns = max(longest, self._mask.shape[1])

        def joined(dim: int, old: Tensor, new: Tensor) -> Tensor:
            return torch.cat([_left_padded(part, dim, columns) for part in (old, new)])

        self._mask = joined(1, self._mask, new_mask)
        if self._rows:
            pairs = zip(self._past, past, strict=True)
            past = [(joined(2, k, new_k), joined(2, v, new_v)) for (k, v), (new_k, new_v) in pairs]
        self._past = past
        self._rows += slots
        return best

    def _decode(self, plan: Plan, step: int) -> Tensor:
        """Compute one token for every row; columns that finished rows add are masked."""
        row_of = {slot: row for row, slot in enumerate(self._rows)}
        rows = np.array([row_of[slot] for slot in plan.slots.tolist()], np.int64)
        grows, positions = np.zeros((2, len(self._rows), 1), np.int64)
        grows[rows, 0], positions[rows, 0] = plan.growing, plan.advanced(step)
        self._mask = torch.cat([self._mask, self._tensor(grows)], 1)
        ids = self._last[self._tensor(self._rows)].unsqueeze(1)
        best, self._past = self._compute(ids, self._mask, positions, self._past, self._rows)
        return best[self._tensor(rows)]

    def _compute(
        self,
        ids: Tensor,
        mask: Tensor,
        positions: np.ndarray,
        past: PastKeyValues,
        slots: list[int],
    ) -> tuple[Tensor, PastKeyValues]:
        """Return the next token of each row, and the past key-values with this pass in them."""
        cache = DynamicCache()
        for layer, (k, v) in enumerate(past):
            cache.update(k, v, layer)
        self._calls += 1
        out = self._model.module(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(at := self._tensor(positions)),
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: cache},
        )
        best = self._chooser(out.logits[:, -1], self._tensor(slots), at[:, -1])
        return best, [(layer.keys, layer.values) for layer in cache.layers]

    def _filter(self, keep: list[bool]) -> None:
        """Drop the rows that left, and the columns on the left that only they used."""
        if not any(keep):
            self._forget()
            return
        rows = self._tensor(np.flatnonzero(keep))
        self._rows = [slot for slot, stays in zip(self._rows, keep, strict=True) if stays]
        self._mask = self._mask[rows]
        first = int(self._mask.any(0).int().argmax())
        self._mask = self._mask[:, first:]
        self._past = [(k[rows][:, :, first:], v[rows][:, :, first:]) for k, v in self._past]


def _left_padded(tensor: Tensor, dim: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor.new_zeros(shape), tensor], dim) if shape[dim] else tensor
