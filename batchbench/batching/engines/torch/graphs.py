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
from batchbench.batching.engines.torch.sampling import Chooser
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
        chooser: Chooser,
        max_len: int,
        prepare: Prepare,
        *,
        every_batch: bool = True,
    ) -> None:
        slots = len(last)
        self._forward, self._cache, self._last = forward, cache, last
        self._chooser = chooser
        self.calls = 0  # passes that were replayed
        self._slots = torch.arange(slots, device=last.device)
        aims = torch.zeros(2, slots, dtype=torch.int64, device=last.device)
        self._aim = Upload(aims)
        self._positions, self._growing = aims
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
        aims = np.zeros((2, len(self._slots)), np.int64)
        aims[:, plan.slots] = plan.positions, plan.growing
        self._aim(aims)

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
            last.copy_(self._chooser(self._forward(last, layout, None), slots, positions))
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


WARM_UPS = 3
"""Runs of a pass before it is recorded."""


class Upload:
    """Copies of arrays to one tensor on the device, without a wait of the host.

    CUDA copies from pinned memory when the copy's turn comes, so an array lies in one of several
    buffers until then. Elsewhere the copy waits.
    """

    BUFFERS = 4

    def __init__(self, target: torch.Tensor) -> None:
        self._target, self._turn = target, 0
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        if target.device.type == "cuda":
            for _ in range(self.BUFFERS):
                buffer = torch.zeros(target.shape, dtype=target.dtype).pin_memory()
                self._buffers.append((buffer, torch.cuda.Event()))  # type: ignore[no-untyped-call]

    def __call__(self, values: np.ndarray) -> None:
        if not self._buffers:
            self._target.copy_(torch.from_numpy(values))
            return
        buffer, copied = self._buffers[self._turn]
        self._turn = (self._turn + 1) % self.BUFFERS
        if not copied.query():  # type: ignore[no-untyped-call]
            copied.synchronize()
        buffer.copy_(torch.from_numpy(values))
        self._target.copy_(buffer, non_blocking=True)
        copied.record(torch.cuda.current_stream(self._target.device))


class Capture:
    """Record passes as CUDA graphs that share one pool of memory, since only one runs at a time.

    They share one stream too: torch keeps a workspace of cuBLAS for each stream, 32 MiB on Hopper.
    It is the device's; without one, torch would record on a stream of the current device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, run: Pass) -> Pass:
        # Runs first, in which libraries set themselves up.
        main = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                run()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                run()
        except BaseException:
            torch.cuda.set_stream(main)  # torch leaves the stream of a failed capture current
            raise
        main.wait_stream(self._stream)
        replay: Pass = graph.replay
        replay()  # the first time uploads the graph
        return replay


class Compile:
    """Compile passes with inductor for exactly their shapes; on CUDA, then record them."""

    def __init__(self, device: torch.device) -> None:
        with warnings.catch_warnings():  # where there is a GPU, it imports all of the compiler
            warnings.simplefilter("ignore")
            torch.compiler.reset()  # passes of an earlier engine count against the same small limit
        self._record: Prepare = Capture(device) if device.type == "cuda" else lambda run: run

    def __call__(self, run: Pass) -> Pass:
        with warnings.catch_warnings():  # the compiler warns about its own parts
            warnings.simplefilter("ignore")
            compiled = torch.compile(run, dynamic=False)
            compiled()
            return self._record(compiled)
