"""The table of servers: what each accepts, and what it says about itself.

:func:`discover` finds the entry of a server with GET requests alone, so it generates nothing. The
table is data alone. `docs/servers.md` says which entries were measured on a running server, and
which come from documentation and source code.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from batchbench.batching.remote.exchange import Address
from batchbench.batching.remote.wire import get
from batchbench.errors import UsageError, shown
from batchbench.workloads.request import Stream

Json = Mapping[str, Any]
"""A JSON object that a server sent: nothing is certain about its keys and values."""

CHAT = "/chat/completions"
"""The end of the endpoints that take messages and not a prompt."""


class LengthField(StrEnum):
    """The request field that lets a request run to its full length, past the end-of-text token."""

    IGNORE_EOS = "ignore_eos"
    GENERATION_CONFIG = "generation_config"
    """transformers' own: a JSON text with an end-of-text token that no model has."""


class PromptCache(StrEnum):
    """A server's cache of prompts that it has seen, and the use of it in our requests."""

    OFF = "off"
    """Each request turns it off, or asks for a part of the cache of its own."""
    UNKNOWN = "unknown"
    """No request field turns it off; the counts of cached tokens show whether it was used."""


@dataclass(frozen=True)
class Dialect:
    """One kind of server and, after :func:`discover`, what this one says about itself.

    Attributes:
        slots: requests that the server says it computes at once.
        context: tokens of prompt and output that fit in one request.
        prompt_ids: a prompt may be a list of token ids (at ``/v1/completions``).
        length_field: None if the server always stops at the end-of-text token.
        fields: fields of every request, such as those that ask for token ids and counts.
        salt_field: gets a random text in each request, so that no two share a cached prompt.
        ends_with_done: a complete stream ends with ``data: [DONE]``.
        usage_on_request: the usage comes only if ``stream_options`` asks for it.
        top_k: a sampled request may have this field.
        all_tokens: fields with which a sampled request keeps all tokens; without them, some servers
            cut as their own or the model's defaults say.
    """

    name: str
    version: str | None = None
    served_models: tuple[str, ...] = ()
    slots: int | None = None
    context: int | None = None
    prompt_ids: bool = False
    length_field: LengthField | None = LengthField.IGNORE_EOS
    prompt_cache: PromptCache = PromptCache.UNKNOWN
    fields: Json = field(default_factory=dict)
    salt_field: str | None = None
    ends_with_done: bool = True
    usage_on_request: bool = True
    top_k: bool = True
    all_tokens: Json = field(default_factory=lambda: {"top_p": 1})


_STREAM_OPTIONS = "stream_options"

_STREAM_COUNTS = {_STREAM_OPTIONS: {"include_usage": True, "continuous_usage_stats": True}}
"""vLLM's option for the usage in every chunk; SGLang has taken it over."""

_ALL_TOKENS = {"top_p": 1, "top_k": -1, "min_p": 0}

DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            "llama.cpp",
            prompt_ids=True,
            prompt_cache=PromptCache.OFF,
            # `verbose` adds the ids to a chunk; `logprobs` would too, and computes a softmax.
            fields={"cache_prompt": False, "timings_per_token": True, "verbose": True},
            all_tokens={"top_p": 1, "top_k": 0, "min_p": 0},
        ),
        Dialect(
            "vllm",
            prompt_ids=True,
            prompt_cache=PromptCache.OFF,
            fields={"return_token_ids": True, **_STREAM_COUNTS},
            salt_field="cache_salt",
            all_tokens=_ALL_TOKENS,
        ),
        Dialect(
            "sglang",
            prompt_ids=True,
            prompt_cache=PromptCache.OFF,
            fields={"return_token_ids": True, **_STREAM_COUNTS},
            salt_field="cache_salt",
            all_tokens=_ALL_TOKENS,
        ),
        # It refuses a top_p of 1.
        Dialect("tgi", length_field=None, top_k=False, all_tokens={}),
        Dialect(
            "transformers",
            length_field=LengthField.GENERATION_CONFIG,
            ends_with_done=False,
            usage_on_request=False,
        ),
        Dialect("openvino"),
        Dialect("openai", prompt_ids=True, top_k=False),
    )
}
"""The known servers; `openai` is any other that follows OpenAI's API."""


def _at(value: object, *path: str | int) -> object:
    """Return the value at a place inside JSON; None if there is none."""
    for key in path:
        if isinstance(key, str):
            value = value.get(key) if isinstance(value, Mapping) else None
        else:
            value = value[key] if isinstance(value, list) and key < len(value) else None
    return value


def body_for(
    dialect: Dialect,
    endpoint: str,
    model: str | None,
    prompt: str | Sequence[int],
    output_tokens: int,
    *,
    ignore_eos: bool = True,
    extra_body: Json | None = None,
    stream: bool = True,
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
    if endpoint.endswith(CHAT):
        body["messages"] = [{"role": "user", "content": _text(dialect, endpoint, prompt)}]
    elif dialect.prompt_ids and not isinstance(prompt, str):
        body["prompt"] = [int(token) for token in prompt]
    else:
        body["prompt"] = _text(dialect, endpoint, prompt)
    body |= {"max_tokens": output_tokens, **_sampled_fields(dialect, drawn), "stream": stream}
    if stream and dialect.usage_on_request:
        body[_STREAM_OPTIONS] = {"include_usage": True}
    body |= {
        key: value for key, value in dialect.fields.items() if stream or key != _STREAM_OPTIONS
    }
    if dialect.salt_field is not None:
        body[dialect.salt_field] = secrets.token_hex(8)
    if ignore_eos:
        body |= _length_fields(dialect, output_tokens, drawn)
    body |= extra_body or {}
    kept = {key: value for key, value in body.items() if value is not None}
    return json.dumps(kept, separators=(",", ":")).encode()


def _text(dialect: Dialect, endpoint: str, prompt: str | Sequence[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    raise UsageError(
        f"--endpoint {shown(endpoint)}: this {dialect.name} server takes texts, not token ids; "
        "name the folder of its tokenizer with --tokenizer"
    )


def _sampled_fields(dialect: Dialect, drawn: Stream | None) -> Json:
    if drawn is None:
        return {"temperature": 0}
    how = drawn.sampling
    cuts = {"top_p": how.top_p} if how.top_p < 1 else {}
    cuts |= {"top_k": how.top_k} if how.top_k else {}
    seed = {"seed": drawn.seed}
    return {"temperature": how.temperature, **seed, **dialect.all_tokens, **cuts}


def _length_fields(dialect: Dialect, output_tokens: int, drawn: Stream | None) -> Json:
    match dialect.length_field:
        case LengthField.IGNORE_EOS:
            return {"ignore_eos": True}
        case LengthField.GENERATION_CONFIG:
            # Only here does it take top_k, whose default is 50.
            sampled = drawn is not None
            cut = {} if drawn is None else {"top_k": drawn.sampling.top_k}
            config = {"max_new_tokens": output_tokens, "eos_token_id": -1, "do_sample": sampled}
            config |= cut
            return {"generation_config": json.dumps(config)}
        case None:
            return {}


def discover(address: Address) -> Dialect:
    """Return the dialect of a server, with its version, models, slots and context if it says so.

    Raises:
        UsageError: it cannot be reached, or asks for a key.
    """
    models = _models(address)
    names = tuple(name for m in models if isinstance(name := m.get("id"), str))
    owners = {owner for m in models if isinstance(owner := m.get("owned_by"), str)}
    for owner, describe in _DESCRIBE.items():
        if owner in owners and (found := describe(address, models)) is not None:
            return replace(found, served_models=names)
    for describe in (_llama_cpp, _sglang, _tgi, _transformers):
        if (found := describe(address, models)) is not None:
            return replace(found, served_models=names)
    return replace(DIALECTS["openai"], served_models=names, context=_context(models))


def _models(address: Address) -> list[Json]:
    """Return the entries of the server's list of models; empty if it has no such list."""
    response = get(address, "/v1/models")
    if response.status in (401, 403):
        raise UsageError(
            f"--target: the server refuses the key (HTTP {response.status}); give the right one "
            "with --api-key, or in the environment variable OPENAI_API_KEY"
        )
    listed = _at(_parsed(response.body), "data") if response.status == 200 else None
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
    parsed = _parsed(response.body) if response.status == 200 else None
    return parsed if isinstance(parsed, Mapping) else {}


def _parsed(content: bytes) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _count(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None


def _name(value: object) -> str | None:
    return shown(value) if isinstance(value, str) and value else None


def _context(models: Sequence[Json]) -> int | None:
    """Return the smallest context in a list of models, as vLLM and SGLang give it."""
    found = [size for m in models if (size := _count(m.get("max_model_len"))) is not None]
    return min(found, default=None)


def _llama_cpp(address: Address, models: Sequence[Json]) -> Dialect | None:
    props = _object(address, "/props")
    slots = _count(props.get("total_slots"))
    if slots is None:
        return None
    context = _count(_at(props, "default_generation_settings", "n_ctx"))
    version = _name(props.get("build_info"))
    return replace(DIALECTS["llama.cpp"], version=version, slots=slots, context=context)


def _vllm(address: Address, models: Sequence[Json]) -> Dialect | None:
    version = _name(_object(address, "/version").get("version"))
    return replace(DIALECTS["vllm"], version=version, context=_context(models))


def _sglang(address: Address, models: Sequence[Json]) -> Dialect | None:
    info = _object(address, "/get_server_info") or _object(address, "/server_info")
    if "model_path" not in info:
        return None
    told = _at(info, "internal_states", 0, "effective_max_running_requests_per_dp")
    return replace(
        DIALECTS["sglang"],
        version=_name(info.get("version")),
        slots=_count(told) or _count(info.get("max_running_requests")),
        context=_context(models) or _count(info.get("context_length")),
    )


def _tgi(address: Address, models: Sequence[Json]) -> Dialect | None:
    info = _object(address, "/info")
    if info.get("router") != "text-generation-router":
        return None
    return replace(
        DIALECTS["tgi"],
        version=_name(info.get("version")),
        context=_count(info.get("max_total_tokens")),
    )


def _openvino(address: Address, models: Sequence[Json]) -> Dialect | None:
    return DIALECTS["openvino"]


def _transformers(address: Address, models: Sequence[Json]) -> Dialect | None:
    paths = _object(address, "/openapi.json").get("paths")
    is_ours = isinstance(paths, Mapping) and {"/load_model", "/v1/responses"} <= paths.keys()
    return DIALECTS["transformers"] if is_ours else None


_DESCRIBE: Mapping[str, Callable[[Address, Sequence[Json]], Dialect | None]] = {
    "llamacpp": _llama_cpp,
    "vllm": _vllm,
    "sglang": _sglang,
    "OVMS": _openvino,
}
"""Servers that name themselves as the owner of their models."""
