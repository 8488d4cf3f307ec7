"""Building an engine, after checking that it fits in memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

import psutil
import torch

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.notebook import NotebookEngine
from batchbench.batching.engines.torch.attention import kv_token_bytes
from batchbench.batching.engines.torch.base import TorchEngine
from batchbench.batching.engines.torch.footprint import (
    HEADROOM,
    REFERENCE_LOGITS,
    Served,
    largest_batch,
)
from batchbench.batching.engines.torch.forward import (
    Forward,
    TransformersForward,
    cache_dtype,
    is_plain_gpt2,
    make_forward,
)
from batchbench.batching.engines.torch.linear import Kernels, make_linear
from batchbench.batching.engines.torch.measure import buffer_bytes, cache_bytes, median_s
from batchbench.batching.engines.torch.reference import TeacherForced
from batchbench.batching.engines.torch.slots import SlotsEngine
from batchbench.batching.experiment import GENERATE_BATCH, Experiment, budget_of
from batchbench.batching.models.loading import (
    LoadedModel,
    count_parameters,
    free_bytes,
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
) -> tuple[TorchEngine, dict[str, int]]:
    """The engine of that name, and what it takes: bytes of weights, packed weights and cache.

    Args:
        forward: the slots engine's pass; None for the leanest that is right for the model.
        prompt: tokens of the longest prompt.
        mixes: prompts are computed in passes with the running requests.
        budget: most tokens of such a pass; None to derive it from the number of slots.

    Raises:
        UsageError: a batch of this size does not fit (names the largest that does), or the model
            cannot be computed as ``execution`` says.
    """
    config = model.module.config
    memory = {"weight_bytes": model.weight_bytes, "packed_weight_bytes": 0}
    try:
        if name == "notebook":
            dtype = model.dtype
            served = Served(config, dtype, dtype, name, prompt, max_len, False, None, lean=False)
            _check_room(model, slots, served)
            return NotebookEngine(model, slots), memory | {
                "kv_cache_bytes": served.cache_bytes(slots)
            }
        chosen = _execution(execution, model.device)
        # What is compiled is taken apart, down to torch's own operators.
        most = Kernels.PLAIN if chosen == "compile" else Kernels.OWN
        forward = forward or make_forward(model, most)
        lean = not isinstance(forward, TransformersForward)
        cached = forward.cache_dtype
        served = Served(
            config, model.dtype, cached, name, prompt, max_len, mixes, budget, lean=lean
        )
        _check_room(model, slots, served)
        if isinstance(forward, TransformersForward):
            _check_forward(model, forward)
        memory |= {
            "packed_weight_bytes": forward.extra_bytes,
            "kv_cache_bytes": served.cache_bytes(slots),
        }
        engine = _slots_engine(
            model, slots, max_len, forward, chosen, fall_back=execution == "auto"
        )
        return engine, memory
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not re.search(
            "allocate", str(error)
        ):  # on the host torch says no more than that in a RuntimeError
            raise
        raise UsageError(
            f"--batch-size {slots}: its cache does not fit on {model.device}; lower it"
        ) from error


def _execution(asked: str, device: torch.device) -> str:
    """What ``--execution`` means on a device.

    Raises:
        UsageError: the device cannot.
    """
    cuda = device.type == "cuda"
    if asked == "graph" and not cuda:
        raise UsageError(
            f"--execution graph: CUDA graphs need a CUDA device, and the model is on {device}; "
            "take --execution auto"
        )
    return ("graph" if cuda else "eager") if asked == "auto" else asked


def _slots_engine(
    model: LoadedModel,
    slots: int,
    max_len: int,
    forward: Forward,
    execution: str,
    *,
    fall_back: bool,
) -> SlotsEngine:
    """The slots engine with its decode passes prepared; eager where that fails and may."""
    try:
        return SlotsEngine(model, slots, max_len, forward, execution)
    except (MemoryError, torch.OutOfMemoryError, UsageError):
        raise
    except Exception as error:  # a model's own code, or a compiler's: whatever they raise
        if execution == "eager":
            raise
        if fall_back:
            return SlotsEngine(model, slots, max_len, forward)
        why = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UsageError(
            f"--execution {execution}: {model.source.name} cannot be computed so on "
            f"{model.device} ({why}); take --execution eager"
        ) from error


def _check_forward(model: LoadedModel, forward: TransformersForward) -> None:
    """Raise UsageError where a model does not attend as the slot cache needs it to.

    Models differ in what they do around transformers' interfaces, so it is tried: two small
    requests, in two passes with pieces of prompts and two without.
    """
    prompts = [[1, 2, 3, 4, 5], [6, 7, 8]]
    ids = [[i % model.source.vocab_size for i in prompt] for prompt in prompts]
    workload = Workload.of("probe", ids, [3, 4])
    try:
        engine = SlotsEngine(model, 2, 12, forward)
        batcher = Batcher("continuous", engine, 2, prefill="mixed", max_batched_tokens=4)
        found = verify(workload, [batcher.serve(workload, Watch())], TeacherForced(model))
        fault = found.findings[0].reason if found.wrong else None
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        fault = f"{type(error).__name__}: {error}"
    if fault is not None:
        raise UsageError(
            f"--engine slots: {model.source.name} does not attend through transformers' interfaces "
            f"as the slot cache needs ({fault[:120]}); take --engine notebook"
        )


def _check_room(model: LoadedModel, slots: int, served: Served) -> None:
    """Raise UsageError if serving ``slots`` requests together does not fit."""
    room = int(free_bytes(model.device) * (1 - HEADROOM))
    needed = served.bytes(slots)
    if needed <= room:
        return
    fits = largest_batch(lambda fewer: served.bytes(fewer) <= room, slots)
    raise UsageError(
        f"--batch-size {slots}: needs {needed / 2**30:.1f} GiB of cache and activations for "
        f"requests of {served.longest} tokens, and {model.device} has {room / 2**30:.1f} GiB to "
        "spare; " + (f"the largest that fits is {fits}" if fits else "not even one slot fits")
    )


LEFT_BEHIND = 128 * 2**20
"""Memory that the allocator keeps after loading and packing, and that torch's libraries take when
they first compute."""

REPORTING = 64 * 2**20
"""Memory of the libraries for tables and pictures, which are imported after the trials."""


LARGEST_PRODUCT = 2**24
"""Most values of the timed product; the time of more rows is extrapolated in proportion."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of weights and cache, peak and available bytes, and seconds of a step's products.

    ``peak_bytes`` and ``room_bytes`` are of the device that serves; on a CPU they count all that
    the process takes. ``fitting`` is the largest batch size that fits, 0 where none does.
    """

    device: str
    weight_bytes: int
    kv_cache_bytes: int
    peak_bytes: int
    room_bytes: int
    fitting: int
    step_s: float

    @property
    def fits(self) -> bool:
        """Return True if the run fits in the free memory."""
        return self.peak_bytes <= self.room_bytes


def size_up(experiment: Experiment, source: Source, workload: Workload) -> Sizes:
    """Sizes from the model's shape; time from one product timed here and now."""
    set_threads(experiment.model)
    device = resolve_device(experiment.model.device)
    dtype = resolve_dtype(experiment.model.dtype, device)
    config, serving = model_config(source), experiment.serving
    lean = serving.engine == "slots" and is_plain_gpt2(config)
    cached = cache_dtype(config, device, dtype) if lean else dtype
    base = psutil.Process().memory_info().rss  # before anything is timed
    matrix = torch.rand(2**26 // config.hidden_size, config.hidden_size, device=device).to(dtype)
    product = make_linear(matrix, None, Kernels.OWN if lean else Kernels.PLAIN)
    parameters = count_parameters(source)
    weight_bytes = parameters * dtype.itemsize
    rows = max(1, min(serving.batch_size, LARGEST_PRODUCT // len(matrix)))
    x = torch.rand(rows, config.hidden_size, device=device).to(dtype)
    per_byte = median_s(lambda: product(x), device, 7) / (matrix.numel() * dtype.itemsize)
    per_byte *= serving.batch_size / rows
    served = Served(
        config,
        dtype,
        cached,
        serving.engine,
        prompt=int(workload.prompt_tokens.max()),
        longest=workload.max_total_tokens,
        mixes=serving.mixes_prefill,
        budget=serving.max_batched_tokens,
        lean=lean,
    )
    height = _Height(
        experiment, source, workload, served, device, base, parameters, bool(product.extra_bytes)
    )
    room = int(free_bytes(device) * (1 - HEADROOM)) + (base if device.type == "cpu" else 0)
    peak = height.bytes(serving.batch_size)
    fits = serving.batch_size
    if peak > room:
        fits = largest_batch(lambda slots: height.bytes(slots) <= room, serving.batch_size)
    return Sizes(
        device=str(device),
        weight_bytes=weight_bytes * (2 if product.extra_bytes else 1),
        kv_cache_bytes=served.cache_bytes(serving.batch_size),
        peak_bytes=peak,
        room_bytes=room,
        fitting=fits,
        step_s=weight_bytes * per_byte,
    )


@dataclass(frozen=True)
class _Height:
    """The peak memory of a whole run, for any number of slots."""

    experiment: Experiment
    source: Source
    workload: Workload
    served: Served
    device: torch.device
    base: int
    parameters: int
    packs: bool

    def bytes(self, slots: int) -> int:
        """Return the largest of the stages: loading, packing, serving, verifying."""
        weights = self.parameters * self.served.dtype.itemsize
        kept = weights * (2 if self.packs else 1)
        serving = self.served.bytes(slots) + self._of_their_own(slots)
        resting = self.served.cache_bytes(slots) + self._of_their_own(slots)
        text = self.served.config.get_text_config()
        head = text.vocab_size * text.hidden_size * self.served.dtype.itemsize
        if self.device.type != "cpu":
            return kept + max(serving, resting + self._measuring(weights), resting + self._precise)
        # Made-up weights are drawn in float32; a checkpoint's file is read beside what it fills.
        drawn = self.parameters * 4 if self.source.load_format == "dummy" else 2 * weights
        stages = (
            drawn,
            kept + (head if self.packs else 0),
            kept + max(serving, resting + self._measuring(weights)),
            kept + resting + self._precise + REPORTING,
        )
        return self.base + LEFT_BEHIND + max(stages)

    def _of_their_own(self, slots: int) -> int:
        """Return the paged cache and logits of a strategy that schedules for itself."""
        serving = self.experiment.serving
        if GENERATE_BATCH not in serving.strategies:
            return 0
        from batchbench.batching.engines.generate_batch import PAGE, pages_of

        served = self.served
        cache = pages_of(slots, served.longest) * PAGE * kv_token_bytes(served.config, served.dtype)
        budget = serving.max_batched_tokens or budget_of(slots)
        tokens = max(slots, min(budget, slots * served.longest))
        logits = tokens * served.config.get_text_config().vocab_size * served.dtype.itemsize
        return int(cache + logits)

    def _measuring(self, weights: int) -> int:
        """Return the size of the buffer that measures memory before a trial; 0 if there is none."""
        return buffer_bytes(self.device) if weights > (cache_bytes(self.device) or 0) else 0

    @property
    def _precise(self) -> int:
        """Return the memory of verifying: logits, and in 16-bit formats a float32 copy of weights.

        In float32 differences are so rare that a float64 copy is not counted.
        """
        if self.experiment.trials.verify_limit == 0:
            return 0
        text = self.served.config.get_text_config()
        logits = int(self.workload.output_tokens.max()) * text.vocab_size * 4 * REFERENCE_LOGITS
        short = self.served.dtype is not torch.float32
        return int(logits + (self.parameters * 4 if short else 0))
