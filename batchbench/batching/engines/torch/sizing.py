"""The predicted peak memory of a run, and the time of its matrix products."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from batchbench.batching.engines.torch.cache import kv_token_bytes
from batchbench.batching.engines.torch.footprint import (
    HEADROOM,
    REFERENCE_LOGITS,
    Served,
    largest_batch,
)
from batchbench.batching.engines.torch.forward import cache_dtype, is_plain_gpt2
from batchbench.batching.engines.torch.linear import Kernels, make_linear
from batchbench.batching.engines.torch.measure import buffer_bytes, cache_bytes
from batchbench.batching.engines.torch.stopwatch import median_s
from batchbench.batching.experiment import GENERATE_BATCH, Experiment, budget_of
from batchbench.batching.models.loading import (
    count_parameters,
    free_bytes,
    model_config,
    resolve_device,
    resolve_dtype,
    set_threads,
)
from batchbench.batching.models.source import Source
from batchbench.workloads import Workload

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
