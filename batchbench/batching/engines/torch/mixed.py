"""Passes with chunks of prompts on a GPU's own attention: their tiles, and their graphs.

Attention computes tiles of tokens that belong to one request; a decoding row is a tile of one
token. The number of tokens of a pass is rounded up to 16, 32, 64 … 512, so a few CUDA graphs serve
all passes up to that size. Longer passes are launched one kernel after another, which takes less
time than their computation.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from batchbench.batching.engines.torch.attention import Layout, SlotCache
from batchbench.batching.engines.torch.forward import Forward
from batchbench.batching.engines.torch.graphs import Pass, Prepare, Upload, fitting
from batchbench.batching.engines.torch.sampling import Chooser
from batchbench.batching.plan import Plan

Ints = NDArray[np.int64]

SHORTEST, LONGEST = 16, 512
"""Smallest and largest number of tokens of a graph."""

_COLUMNS = 5
_NONE = -1


def tile_size(tokens: int) -> int:
    """Return the tokens of a tile for a pass of so many tokens."""
    return 16 if tokens <= LONGEST else 64


def most_tiles(tokens: int, pieces: int) -> int:
    """Return the most tiles that a pass of ``tokens`` in at most so many pieces can have."""
    return min(tokens, pieces + tokens // tile_size(tokens))


def tiles_of(plan: Plan) -> tuple[Ints, int]:
    """Return the tiles of a pass, ``[tiles, 5]``, and their size; decoding rows come first."""
    chunks = plan.chunks
    counts = np.array([1] * len(plan.slots) + [c.stop - c.start for c in chunks], np.int64)
    slots = np.array([*plan.slots, *(c.slot for c in chunks)], np.int64)
    starts = np.array([*plan.positions, *(c.start for c in chunks)], np.int64)
    size = tile_size(int(counts.sum()))
    return lay_tiles(counts, slots, starts, size), size


def lay_tiles(counts: Ints, slots: Ints, starts: Ints, size: int) -> Ints:
    """Cut pieces that lie end to end into tiles of up to ``size`` tokens, ``[tiles, 5]``.

    Piece i has ``counts[i]`` tokens and begins at position ``starts[i]`` of ``slots[i]``. The
    columns are a tile's first token and its count, and the piece's first token, slot and start.
    """
    first = np.cumsum(counts) - counts
    tiles = -(-counts // size)
    piece = np.repeat(np.arange(len(counts)), tiles)
    nth = np.arange(len(piece)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    token = first[piece] + nth * size
    count = np.minimum(size, first[piece] + counts[piece] - token)
    return np.stack([token, count, first[piece], slots[piece], starts[piece]], 1)


def tokens_of(plan: Plan) -> int:
    """Return the number of tokens that a pass computes."""
    return len(plan.slots) + sum(chunk.stop - chunk.start for chunk in plan.chunks)


class _Inputs:
    """Everything that a pass of up to ``tokens`` tokens reads, in one tensor: one copy fills it.

    An id below 0 names a slot, whose last token is meant: -1 is slot 0. Unused tokens have id and
    position 0; unused tiles have no token. ``keep`` has the token of the pass that yields the next
    one of each slot, or _NONE.
    """

    def __init__(self, tokens: int, slots: int, device: torch.device) -> None:
        self.tokens = tokens
        tiles = most_tiles(tokens, slots) * _COLUMNS
        self._parts = np.cumsum([tokens, tokens, tiles]).tolist()
        length = self._parts[-1] + slots
        self._all = torch.zeros(length, dtype=torch.int64, device=device)
        self._upload = Upload(self._all)
        parts = self._all.tensor_split(self._parts)
        self.ids, self.positions, flat, self.keep = parts
        self.tiles = flat.view(-1, _COLUMNS)
        self.keep.fill_(_NONE)

    def fill(self, plan: Plan, prompt_ids: Ints) -> None:
        array = np.zeros(len(self._all), np.int64)
        ids, positions, flat, keep = np.split(array, self._parts)
        rows, chunks = len(plan.slots), plan.chunks
        total = tokens_of(plan)
        ids[:rows], ids[rows:total] = -1 - plan.slots, prompt_ids
        spans = [plan.positions, *(np.arange(c.start, c.stop) for c in chunks)]
        positions[:total] = np.concatenate(spans)
        tiles, _ = tiles_of(plan)
        flat[: tiles.size] = tiles.flatten()
        ends = rows + np.cumsum([c.stop - c.start for c in chunks])
        keep[:] = _NONE
        keep[plan.slots] = np.arange(rows)
        for end, chunk in zip(ends, chunks, strict=True):
            if chunk.yields:
                keep[chunk.slot] = end - 1
        self._upload(array)


class PreparedMixed:
    """One prepared pass with chunks for each number of tokens.

    A pass reads and writes ``last``, the last token of every slot, ``[slots]``. ``most_tokens`` is
    the most that any pass computes.
    """

    def __init__(
        self,
        forward: Forward,
        cache: SlotCache,
        last: torch.Tensor,
        chooser: Chooser,
        prepare: Prepare,
        most_tokens: int,
    ) -> None:
        self._forward, self._cache, self._last = forward, cache, last
        self._chooser, self._slots = chooser, torch.arange(len(last), device=last.device)
        self.calls = 0  # passes that were replayed
        self.sizes = [SHORTEST]
        while self.sizes[-1] < min(most_tokens, LONGEST):
            self.sizes.append(2 * self.sizes[-1])
        self._inputs = {size: _Inputs(size, len(last), last.device) for size in self.sizes}
        self._nowhere = last.new_zeros(0)
        # The largest first: the others then fit into the memory that it leaves in their pool.
        self._passes = {size: prepare(self._pass(size)) for size in reversed(self.sizes)}

    def takes(self, plan: Plan) -> bool:
        """Return True if a pass was prepared for a plan."""
        return bool(plan.chunks) and tokens_of(plan) <= self.sizes[-1]

    def aim(self, plan: Plan, prompt_ids: Ints) -> None:
        """Set the inputs of the next pass; ``prompt_ids`` are the tokens of all chunks."""
        self._size = fitting(tuple(self.sizes), tokens_of(plan))
        self._inputs[self._size].fill(plan, prompt_ids)

    def run(self) -> None:
        """Compute the pass and store its tokens."""
        self._passes[self._size]()
        self.calls += 1

    def _pass(self, size: int) -> Pass:
        inputs, last = self._inputs[size], self._last

        def compute() -> None:
            decoded = last[(-1 - inputs.ids).clamp_(min=0)]
            ids = torch.where(inputs.ids < 0, decoded, inputs.ids)
            layout = Layout(self._cache, self._nowhere, inputs.positions, 0)
            layout.tiles, layout.tile = inputs.tiles, tile_size(size)
            keep = inputs.keep.clamp(min=0)
            logits = self._forward(ids, layout, keep)
            chosen = self._chooser(logits, self._slots, inputs.positions[keep])
            last.copy_(torch.where(inputs.keep == _NONE, last, chosen))

        return compute
