"""Decode passes of fixed shape, prepared before the first trial: CUDA graphs, or compiled code.

While the batch does not change, each pass runs the same kernels on the same memory, so they can be
recorded once and replayed without launching each from the host. There are few shapes: a pass
computes the first ``rows`` slots over the first ``length`` positions of the cache. A slot among
them that does not decode is computed too: it writes to its first position, which the slot's next
request overwrites, and its token is ignored.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch

from batchbench.batching.engines.torch.attention import Layout, SlotCache
from batchbench.batching.engines.torch.forward import Forward
from batchbench.batching.plan import Plan

Pass = Callable[[], None]
Prepare = Callable[[Pass], Pass]
"""Return a faster function that does the same as a pass: :class:`Capture` or :class:`Compile`."""

_SHORTEST = 64
"""Minimum number of cache positions of a prepared pass; with fewer, no time is saved."""


class PreparedDecode:
    """One prepared pass for each size of batch and cache.

    A pass reads and writes ``last``, the last token of every slot, ``[slots]``. With
    ``every_batch`` the halves, quarters … of the batch are prepared too.
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
        # A GPU's own attention reads each row's length on the device: one pass is for all lengths.
        masked = cache.attention is None
        self.lengths = sizes(_SHORTEST, max_len) if masked else (max_len,)
        # The largest first: the others then fit into the memory that it leaves in their pool.
        self._passes = {
            (rows, length): prepare(self._pass(rows, length))
            for rows in reversed(self.batches)
            for length in reversed(self.lengths)
        }

    def aim(self, plan: Plan) -> None:
        positions, growing = np.zeros((2, len(self._slots)), np.int64)
        positions[plan.slots], growing[plan.slots] = plan.positions, plan.growing
        self._positions.copy_(torch.from_numpy(positions), non_blocking=True)
        self._growing.copy_(torch.from_numpy(growing), non_blocking=True)

    def run(self, plan: Plan, step: int) -> None:
        """Compute the next pass of the plan, the ``step``-th, and store its tokens."""
        rows = fitting(self.batches, int(plan.slots[-1]) + 1)
        length = fitting(self.lengths, int(plan.advanced(step).max()) + 1)
        self._passes[rows, length]()
        self.calls += 1

    def _pass(self, rows: int, length: int) -> Pass:
        last, positions = self._last[:rows], self._positions[:rows]
        growing, slots = self._growing[:rows], self._slots[:rows]

        def decode() -> None:
            layout = Layout(self._cache, slots, positions, rows, low=0, high=rows, length=length)
            last.copy_(self._forward.choose(self._forward(last, layout, None)))
            positions.add_(growing)

        return decode


def sizes(smallest: int, largest: int) -> tuple[int, ...]:
    """Return ``smallest`` and its doubles below ``largest``, then ``largest``."""
    doubles = []
    while smallest < largest:
        doubles.append(smallest)
        smallest *= 2
    return (*doubles, largest)


def fitting(sizes: tuple[int, ...], wanted: int) -> int:
    return next(size for size in sizes if size >= wanted)


class Capture:
    """Record passes as CUDA graphs that share one pool of memory, since only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Pass) -> Pass:
        # Three runs on a side stream first, in which libraries set themselves up.
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
    """Compile passes with inductor for exactly their shapes; on CUDA, then record them."""

    def __init__(self, device: torch.device) -> None:
        torch.compiler.reset()  # passes of an earlier engine count against the same small limit
        self._record: Prepare = Capture(device) if device.type == "cuda" else lambda run: run

    def __call__(self, run: Pass) -> Pass:
        with warnings.catch_warnings():  # the compiler warns about its own parts
            warnings.simplefilter("ignore")
            compiled = torch.compile(run, dynamic=False)
            compiled()
            return self._record(compiled)
