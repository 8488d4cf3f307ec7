"""Building an engine, after checking that it fits in memory."""

from __future__ import annotations

import re

import torch

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.notebook import NotebookEngine
from batchbench.batching.engines.torch.base import TorchEngine
from batchbench.batching.engines.torch.footprint import HEADROOM, Served, largest_batch
from batchbench.batching.engines.torch.forward import Forward, TransformersForward, make_forward
from batchbench.batching.engines.torch.linear import Kernels
from batchbench.batching.engines.torch.reference import TeacherForced
from batchbench.batching.engines.torch.slots import SlotsEngine
from batchbench.batching.models.loading import LoadedModel, free_bytes
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
