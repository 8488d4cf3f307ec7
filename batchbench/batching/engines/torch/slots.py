"""The slots engine: one preallocated cache, in which each request has a slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from batchbench.batching.engines.torch import graphs
from batchbench.batching.engines.torch.architecture import describe
from batchbench.batching.engines.torch.attention import Layout, Prompts, SlotCache, aligned
from batchbench.batching.engines.torch.base import TorchEngine
from batchbench.batching.engines.torch.forward import Forward, make_forward
from batchbench.batching.engines.torch.triton.choice import triton_attention
from batchbench.batching.models.loading import LoadedModel
from batchbench.batching.plan import Chunk, Plan
from batchbench.errors import UsageError
from batchbench.workloads.sampling import Sampling


class SlotsEngine(TorchEngine):
    """Any causal LM over a :class:`SlotCache`; a pass may hold decoding rows and prompt chunks.

    ``max_len`` is the longest prompt + output in tokens; ``forward`` is by default the leanest
    correct pass; ``sampling`` is that of the first workload; ``execution`` is eager, graph or
    compile, and is of passes that only decode; with Triton's attention, graphs hold passes with up
    to ``most_tokens`` tokens of prompts too. Raises RuntimeError if they cannot be prepared so.
    """

    def __init__(
        self,
        model: LoadedModel,
        slots: int,
        max_len: int,
        forward: Forward | None = None,
        execution: str = "eager",
        most_tokens: int | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        super().__init__(model, slots)
        _check_window(model, max_len)
        max_len, config = aligned(max_len, model.device), model.module.config
        self.execution = execution
        self._pass = forward or make_forward(model)
        self._chooser.choose, self._chooser.sampling = self._pass.choose, sampling
        self.triton = self._pass.triton
        self._passes = 0
        like = torch.empty(0, dtype=self._pass.cache_dtype, device=model.device)
        own = triton_attention(model, slots, max_len) if self._pass.triton else None
        together = execution != "compile"
        self._cache = SlotCache(config, slots, max_len, like, own, together=together)
        self._written = np.zeros(slots, np.int64)  # positions of each slot that are not zero
        self._positions_of_cache = torch.arange(max_len, device=model.device)
        self._prepared: graphs.PreparedDecode | None = None
        self._mixed: graphs.PreparedMixed | None = None
        self._replaying: graphs.PreparedDecode | graphs.PreparedMixed | None = None
        self._most = max_len, most_tokens or slots * max_len
        self._sampling_changed()

    @torch.inference_mode()
    def _sampling_changed(self) -> None:
        if self.execution == "eager":
            return
        self._prepared = self._mixed = self._replaying = None
        max_len, most_tokens = self._most
        records = self.execution == "graph"
        prepare = (graphs.Capture if records else graphs.Compile)(self._device)
        args = (self._pass, self._cache, self._last, self._chooser, prepare)
        if records and self._cache.attention is not None:
            self._mixed = graphs.PreparedMixed(*args, most_tokens)
        # Compiling takes half a minute a size, so it is done for the full batch only.
        self._prepared = graphs.PreparedDecode(*args, max_len, every_batch=records)

    @property
    def _computed(self) -> int:
        replayed = sum(prepared.calls for prepared in (self._prepared, self._mixed) if prepared)
        return self._passes + replayed

    def _forget(self) -> None:
        self._cache.clear()  # before the clock starts, not at the first prefill
        self._written[:] = 0

    def _erase_behind(self, plan: Plan) -> None:
        """Zero what earlier requests left in the slots beyond the new requests' prompts.

        The mask hides it, but an infinity or NaN would survive the mask. A GPU's own attention
        has no mask: it does not read them.
        """
        if self._cache.attention is not None:
            return
        for chunk in plan.chunks:
            written = int(self._written[chunk.slot])
            if chunk.start == 0 and chunk.stop < written:
                self._cache.erase(chunk.slot, chunk.stop, written)
                written = 0
            self._written[chunk.slot] = max(written, chunk.stop)
        ends = plan.advanced(plan.repeat - 1) + 1
        self._written[plan.slots] = np.maximum(self._written[plan.slots], ends)

    def _prepare(self, plan: Plan) -> None:
        self._erase_behind(plan)
        chunks, decoding = plan.chunks, len(plan.slots)
        if self._prepared is not None and not chunks:
            self._replaying = self._prepared
            self._prepared.aim(plan)
            return
        pieces = [self._workload.prompt(c.request.index)[c.start : c.stop] for c in chunks]
        prompt_ids = np.concatenate([np.zeros(0, np.int64), *pieces])
        if self._mixed is not None and self._mixed.takes(decoding + len(prompt_ids)):
            self._replaying = self._mixed
            self._mixed.aim(plan, prompt_ids)
            return
        self._replaying = None
        super()._prepare(plan)
        self._prompt_ids = self._tensor(prompt_ids)
        counts, _, _, yields = graphs.pieces_of(plan)
        ends = np.cumsum(counts)  # of the pieces in the pass
        self._keep = self._tensor(ends[yields] - 1) if chunks else None
        self._growing = self._tensor(plan.growing)
        self._layout = self._lay_out(plan, (ends - counts)[decoding:].tolist())

    def _lay_out(self, plan: Plan, firsts: Sequence[int]) -> Layout:
        """Assign each token of the pass to its request; ``firsts`` is where each chunk begins."""
        chunks, decoding = plan.chunks, len(plan.slots)
        slots, positions = map(self._tensor, graphs.places_of(plan))
        layout = Layout(self._cache, slots, positions, decoding)
        if self._cache.attention is not None:
            if chunks:
                tiles, layout.tile = graphs.tiles_of(plan)
                layout.tiles = self._tensor(tiles)
            return layout
        if decoding:
            layout.low, layout.high = int(plan.slots[0]), int(plan.slots[-1]) + 1
            whole = layout.high - layout.low == decoding
            layout.rows = None if whole else self._tensor(plan.slots - layout.low)
        placed = list(zip(firsts, chunks, strict=True))
        layout.fresh = list(self._padded([(first, c) for first, c in placed if c.start == 0]))
        layout.continued = [(first, c, self._mask_of(c)) for first, c in placed if c.start > 0]
        return layout

    def _advance(self, plan: Plan, step: int) -> None:
        if self._replaying is not None:
            self._replaying.run(plan, step)
        else:
            super()._advance(plan, step)

    def _forward(self, plan: Plan, step: int) -> Tensor:
        layout, ids, keep = self._layout, self._prompt_ids, self._keep
        if layout.decoding:
            positions = layout.positions + self._growing if step else layout.positions
            length = aligned(int(plan.advanced(step).max()) + 1, self._device)
            layout = self._layout = replace(layout, positions=positions, length=length)
            decoded = self._last[layout.slots[: layout.decoding]]
            ids = torch.cat([decoded, ids]) if plan.chunks else decoded
        slots, positions = layout.slots, layout.positions
        if keep is not None and self._chooser.sampling is not None:
            slots, positions = slots[keep], positions[keep]
        logits = self._forward_pass(ids, layout, keep)
        return self._chooser(logits, slots, positions)

    def _forward_pass(self, ids: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        self._passes += 1
        return self._pass(ids, layout, keep)

    def _padded(self, placed: Sequence[tuple[int, Chunk]]) -> Iterator[Prompts]:
        """Group first chunks by length, within a factor of two, and pad them on the right."""
        pieces = sorted(((first, c.stop) for first, c in placed), key=lambda piece: piece[1])
        for _, group in groupby(pieces, key=lambda piece: (piece[1] - 1).bit_length()):
            first, length = np.array(list(group), np.int64).T
            offset = np.arange(length.max())
            valid = offset < length[:, None]
            gather = first[:, None] + np.minimum(offset, length[:, None] - 1)
            yield Prompts(
                self._tensor(gather),
                self._tensor(np.flatnonzero(valid)),  # a mask would be counted, with a wait
                self._tensor(gather[valid]),
            )

    def _mask_of(self, chunk: Chunk) -> Tensor:
        """Return the mask of a later chunk of a prompt, which attends to all before it."""
        own = self._positions_of_cache[chunk.start : chunk.stop]
        return self._positions_of_cache[: chunk.stop] <= own[:, None]


def _check_window(model: LoadedModel, max_len: int) -> None:
    """Raise UsageError if a request may be longer than the model's sliding window."""
    config = model.module.config
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return
    if max_len > window or isinstance(describe(config), str):
        raise UsageError(
            f"--engine slots: {model.source.name} attends through a sliding window of {window} "
            f"tokens, which the slot cache does not have; use --engine notebook"
        )
