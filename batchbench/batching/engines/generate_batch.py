"""transformers' own continuous batching (``model.generate_batch``) as a strategy.

It schedules by itself, over a paged cache and in its own thread, so it reports no steps, but the
time of each token. ``generate_batch`` gives all requests one output length and takes
them all at once; here the same manager gets one request at a time, each with its own length.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from batchbench.batching.engines import WallClock
from batchbench.batching.engines.torch.attention import kv_token_bytes
from batchbench.batching.models.loading import LoadedModel, current
from batchbench.batching.policies import ORDERS
from batchbench.batching.progress import Progress, Watch
from batchbench.batching.recording import Header, Recording
from batchbench.batching.strategies import GENERATE_BATCH_SAMPLES, Context
from batchbench.errors import UsageError, reason_in_short
from batchbench.workloads import Arrivals, Request, Workload

PAGE = 256  # tokens in a page of the cache: the default of transformers
_POLL_S = 0.5  # between two checks that its thread is alive


def pages_of(slots: int, max_len: int) -> int:
    """Return the pages of the cache: for each request one more than it fills, and a quarter more,
    since no request is admitted with less than 15 % of the pages free."""
    return math.ceil(slots * (math.ceil(max_len / PAGE) + 1) * 1.25) + 1


class GenerateBatch:
    """Serve with transformers' continuous batching on the loaded model.

    It runs with the settings that transformers takes for the fastest: flash attention where the
    model's number format and the installation allow it, and CUDA graphs with flash attention only,
    since the others compute what graphs need as padding. Cache, graphs and manager stay from one
    trial to the next, and are ready before a trial's clock starts. The cache holds ``slots``
    requests of ``max_len`` tokens, and a step computes at most ``max_batched_tokens``.
    """

    name = "generate_batch"

    def __init__(
        self,
        model: LoadedModel,
        slots: int,
        max_len: int,
        *,
        order: str = "fifo",
        max_batched_tokens: int = 2048,
    ) -> None:
        self._model, self._slots, self._order = model, slots, order
        half = model.dtype in (torch.float16, torch.bfloat16)
        self._flash = half and model.device.type == "cuda"
        blocks = pages_of(slots, max_len)
        self.cache_bytes = blocks * PAGE * kv_token_bytes(model.module.config, model.dtype)
        self._config: dict[str, Any] = {
            "num_blocks": blocks,
            "max_batch_tokens": max(slots, min(max_batched_tokens, slots * max_len)),
            "max_requests_per_batch": slots,
        }
        if _HAS_FLASH_SWITCH:
            self._config["auto_switch_to_flash"] = self._flash
        self._manager: Any = None

    def serve(self, workload: Workload, watch: Watch, *, trial: int = 0) -> Recording:
        """Submit requests when they are due, and collect their tokens and times."""
        if workload.sampling is not None:
            raise UsageError(GENERATE_BATCH_SAMPLES)
        progress = Progress(self.name, trial, self._slots, len(workload))
        device = self._model.device
        with current(device), torch.inference_mode(), self._running(workload) as manager:
            clock = WallClock()
            served = {
                request.index: (request, result)
                for request, result in self._served(manager, workload, clock, progress, watch)
            }
            graphs = self._manager.continuous_batching_config.use_cuda_graph
            about = {
                "engine": f"transformers {transformers.__version__}",
                "attention": self._model.module.config._attn_implementation,
                "cuda_graphs": any(graphs) if isinstance(graphs, Sequence) else bool(graphs),
            }
        header = Header.of(self.name, trial, self._slots, workload, about)
        requests, results = zip(*(served[i] for i in range(len(workload))), strict=True)
        return Recording.of_tokens(
            header,
            workload,
            [result.generated_tokens for result in results],
            [[_trial_ns(t, clock) for t in result.timestamps] for result in results],
            [_trial_ns(result.lifespan[0], clock) for result in results],
            due_ns=np.array([request.due_ns for request in requests], np.int64),
        )

    def _served(
        self, manager: Any, workload: Workload, clock: WallClock, progress: Progress, watch: Watch
    ) -> Iterator[tuple[Request, Any]]:
        arrivals = Arrivals(workload)
        running: dict[int, Request] = {}
        while running or arrivals.more:
            for request in sorted(arrivals.due(clock.now()), key=ORDERS[self._order]):
                running[request.index] = request
                self._submit(manager, workload, request)
            if not running:
                assert arrivals.next_due is not None
                clock.wait_until(arrivals.next_due)
                continue
            due_s = _POLL_S
            if arrivals.next_due is not None:
                due_s = min(_POLL_S, max(0.0001, (arrivals.next_due - clock.now()) / 1e9))
            result = manager.get_result(timeout=due_s)
            if result is None:
                if not manager.is_running():
                    raise _failed("its thread ended early")
                watch.progressed(progress)
                continue
            if not result.is_finished():
                continue
            if result.error is not None:
                raise _failed(result.error)
            request = running.pop(int(result.request_id))
            arrivals.finished(request, _trial_ns(result.timestamps[-1], clock))
            progress.done += 1
            progress.tokens += len(result.generated_tokens)
            progress.slots_in_use = min(len(running), self._slots)
            progress.now_ns = clock.now()
            watch.progressed(progress)
            yield request, result

    def _submit(self, manager: Any, workload: Workload, request: Request) -> None:
        eos = list(self._model.source.eos_token_ids) if workload.stop_at_eos else []
        manager.add_request(
            workload.prompt(request.index).tolist(),
            request_id=str(request.index),
            max_new_tokens=request.output_tokens,
            record_timestamps=True,
            eos_token_id=eos or -1,  # -1: none
        )

    @contextmanager
    def _running(self, workload: Workload) -> Iterator[Any]:
        """Yield the manager with its thread running and its cache ready; then restore the model."""
        module = self._model.module
        before = module.config._attn_implementation
        switches = self._flash or _HAS_FLASH_SWITCH
        module.set_attn_implementation("sdpa" if switches else "paged|sdpa")
        try:
            if self._manager is not None:
                setattr(module, _CACHED_MANAGER, self._manager)
            manager = module.init_continuous_batching(
                generation_config=GenerationConfig(
                    do_sample=False, eos_token_id=-1, pad_token_id=0
                ),
                continuous_batching_config=ContinuousBatchingConfig(**self._config),
            )
            if manager is not self._manager:
                self._manager = manager
                # Its thread writes to what is made here, in some versions without inference mode.
                with torch.inference_mode(False), torch.no_grad():
                    manager.warmup()
            manager.start()
            try:
                while manager.batch_processor is None and manager.is_running():
                    time.sleep(0.001)
                yield manager
            except BaseException:
                manager.stop(block=True, hard_stop=True)
                self._manager = None
                raise
            manager.stop(block=True, keep_for_next_session=True)
        finally:
            module.set_attn_implementation(before)
            # The manager holds locks of threads, and verification copies the model.
            vars(module).pop(_CACHED_MANAGER, None)


_CACHED_MANAGER = "_cached_continuous_batching_manager"  # the attribute of a model that keeps it
_HAS_FLASH_SWITCH = "auto_switch_to_flash" in {
    field.name for field in dataclasses.fields(ContinuousBatchingConfig)
}
"""False before transformers had the option; there, naming paged attention has the same effect."""


def _trial_ns(seconds: float, clock: WallClock) -> int:
    return round(seconds * 1e9) - clock.zero_ns


def _failed(why: str) -> UsageError:
    short = reason_in_short(why)
    return UsageError(
        f"--strategy generate_batch: transformers' continuous batching failed: {short}; remove it"
    )


def make(context: Context) -> GenerateBatch:
    """Return the strategy on the model of the experiment."""
    return GenerateBatch(
        context.load(),
        context.slots,
        context.max_len,
        order=context.order,
        max_batched_tokens=context.max_batched_tokens,
    )
