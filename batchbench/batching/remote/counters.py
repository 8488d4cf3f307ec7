"""A server's own counts of its work, read from its `/metrics` before and after a trial."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from batchbench.batching.remote.dialects import Dialect
from batchbench.batching.remote.exchange import Address
from batchbench.batching.remote.wire import get
from batchbench.errors import UsageError
from batchbench.json_file import LARGEST

_SAMPLE = re.compile(r'([a-zA-Z_:][\w:]*)(?:\{(?:[^"}]|"(?:[^"\\]|\\.)*")*\})?[ \t]+(\S+)')
"""A line of Prometheus' text format: a name, labels, a value. Timestamps are left over."""


MOST_EXACT = 10**6
"""Smallest count of llama.cpp that is left out: it writes six digits, so that after a million
passes the difference of two readings is off by up to ten."""


@dataclass(frozen=True)
class ServerCounters:
    """Counts that a server keeps; one that it does not have is None.

    ``passes``, ``prompt_tokens``, ``output_tokens`` and ``cached_tokens`` grow from the server's
    start; ``running`` and ``waiting`` are the requests that it has at the moment.
    """

    passes: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    running: int | None = None
    waiting: int | None = None

    def since(self, before: ServerCounters) -> ServerCounters:
        """Return the counts that grew since an earlier reading, and this one's requests.

        A counter that is smaller than before started again with its server, and is None.
        """
        return ServerCounters(
            passes=_growth(before.passes, self.passes),
            prompt_tokens=_growth(before.prompt_tokens, self.prompt_tokens),
            output_tokens=_growth(before.output_tokens, self.output_tokens),
            cached_tokens=_growth(before.cached_tokens, self.cached_tokens),
            running=self.running,
            waiting=self.waiting,
        )


METRICS: Mapping[str, Mapping[str, str]] = {
    "llama.cpp": {
        "llamacpp:n_decode_total": "passes",
        "llamacpp:prompt_tokens_total": "prompt_tokens",
        "llamacpp:tokens_predicted_total": "output_tokens",
        "llamacpp:prompt_tokens_cached_total": "cached_tokens",
        "llamacpp:requests_processing": "running",
        "llamacpp:requests_deferred": "waiting",
    },
    "vllm": {
        "vllm:iteration_tokens_total_count": "passes",
        "vllm:prompt_tokens_total": "prompt_tokens",
        "vllm:generation_tokens_total": "output_tokens",
        "vllm:prefix_cache_hits_total": "cached_tokens",
        "vllm:num_requests_running": "running",
        "vllm:num_requests_waiting": "waiting",
    },
    "sglang": {
        "sglang:cuda_graph_passes_total": "passes",  # those without CUDA graphs as well
        "sglang:prompt_tokens_total": "prompt_tokens",
        "sglang:generation_tokens_total": "output_tokens",
        "sglang:cached_tokens_total": "cached_tokens",
        "sglang:num_running_reqs": "running",
        "sglang:num_queue_reqs": "waiting",
    },
    "tgi": {
        "tgi_batch_inference_count": "passes",  # prefill and decode
        "tgi_request_input_length_sum": "prompt_tokens",
        "tgi_request_generated_tokens_sum": "output_tokens",
        "tgi_batch_current_size": "running",
        "tgi_queue_size": "waiting",
    },
    "openvino": {"ovms_current_graphs": "running"},
}
"""Names of the metrics of each dialect that has any, and our names for them."""


def read_counters(address: Address, dialect: Dialect) -> ServerCounters | None:
    """Return the server's counts now; None if it shows none."""
    names = METRICS.get(dialect.name)
    if names is None:
        return None
    try:
        response = get(address, "/metrics")
    except UsageError:
        return None
    if response.status != 200:
        return None
    return counters_in(response.body.decode(errors="replace"), names)


def counters_in(text: str, names: Mapping[str, str]) -> ServerCounters | None:
    """Return the counts in a Prometheus text, summed over labels; None if it has none of them."""
    found: dict[str, float] = {}
    for name, value in samples(text):
        if name in names and not (name.startswith("llamacpp:") and value >= MOST_EXACT):
            found[names[name]] = found.get(names[name], 0.0) + value
    return ServerCounters(**{k: round(value) for k, value in found.items()}) if found else None


def samples(text: str) -> Iterator[tuple[str, float]]:
    """Yield the name and value of each sample below LARGEST in Prometheus' text format."""
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is None:
            continue
        try:
            value = float(match[2])
        except ValueError:
            continue
        if abs(value) < LARGEST:  # NaN is not
            yield match[1], value


def _growth(before: int | None, after: int | None) -> int | None:
    if before is None or after is None or after < before:
        return None
    return after - before
