"""Passes of fixed shape, prepared before the first trial: CUDA graphs, or compiled code.

While the batch does not change, each pass runs the same kernels on the same memory, so they can be
recorded once and replayed without launching each from the host. There are few shapes: a pass
computes the first ``rows`` slots over the first ``length`` positions of the cache. A slot among
them that does not decode is computed too: it writes to its first position, which the slot's next
request overwrites, and its token is ignored.

With a GPU's own attention, passes with chunks of prompts are prepared too. It computes tiles of
tokens that belong to one request; a decoding row is a tile of one token. The number of tokens of a
pass is rounded up to 16, 32, 64 … 512. Longer passes are launched one kernel after another, which
takes less time than their computation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchbench.batching.engines.torch.attention import Layout, SlotCache
from batchbench.batching.engines.torch.forward import Forward
from batchbench.batching.engines.torch.sampling import Chooser
from batchbench.batching.plan import Plan
from batchbench.batching.recording import Ints

Pass = Callable[[], None]
Prepare = Callable[[Pass], Pass]
"""Return a faster function that does the same as a pass: :class:`Capture` or :class:`Compile`."""

_SHORTEST = 64  # fewest cache positions of a prepared pass; with fewer, no time is saved


class PreparedDecode:
    """One prepared pass for each size of batch and cache.

    A pass reads and writes ``last``, the last token of every slot, ``[slots]``. With
    ``every_batch`` the halves, quarters … of the batch are prepared too.
    """

    def __init__(
        self,
        forward: Forward,
        cache: SlotCache,
        last: Tensor,
        chooser: Chooser,
        prepare: Prepare,
        max_len: int,
        *,
        every_batch: bool = True,
    ) -> None:
        slots = len(last)
        self._forward, self._cache, self._last, self._chooser = forward, cache, last, chooser
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


def fitting(sizes: Sequence[int], wanted: int) -> int:
    return next(size for size in sizes if size >= wanted)


WARM_UPS = 3  # runs of a pass before it is recorded


class Upload:
    """Copies of arrays to one tensor on the device, without a wait of the host.

    CUDA copies from pinned memory when the copy's turn comes, so an array lies in one of several
    buffers until then. Elsewhere the copy waits.
    """

    BUFFERS = 4

    def __init__(self, target: Tensor) -> None:
        self._target, self._turn = target, 0
        self._buffers: list[tuple[Tensor, torch.cuda.Event]] = []
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

    They share a stream of the device too: torch keeps 32 MiB of cuBLAS for each, on Hopper.
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


# Passes with chunks of prompts

SMALLEST, LARGEST = 16, 512  # tokens of the smallest and the largest prepared pass with chunks
_COLUMNS = 5  # of a tile
_NONE = -1


def tile_size(tokens: int) -> int:
    """Return the tokens of a tile for a pass of so many tokens."""
    return 16 if tokens <= LARGEST else 64


def most_tiles(tokens: int, pieces: int) -> int:
    """Return the most tiles that a pass of ``tokens`` in at most so many pieces can have."""
    return min(tokens, pieces + tokens // tile_size(tokens))


def pieces_of(plan: Plan) -> tuple[Ints, Ints, Ints, NDArray[np.bool_]]:
    """Return tokens, slot and position of each decoding row and chunk, and if it yields a token."""
    rows = np.ones((len(plan.slots), 4), np.int64)
    rows[:, 1], rows[:, 2] = plan.slots, plan.positions
    chunks = [(c.stop - c.start, c.slot, c.start, c.yields) for c in plan.chunks]
    pieces = np.concatenate([rows, np.array(chunks, np.int64).reshape(-1, 4)])
    counts, slots, starts, yields = pieces.T
    return counts, slots, starts, yields.astype(bool)


def places_of(plan: Plan) -> tuple[Ints, Ints]:
    """Return the slot and the position of each token of a pass, decoding rows first."""
    counts, slots, starts, _ = pieces_of(plan)
    firsts = np.cumsum(counts) - counts
    positions = np.arange(counts.sum()) + np.repeat(starts - firsts, counts)
    return np.repeat(slots, counts), positions


def tiles_of(plan: Plan) -> tuple[Ints, int]:
    """Return the tiles of a pass, ``[tiles, 5]``, and their size."""
    counts, slots, starts, _ = pieces_of(plan)
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


class _Inputs:
    """Everything that a pass of up to ``tokens`` tokens reads, in one tensor: one copy fills it.

    An id below 0 names a slot, whose last token is meant: -1 is slot 0. Unused tokens have id and
    position 0; unused tiles have no token. ``keep`` has the token of the pass that yields the next
    one of each slot, or _NONE.
    """

    def __init__(self, tokens: int, slots: int, device: torch.device) -> None:
        tiles = most_tiles(tokens, slots) * _COLUMNS
        self._ends = np.cumsum([tokens, tokens, tiles]).tolist()
        self._all = torch.zeros(self._ends[-1] + slots, dtype=torch.int64, device=device)
        self._upload = Upload(self._all)
        self.ids, self.positions, flat, self.keep = self._all.tensor_split(self._ends)
        self.tiles = flat.view(-1, _COLUMNS)
        self.keep.fill_(_NONE)

    def fill(self, plan: Plan, prompt_ids: Ints) -> None:
        array = np.zeros(len(self._all), np.int64)
        ids, positions, flat, keep = np.split(array, self._ends)
        rows, total = len(plan.slots), len(plan.slots) + len(prompt_ids)
        ids[:rows], ids[rows:total] = -1 - plan.slots, prompt_ids
        _, positions[:total] = places_of(plan)
        tiles, _ = tiles_of(plan)
        flat[: tiles.size] = tiles.flatten()
        counts, slots, _, yields = pieces_of(plan)
        keep[:] = _NONE
        keep[slots[yields]] = np.cumsum(counts)[yields] - 1
        self._upload(array)


class PreparedMixed:
    """One prepared pass with chunks for each number of tokens, up to ``most_tokens`` of a pass."""

    def __init__(
        self,
        forward: Forward,
        cache: SlotCache,
        last: Tensor,
        chooser: Chooser,
        prepare: Prepare,
        most_tokens: int,
    ) -> None:
        self._forward, self._cache, self._last, self._chooser = forward, cache, last, chooser
        self._slots = torch.arange(len(last), device=last.device)
        self.calls = 0  # passes that were replayed
        self.sizes = [SMALLEST]
        while self.sizes[-1] < min(most_tokens, LARGEST):
            self.sizes.append(2 * self.sizes[-1])
        self._inputs = {size: _Inputs(size, len(last), last.device) for size in self.sizes}
        self._nowhere = last.new_zeros(0)
        # The largest first: the others then fit into the memory that it leaves in their pool.
        self._passes = {size: prepare(self._pass(size)) for size in reversed(self.sizes)}

    def takes(self, tokens: int) -> bool:
        """Return True if a pass was prepared for so many tokens."""
        return tokens <= self.sizes[-1]

    def aim(self, plan: Plan, prompt_ids: Ints) -> None:
        """Set the inputs of the next pass; ``prompt_ids`` are the tokens of all chunks."""
        self._size = fitting(self.sizes, len(plan.slots) + len(prompt_ids))
        self._inputs[self._size].fill(plan, prompt_ids)

    def run(self, plan: Plan, step: int) -> None:
        """Compute the pass that :meth:`aim` chose, the only one of its plan; store its tokens."""
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
