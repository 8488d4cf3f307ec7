"""The table of servers: what each accepts, and what it says about itself and its work.

:func:`discover` finds the entry of a server with GET requests alone, so it generates nothing. The
table is data alone. `docs/servers.md` says which entries were measured on a running server, and
which come from documentation and source code.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from batchbench.batching.remote.events import json_or_none
from batchbench.batching.remote.exchange import Address
from batchbench.batching.remote.spec import CHAT
from batchbench.batching.remote.wire import get
from batchbench.errors import UsageError, shown
from batchbench.json_file import LARGEST
from batchbench.workloads.request import Stream

Json = Mapping[str, Any]
"""A JSON object that a server sent: nothing is certain about its keys and values."""


_USAGE: Json = {"stream_options": {"include_usage": True}}


@dataclass(frozen=True)
class Dialect:
    """One kind of server and, after :func:`discover`, what this one says about itself."""

    name: str
    version: str | None = None
    served_models: tuple[str, ...] = ()
    slots: int | None = None  # requests that it says it computes at once
    context: int | None = None  # tokens of prompt and output that fit in one request
    prompt_ids: bool = False  # a prompt may be a list of token ids (at /v1/completions)
    length_field: Literal["ignore_eos", "generation_config"] | None = "ignore_eos"
    """The field that lets a request run to its full length, past the end-of-text token; None if the
    server always stops there. ``generation_config`` is transformers' own: a JSON text with an
    end-of-text token that no model has."""
    prompt_cache_off: bool = False
    """True if each request turns the prompt cache off, or has a part of it to itself. Without such
    a field, the counts of cached tokens show whether the cache was used."""
    fields: Json = field(default_factory=lambda: dict(_USAGE))  # of every request
    salt_field: str | None = None  # gets a random text, so that no two share a cached prompt
    ends_with_done: bool = True  # a complete stream ends with `data: [DONE]`
    top_k: bool = True  # a sampled request may have this field
    all_tokens: Json = field(default_factory=lambda: {"top_p": 1})
    """Fields with which a sampled request keeps all tokens; without them, some servers apply top-k
    or top-p by their own or the model's defaults."""
    metrics: Mapping[str, str] = field(default_factory=dict)
    """Its names at ``/metrics`` for our :data:`Counts`."""


_OF_VLLM: dict[str, Any] = {
    "prompt_ids": True,
    "prompt_cache_off": True,
    "fields": {
        "return_token_ids": True,
        # The usage in every chunk.
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    },
    "salt_field": "cache_salt",
    "all_tokens": {"top_p": 1, "top_k": -1, "min_p": 0},
}
"""Options of vLLM that SGLang has taken over."""

DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            "llama.cpp",
            prompt_ids=True,
            prompt_cache_off=True,
            # `verbose` adds the ids to a chunk; `logprobs` would too, and computes a softmax.
            fields={**_USAGE, "cache_prompt": False, "timings_per_token": True, "verbose": True},
            all_tokens={"top_p": 1, "top_k": 0, "min_p": 0},
            metrics={
                "llamacpp:n_decode_total": "passes",
                "llamacpp:prompt_tokens_total": "prompt_tokens",
                "llamacpp:tokens_predicted_total": "output_tokens",
                "llamacpp:prompt_tokens_cached_total": "cached_tokens",
                "llamacpp:requests_processing": "running",
                "llamacpp:requests_deferred": "waiting",
            },
        ),
        Dialect(
            "vllm",
            **_OF_VLLM,
            metrics={
                "vllm:iteration_tokens_total_count": "passes",
                "vllm:prompt_tokens_total": "prompt_tokens",
                "vllm:generation_tokens_total": "output_tokens",
                "vllm:prefix_cache_hits_total": "cached_tokens",
                "vllm:num_requests_running": "running",
                "vllm:num_requests_waiting": "waiting",
            },
        ),
        Dialect(
            "sglang",
            **_OF_VLLM,
            metrics={
                "sglang:cuda_graph_passes_total": "passes",  # those without CUDA graphs as well
                "sglang:prompt_tokens_total": "prompt_tokens",
                "sglang:generation_tokens_total": "output_tokens",
                "sglang:cached_tokens_total": "cached_tokens",
                "sglang:num_running_reqs": "running",
                "sglang:num_queue_reqs": "waiting",
            },
        ),
        Dialect(
            "tgi",
            length_field=None,
            top_k=False,
            all_tokens={},  # it refuses a top_p of 1
            metrics={
                "tgi_batch_inference_count": "passes",  # prefill and decode
                "tgi_request_input_length_sum": "prompt_tokens",
                "tgi_request_generated_tokens_sum": "output_tokens",
                "tgi_batch_current_size": "running",
                "tgi_queue_size": "waiting",
            },
        ),
        Dialect(
            "transformers",
            length_field="generation_config",
            ends_with_done=False,
            fields={},  # it sends the usage unasked
        ),
        Dialect("openvino", metrics={"ovms_current_graphs": "running"}),
        Dialect("openai", prompt_ids=True, top_k=False),
    )
}
"""The known servers; `openai` is any other that follows OpenAI's API."""


def body_for(
    dialect: Dialect,
    endpoint: str,
    model: str | None,
    prompt: str | Sequence[int],
    output_tokens: int,
    *,
    ignore_eos: bool = True,
    extra_body: Json | None = None,
    drawn: Stream | None = None,
) -> bytes:
    """Return the body of a request.

    Args:
        prompt: a text, or token ids where the server takes them.
        ignore_eos: generate exactly ``output_tokens``, where the server can.
        extra_body: the user's fields, which replace ours; null removes one.
        drawn: the random stream of a sampled request, whose seed the server gets; None for greedy.

    Raises:
        UsageError: the prompt has token ids, and the server takes texts alone.
    """
    body: dict[str, object] = {} if model is None else {"model": model}
    chat = endpoint == CHAT
    if not isinstance(prompt, str) and (chat or not dialect.prompt_ids):
        raise UsageError(
            f"--endpoint {shown(endpoint)}: this {dialect.name} server takes texts, not token ids; "
            "name the folder of its tokenizer with --tokenizer"
        )
    if chat:
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt if isinstance(prompt, str) else [int(token) for token in prompt]
    body |= {"max_tokens": output_tokens, "temperature": 0, "stream": True}
    if drawn is not None:
        how = drawn.sampling
        body |= {"temperature": how.temperature, "seed": drawn.seed, **dialect.all_tokens}
        body |= {"top_p": how.top_p} if how.top_p < 1 else {}
        body |= {"top_k": how.top_k} if how.top_k else {}
    body |= dialect.fields
    if dialect.salt_field is not None:
        body[dialect.salt_field] = secrets.token_hex(8)
    if ignore_eos and dialect.length_field == "ignore_eos":
        body["ignore_eos"] = True
    elif ignore_eos and dialect.length_field == "generation_config":
        config = {
            "max_new_tokens": output_tokens,
            "eos_token_id": -1,
            "do_sample": drawn is not None,
        }
        # Only here does it take top_k, whose default is 50.
        config |= {} if drawn is None else {"top_k": drawn.sampling.top_k}
        body["generation_config"] = json.dumps(config)
    body |= extra_body or {}
    kept = {key: value for key, value in body.items() if value is not None}
    return json.dumps(kept, separators=(",", ":")).encode()


# What a server says about itself


def discover(address: Address) -> Dialect:
    """Return the dialect of a server, with its version, models, slots and context if it says so.

    Raises:
        UsageError: it cannot be reached, or asks for a key.
    """
    models = _models(address)
    names = tuple(name for m in models if isinstance(name := m.get("id"), str))
    owners = [m.get("owned_by") for m in models]
    first = [name for owner, name in _OWNERS.items() if owner in owners]
    for name in (*first, "llama.cpp", "sglang", "tgi", "transformers"):
        if (told := _DESCRIBE[name](address, models)) is not None:
            return replace(DIALECTS[name], served_models=names, **told)
    return replace(DIALECTS["openai"], served_models=names, context=_context(models))


def _models(address: Address) -> list[Json]:
    """Return the entries of the server's list of models; empty if it has no such list."""
    response = get(address, "/v1/models")
    if response.status in (401, 403):
        raise UsageError(
            f"--target: the server refuses the key (HTTP {response.status}); give the right one "
            "with --api-key, or in the environment variable OPENAI_API_KEY"
        )
    listed = _at(json_or_none(response.body), "data") if response.status == 200 else None
    if listed is None and _at(_object(address, "/v3/models"), "data"):
        raise UsageError(  # OpenVINO's server, before it took /v1 as well
            f"--target {address}: this server has its API under /v3; type --target {address}/v3"
        )
    entries = listed if isinstance(listed, list) else []
    return [entry for entry in entries if isinstance(entry, Mapping)]


def _object(address: Address, path: str) -> Json:
    """Return the JSON object at a path; empty if there is none."""
    try:
        response = get(address, path)
    except UsageError:  # a server may close the connection at a path that it does not know
        return {}
    parsed = json_or_none(response.body) if response.status == 200 else None
    return parsed if isinstance(parsed, Mapping) else {}


def _at(value: object, *path: str | int) -> object:
    """Return the value at a place inside JSON; None if there is none."""
    for key in path:
        if isinstance(key, str):
            value = value.get(key) if isinstance(value, Mapping) else None
        else:
            value = value[key] if isinstance(value, list) and key < len(value) else None
    return value


def _count(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None


def _name(value: object) -> str | None:
    return shown(value) if isinstance(value, str) and value else None


def _context(models: Sequence[Json]) -> int | None:
    """Return the smallest context in a list of models, as vLLM and SGLang give it."""
    found = [size for m in models if (size := _count(m.get("max_model_len"))) is not None]
    return min(found, default=None)


def _llama_cpp(address: Address, models: Sequence[Json]) -> Json | None:
    props = _object(address, "/props")
    slots = _count(props.get("total_slots"))
    context = _count(_at(props, "default_generation_settings", "n_ctx"))
    told = {"version": _name(props.get("build_info")), "slots": slots, "context": context}
    return told if slots else None


def _vllm(address: Address, models: Sequence[Json]) -> Json | None:
    version = _name(_object(address, "/version").get("version"))
    return {"version": version, "context": _context(models)}


def _sglang(address: Address, models: Sequence[Json]) -> Json | None:
    info = _object(address, "/get_server_info") or _object(address, "/server_info")
    if "model_path" not in info:
        return None
    slots = _at(info, "internal_states", 0, "effective_max_running_requests_per_dp")
    return {
        "version": _name(info.get("version")),
        "slots": _count(slots) or _count(info.get("max_running_requests")),
        "context": _context(models) or _count(info.get("context_length")),
    }


def _tgi(address: Address, models: Sequence[Json]) -> Json | None:
    info = _object(address, "/info")
    version, context = _name(info.get("version")), _count(info.get("max_total_tokens"))
    is_tgi = info.get("router") == "text-generation-router"
    return {"version": version, "context": context} if is_tgi else None


def _transformers(address: Address, models: Sequence[Json]) -> Json | None:
    paths = _object(address, "/openapi.json").get("paths")
    is_ours = isinstance(paths, Mapping) and {"/load_model", "/v1/responses"} <= paths.keys()
    return {} if is_ours else None


_DESCRIBE: Mapping[str, Callable[[Address, Sequence[Json]], Json | None]] = {
    "llama.cpp": _llama_cpp,
    "vllm": _vllm,
    "sglang": _sglang,
    "tgi": _tgi,
    "transformers": _transformers,
    "openvino": lambda address, models: {},
}
"""Functions that ask a server for fields of its dialect; they return None if it is another."""

_OWNERS = {"llamacpp": "llama.cpp", "vllm": "vllm", "sglang": "sglang", "OVMS": "openvino"}
"""Servers that name themselves as the owner of their models."""


# What a server counts

_SAMPLE = re.compile(r'([a-zA-Z_:][\w:]*)(?:\{(?:[^"}]|"(?:[^"\\]|\\.)*")*\})?[ \t]+(\S+)')
"""A line of Prometheus' text format: a name, labels, a value. Timestamps are left over."""

MOST_EXACT = 10**6
"""Smallest count of llama.cpp that is left out: it writes six digits, so that after a million
passes the difference of two readings is off by up to ten."""


Counts = Mapping[str, int]
"""The counts that a server keeps, by our names for them.

``passes``, ``prompt_tokens``, ``output_tokens`` and ``cached_tokens`` grow from the server's start;
``running`` and ``waiting`` are the requests that it has at the moment.
"""


def read_counts(address: Address, dialect: Dialect) -> Counts:
    """Return the server's counts now; empty if it shows none."""
    try:
        response = get(address, "/metrics") if dialect.metrics else None
    except UsageError:
        return {}
    if response is None or response.status != 200:
        return {}
    return counts_in(response.body.decode(errors="replace"), dialect.metrics)


def counts_in(text: str, names: Mapping[str, str]) -> Counts:
    """Return the counts in a Prometheus text, summed over labels."""
    found: dict[str, float] = {}
    for name, value in samples(text):
        if name in names and not (name.startswith("llamacpp:") and value >= MOST_EXACT):
            found[names[name]] = found.get(names[name], 0.0) + value
    return {name: round(value) for name, value in found.items()}


def growth_of(before: Counts, after: Counts) -> Counts:
    """Return what grew; a count that is smaller than before started again with its server."""
    grown = {name: count - before[name] for name, count in after.items() if name in before}
    return {name: count for name, count in grown.items() if count >= 0}


def samples(text: str) -> Iterator[tuple[str, float]]:
    """Yield the name and value of each sample below LARGEST in Prometheus' text format."""
    for match in filter(None, map(_SAMPLE.match, text.splitlines())):
        try:
            value = float(match[2])
        except ValueError:
            continue
        if abs(value) < LARGEST:  # NaN is not
            yield match[1], value
