"""Decode passes of fixed shape, prepared before the first trial: CUDA graphs, or compiled code.

While nobody joins and nobody leaves, a pass does the same thing to the same memory, so its kernels
can be recorded once and replayed without the host naming each of them again. Shapes come in few
sizes: a pass computes the first ``rows`` slots over the first ``length`` positions of the cache.
A slot among them that does not decode is computed all the same: it writes to its first position,
which whoever takes the slot overwrites, and nobody reads its token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch

from batchbench.batching.engines.torch.attention import Layout, SlotCache
from batchbench.batching.engines.torch.base import best_token
from batchbench.batching.engines.torch.forward import Forward
from batchbench.batching.plan import Plan

Pass = Callable[[], None]
Prepare = Callable[[Pass], Pass]
"""Makes of a pass something that does the same without deciding it anew."""

_SHORTEST = 64
"""Smallest size of the cache that is read; halving it again would save no time worth a graph."""


class PreparedDecode:
    """One prepared pass for each size of batch and cache.

    Args:
        last: the last token of every slot, ``[slots]``; read and written.
        max_len: most positions that a slot may hold.
        prepare: :func:`captured` or :func:`compiled`.
        every_batch: prepare the halves, quarters … of the batch too.
    """

    def __init__(
        self,
        forward: Forward,
        cache: SlotCache,
        last: torch.Tensor,
        max_len: int,
        prepare: Prepare,
        *,
        every_batch: bool = True,
    ) -> None:
        slots = len(last)
        self._forward, self._cache, self._last = forward, cache, last
        self.calls = 0  # passes that were replayed
        self._slots = torch.arange(slots, device=last.device)
        self._positions = torch.zeros_like(last)
        self._growing = torch.zeros_like(last)
        self.batches = sizes(1, slots) if every_batch else (slots,)
        self.lengths = sizes(_SHORTEST, max_len)
        # The largest first: the others then fit into the memory that it leaves in their pool.
        self._passes = {
            (rows, length): prepare(self._pass(rows, length))
            for rows in reversed(self.batches)
            for length in reversed(self.lengths)
        }

    def aim(self, plan: Plan) -> None:
        """Take the positions of a plan's first pass."""
        positions, growing = np.zeros((2, len(self._slots)), np.int64)
        positions[plan.slots], growing[plan.slots] = plan.positions, plan.growing
        self._positions.copy_(torch.from_numpy(positions), non_blocking=True)
        self._growing.copy_(torch.from_numpy(growing), non_blocking=True)

    def run(self, plan: Plan, step: int) -> None:
        """Compute the next pass of the plan, the ``step``-th; the last tokens are its outcome."""
        rows = fitting(self.batches, int(plan.slots[-1]) + 1)
        length = fitting(self.lengths, int(plan.advanced(step).max()) + 1)
        self._passes[rows, length]()
        self.calls += 1

    def _pass(self, rows: int, length: int) -> Pass:
        last, positions = self._last[:rows], self._positions[:rows]
        growing, slots = self._growing[:rows], self._slots[:rows]

        def decode() -> None:
            layout = Layout(self._cache, slots, positions, rows, low=0, high=rows, length=length)
            last.copy_(best_token(self._forward(last, layout, None)))
            positions.add_(growing)

        return decode


def sizes(smallest: int, largest: int) -> tuple[int, ...]:
    """``smallest`` and its doubles below ``largest``, then ``largest``."""
    found = []
    while smallest < largest:
        found.append(smallest)
        smallest *= 2
    return (*found, largest)


def fitting(sizes: tuple[int, ...], wanted: int) -> int:
    """The smallest size that is at least ``wanted``."""
    return next(size for size in sizes if size >= wanted)


class Capture:
    """Records passes as CUDA graphs that share one pool of memory: only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Pass) -> Pass:
        """Run it thrice beside the main stream, as libraries set themselves up, then record it."""
        main = torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        replay: Pass = graph.replay
        return replay


class Compile:
    """Compiles passes with inductor; on CUDA what comes out is recorded as a graph besides."""

    def __init__(self, device: torch.device) -> None:
        torch.compiler.reset()  # passes of an earlier engine count against the same small limit
        self._then: Prepare = Capture(device) if device.type == "cuda" else lambda run: run

    def __call__(self, run: Pass) -> Pass:
        """Compile for exactly these shapes, here and now."""
        with warnings.catch_warnings():  # of the compiler's own parts, about one another
            warnings.simplefilter("ignore")
            compiled = torch.compile(run, dynamic=False)
            compiled()
            return self._then(compiled)
