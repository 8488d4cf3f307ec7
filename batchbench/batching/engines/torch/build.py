"""Engines, and the memory that they and a whole run take.

``--dry-run`` predicts the peak memory of a run from the shape of its model and batch, and an engine
that would not fit is refused: both use :class:`Served`. Its coefficients were measured
(``benchmarks/dry_run_memory.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.notebook import NotebookEngine
from batchbench.batching.engines.torch import hardware
from batchbench.batching.engines.torch.architecture import Architecture, architecture_of
from batchbench.batching.engines.torch.attention import aligned, kv_token_bytes
from batchbench.batching.engines.torch.base import TorchEngine
from batchbench.batching.engines.torch.forward import (
    Forward,
    TransformersForward,
    cache_dtype,
    make_forward,
)
from batchbench.batching.engines.torch.linear import Kernels, make_linear, padded_bytes
from batchbench.batching.engines.torch.reference import TeacherForced
from batchbench.batching.engines.torch.slots import SlotsEngine
from batchbench.batching.engines.torch.triton.choice import supports_triton, why_no_triton
from batchbench.batching.experiment import Experiment, budget_of
from batchbench.batching.models.loading import (
    LoadedModel,
    count_parameters,
    current,
    free_bytes,
    give_back_memory,
    model_config,
    resolve_device,
    resolve_dtype,
    set_threads,
)
from batchbench.batching.models.source import Source
from batchbench.batching.progress import Watch
from batchbench.batching.verification import verify
from batchbench.errors import UsageError
from batchbench.workloads import Workload
from batchbench.workloads.sampling import Sampling

HEADROOM = 0.1  # share of the free memory that stays unused
EAGER_WIDTHS = 37
"""Peak activations of a token in transformers' modules, in hidden sizes: GPT-2's GELU alone keeps
four tensors of the inner size (4 hidden sizes)."""
REFERENCE_LOGITS = 3  # copies of a request's logits during verification
LEFT_BEHIND = 128 * 2**20  # kept by the allocator after loading, and taken by torch's libraries
REPORTING = 64 * 2**20  # for tables and pictures, imported after the trials
WORKSPACES = 64 * 2**20  # of cuBLAS: torch keeps 32 MiB on Hopper for the main stream and graphs
LARGEST_PRODUCT = 2**24  # values in the timed product; times of more rows are extrapolated


@dataclass(frozen=True)
class Served:
    """The part of an experiment that decides how much memory serving takes."""

    config: Any
    dtype: torch.dtype
    cached: torch.dtype
    engine: str
    prompt: int  # tokens of the longest prompt
    longest: int  # tokens of the longest request, prompt and output
    mixes: bool  # prompts are computed in passes with the running requests
    budget: int | None  # most tokens of such a pass; None to derive it from the number of slots
    lean: Architecture | None  # what batchbench's own pass computes; None for transformers'

    def cache_bytes(self, slots: int) -> int:
        return slots * self.longest * kv_token_bytes(self.config, self.cached)

    def pass_tokens(self, slots: int) -> int:
        """Return the most tokens that one pass with prompts computes; 0 if that is unknown."""
        tokens = slots * self.prompt
        if self.mixes:
            tokens = min(tokens, max(self.budget or budget_of(slots), slots))
        return tokens

    def bytes(self, slots: int) -> int:
        """Return the bytes that serving this many slots takes in addition to weights."""
        text = self.config.get_text_config()
        values = self.lean.activations if self.lean else EAGER_WIDTHS * text.hidden_size
        passes = self.pass_tokens(slots) * values * self.dtype.itemsize
        logits = slots * text.vocab_size * (self.dtype.itemsize + 4)
        # While the batch changes, the notebook engine holds the old cache and the new one.
        caches = 2 if self.engine == "notebook" else 1
        return int(caches * self.cache_bytes(slots) + passes + logits)


def largest_batch(fits: Callable[[int], bool], most: int) -> int:
    """Return the most slots below ``most`` that fit; 0 if not even one does."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def make_engine(
    name: str,
    model: LoadedModel,
    slots: int,
    max_len: int,
    execution: str = "auto",
    forward: Forward | None = None,
    *,
    prompt: int = 0,
    mixes: bool = True,
    budget: int | None = None,
    sampling: Sampling | None = None,
) -> tuple[TorchEngine, dict[str, int]]:
    """Return the engine of that name, and its bytes of weights, packed weights and cache.

    ``forward`` is the slots engine's pass, None for the leanest correct one; ``prompt``, ``mixes``
    and ``budget`` are as in :class:`Served`, ``sampling`` as in SlotsEngine. Raises UsageError if
    the batch does not fit, or if the model cannot be computed as ``execution`` says.
    """
    device, config, own = model.device, model.module.config, False
    with current(device), _cache_fits(slots, device):
        if name == "notebook":
            forward = None
        else:
            chosen = _resolve_execution(execution, device)
            # torch.compile traces torch's own operators only.
            own = forward is None and chosen != "compile"
            forward = forward or make_forward(model, Kernels.OWN if own else Kernels.PLAIN)
        theirs = isinstance(forward, TransformersForward | None)
        served = Served(
            config=config,
            dtype=model.dtype,
            cached=forward.cache_dtype if forward else model.dtype,
            engine=name,
            prompt=prompt,
            longest=aligned(max_len, device) if forward else max_len,
            mixes=mixes and forward is not None,
            budget=budget,
            lean=None if theirs else architecture_of(config),
        )
        _check_room(model, slots, served)
        memory = {
            "weight_bytes": model.weight_bytes,
            "packed_weight_bytes": forward.extra_bytes if forward else 0,
            "kv_cache_bytes": served.cache_bytes(slots),
        }
        if forward is None:
            return NotebookEngine(model, slots), memory
        if isinstance(forward, TransformersForward):
            _check_forward(model, forward)
        args = (model, slots, max_len, forward, chosen, served.pass_tokens(slots), sampling)
        made = _slots_engine(*args, falls_back=execution == "auto")
        notes = [made.execution_note]
        if own and device.type == "cuda" and not made.triton and not made.execution_note:
            notes = [f"without Triton's kernels: {why_no_triton(model)}"]
        if isinstance(forward, TransformersForward) and forward.why:
            notes = [f"transformers' forward pass: {forward.why}", *notes]
        made.execution_note = "; ".join(filter(None, notes)) or None
        return made, memory


@contextmanager
def _cache_fits(slots: int, device: torch.device) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On the host torch raises a plain RuntimeError.
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate" in str(error):
            raise UsageError(
                f"--batch-size {slots}: its cache does not fit on {device}; lower it"
            ) from error
        raise


def _resolve_execution(execution: str, device: torch.device) -> str:
    cuda = device.type == "cuda"
    if execution == "graph" and not cuda:
        raise UsageError(
            f"--execution graph: CUDA graphs need a CUDA device, and the model is on {device}; "
            "use --execution auto"
        )
    return ("graph" if cuda else "eager") if execution == "auto" else execution


def _slots_engine(
    model: LoadedModel,
    slots: int,
    max_len: int,
    forward: Forward,
    execution: str,
    most_tokens: int | None = None,
    sampling: Sampling | None = None,
    *,
    falls_back: bool,
) -> SlotsEngine:
    """Return the slots engine; an eager one if preparing its passes fails and that is allowed."""
    try:
        return SlotsEngine(model, slots, max_len, forward, execution, most_tokens, sampling)
    except (MemoryError, torch.OutOfMemoryError, UsageError):
        raise
    except Exception as error:  # from a model's own code, or from a compiler
        if execution == "eager":
            raise
        why = _reason(error)
        if not falls_back:
            raise UsageError(
                f"--execution {execution}: {model.source.name} cannot be run this way on "
                f"{model.device} ({why}); use --execution eager"
            ) from error
    # Here, not above: an exception that is being handled keeps the first engine and its cache.
    give_back_memory()
    engine = SlotsEngine(model, slots, max_len, forward)
    engine.execution_note = f"auto is eager: {execution} failed ({why})"
    return engine


def _reason(error: Exception) -> str:
    """Return the first error's text: the end of a failed capture says only that there was one."""
    first = error.__context__ or error
    return " ".join(f"{type(first).__name__}: {first}".split())[:160]


def _check_forward(model: LoadedModel, forward: TransformersForward) -> None:
    """Raise UsageError if a model does not attend as the slot cache needs.

    Models differ in their use of transformers' interfaces, so two small requests are served: two
    passes with chunks of prompts and two without.
    """
    prompts = [[1, 2, 3, 4, 5], [6, 7, 8]]
    ids = [[i % model.source.vocab_size for i in prompt] for prompt in prompts]
    workload = Workload.of("probe", ids, [3, 4])
    try:
        engine = SlotsEngine(model, 2, 12, forward)
        batcher = Batcher("continuous", engine, 2, prefill="mixed", max_batched_tokens=4)
        checked = verify(workload, [batcher.serve(workload, Watch())], TeacherForced(model))
        fault = checked.findings[0].reason if checked.wrong else None
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        fault = f"{type(error).__name__}: {error}"
    if fault is not None:
        raise UsageError(
            f"--engine slots: {model.source.name} does not attend through transformers' interfaces "
            f"as the slot cache needs ({fault[:120]}); use --engine notebook"
        )


def _check_room(model: LoadedModel, slots: int, served: Served) -> None:
    """Raise UsageError if serving ``slots`` requests together does not fit."""
    workspaces = WORKSPACES if model.device.type == "cuda" else 0
    room = int(free_bytes(model.device) * (1 - HEADROOM)) - workspaces
    needed = served.bytes(slots)
    if needed <= room:
        return
    fits = largest_batch(lambda fewer: served.bytes(fewer) <= room, slots)
    raise UsageError(
        f"--batch-size {slots}: needs {needed / 2**30:.1f} GiB of cache and activations for "
        f"requests of {served.longest} tokens, and {model.device} has {room / 2**30:.1f} GiB "
        "free; " + (f"the largest that fits is {fits}" if fits else "not even one slot fits")
    )


# The estimate of a run


@dataclass(frozen=True)
class Sizes:
    """Bytes of weights and cache, peak and available bytes, and seconds of a step's products.

    ``peak_bytes`` and ``room_bytes`` are of the device that serves; on a CPU they count the whole
    process. ``fitting`` is the largest batch size that fits, if this one does not; 0 if none does.
    On a GPU a step also takes ``launching_s`` for its ``launches`` of kernels, one after another.
    """

    device: str
    weight_bytes: int
    kv_cache_bytes: int
    peak_bytes: int
    room_bytes: int
    fitting: int | None
    step_s: float
    launches: int = 0
    launching_s: float = 0.0


def size_up(experiment: Experiment, source: Source, workload: Workload) -> Sizes:
    """Compute sizes from the model's shape, and time one product on this machine."""
    set_threads(experiment.model)
    device = resolve_device(experiment.model.device)
    dtype = resolve_dtype(experiment.model.dtype, device)
    config, serving = model_config(source), experiment.serving
    slots, longest = serving.batch_size, workload.max_total_tokens
    lean = architecture_of(config) if serving.engine == "slots" else None
    served = Served(
        config,
        dtype,
        cache_dtype(lean, device, dtype) if lean else dtype,
        serving.engine,
        prompt=int(workload.prompt_tokens.max()),
        longest=aligned(longest, device) if serving.engine == "slots" else longest,
        mixes=serving.mixes_prefill,
        budget=serving.max_batched_tokens,
        lean=lean,
    )
    base = psutil.Process().memory_info().rss  # before anything is timed
    byte_s, packs = _time_product(served, slots, device)
    room = int(free_bytes(device) * (1 - HEADROOM)) + (base if device.type == "cpu" else 0)
    parameters = count_parameters(source)
    run = _Run(experiment, source, workload, served, device, base, parameters, packs, room)
    peak, fitting = run.peak_bytes(slots), None
    if peak > room:
        fitting = largest_batch(lambda fewer: run.peak_bytes(fewer) <= room, slots)
    launches = _launches(served, device) if device.type == "cuda" else 0
    replayed = serving.engine == "slots" and serving.execution in ("auto", "graph")
    return Sizes(
        device=str(device),
        weight_bytes=run.resident_bytes,
        kv_cache_bytes=served.cache_bytes(slots),
        peak_bytes=peak,
        room_bytes=room,
        fitting=fitting,
        step_s=run.weight_bytes * byte_s,
        launches=launches,
        launching_s=launches * _time_kernel(device, replayed=replayed) if launches else 0.0,
    )


WITH_TRITON, LEAN = (7, 6), (12, 13)
LLAMA_WITH_TRITON, LLAMA_LEAN, WITH_TRANSFORMERS = (8, 6), (35, 26), (38, 24)
"""Kernels that a decode step launches in each layer, and beside the layers, counted in captured
passes in bfloat16: of GPT-2 and of a Llama with Triton's kernels and with torch's, and of a Llama
in transformers' modules."""


def _launches(served: Served, device: torch.device) -> int:
    of = served.lean
    fused, lean = (LLAMA_WITH_TRITON, LLAMA_LEAN) if of and of.gated else (WITH_TRITON, LEAN)
    own = fused if supports_triton(device) else lean
    of_layer, beside = own if of else WITH_TRANSFORMERS
    return int(of_layer * served.config.get_text_config().num_hidden_layers + beside)


_KERNELS = 100  # that are timed together


def _time_kernel(device: torch.device, *, replayed: bool) -> float:
    """Return the seconds from one kernel with almost no work to the next, in a graph or without."""
    small = torch.zeros(hardware.SMALL, device=device)

    def run() -> None:
        for _ in range(_KERNELS):
            small.add_(1.0)

    measure = partial(hardware.device_median_s, runs=1) if replayed else hardware.median_s
    return measure(run, device, 15) / _KERNELS


def _time_product(served: Served, slots: int, device: torch.device) -> tuple[float, bool]:
    """Return the seconds of a product per byte of weights, and True if its weight is packed."""
    width, dtype = served.config.hidden_size, served.dtype
    matrix = torch.rand(2**26 // width, width, device=device).to(dtype)
    product = make_linear(matrix, None, Kernels.OWN if served.lean else Kernels.PLAIN)
    rows = max(1, min(slots, LARGEST_PRODUCT // len(matrix)))
    x = torch.rand(rows, width, device=device).to(dtype)
    seconds = hardware.device_median_s(lambda: product(x), device, 7) * slots / rows
    return seconds / matrix.nbytes, bool(product.extra_bytes)


@dataclass(frozen=True)
class _Run:
    """The memory of a whole run, for any number of slots."""

    experiment: Experiment
    source: Source
    workload: Workload
    served: Served
    device: torch.device
    base: int
    parameters: int
    packs: bool
    room: int

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.served.dtype.itemsize

    @property
    def resident_bytes(self) -> int:
        """The bytes of weights, with the packed ones and the padded vocabulary."""
        lean, dtype = self.served.lean, self.served.dtype
        if lean is None:
            return self.weight_bytes
        if self.packs:  # an embedding that is no product's weight is not packed
            looked_up = 0 if lean.tied else lean.vocabulary * lean.width * dtype.itemsize
            return 2 * self.weight_bytes - looked_up
        triton = supports_triton(self.device)
        padded = padded_bytes(lean.vocabulary, lean.width, dtype) if triton else 0
        return self.weight_bytes + padded

    def peak_bytes(self, slots: int) -> int:
        """Return the largest of the stages: loading, packing, serving, verifying."""
        weights, resident, served = self.weight_bytes, self.resident_bytes, self.served
        text, kind = served.config.get_text_config(), self.device.type
        paged = self._generate_batch_bytes(slots)
        cached = served.cache_bytes(slots) + paged
        buffer = 0  # which is read before each trial, beside the cache
        if weights > (hardware.cache_bytes(self.device) or 0):
            left = max(0, self.room - resident - cached) if kind == "cuda" else None
            buffer = hardware.buffer_bytes(self.device, left)
        serving = max(served.bytes(slots) + paged, cached + buffer)
        verifying = cached
        if self.experiment.trials.verify_limit:
            logits = int(self.workload.output_tokens.max()) * text.vocab_size * 4
            # A float32 copy of 16-bit weights; in float32 differences are so rare that a float64
            # copy is not counted.
            copied = 0 if served.dtype is torch.float32 else self.parameters * 4
            verifying += logits * REFERENCE_LOGITS + copied
        if kind != "cpu":
            return resident + max(serving, verifying) + WORKSPACES * (kind == "cuda")
        # Dummy weights are drawn in float32; a checkpoint's file is read into a second copy.
        loading = self.parameters * 4 if self.source.load_format == "dummy" else 2 * weights
        head = text.vocab_size * text.hidden_size * served.dtype.itemsize
        packing = resident + head * self.packs
        stages = (loading, packing, resident + serving, resident + verifying + REPORTING)
        return int(self.base + LEFT_BEHIND + max(stages))

    def _generate_batch_bytes(self, slots: int) -> int:
        """Return the bytes of generate_batch's paged cache and logits; 0 if it does not run."""
        serving, served = self.experiment.serving, self.served
        if "generate_batch" not in serving.strategies:
            return 0
        from batchbench.batching.engines.generate_batch import PAGE, pages_of

        cache = pages_of(slots, served.longest) * PAGE * kv_token_bytes(served.config, served.dtype)
        budget = serving.max_batched_tokens or budget_of(slots)
        tokens = max(slots, min(budget, slots * served.longest))
        logits = tokens * served.config.get_text_config().vocab_size * served.dtype.itemsize
        return int(cache + logits)
