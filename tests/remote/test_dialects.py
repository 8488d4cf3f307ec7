"""Dialects: each server is known by its GETs, and its requests and streams are its own."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.answers import ADDRESS, Answers, answers_of, recorded, streamed

from batchbench.batching.remote.dialects import DIALECTS, Dialect, body_for, discover
from batchbench.batching.remote.events import parse
from batchbench.errors import UsageError
from batchbench.workloads.request import Stream
from batchbench.workloads.sampling import Sampling

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

RECORDED = ("llama.cpp", "vllm", "transformers")


def body(dialect: Dialect, prompt: Any = "Hello", endpoint: str = COMPLETIONS, **more: Any) -> Any:
    return json.loads(body_for(dialect, endpoint, "served", prompt, 7, **more))


# Discovery


@pytest.mark.parametrize("name", RECORDED)
def test_a_real_server_is_known_by_its_answers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = answers_of(name).install(monkeypatch)
    found = discover(ADDRESS)
    assert found.name == name
    assert len(found.served_models) == 1
    assert "/metrics" not in server.asked


def test_servers_say_their_version_context_and_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    answers_of("vllm").install(monkeypatch)
    vllm = discover(ADDRESS)
    assert (vllm.version, vllm.context, vllm.slots) == ("0.32.0", 512, None)
    answers_of("llama.cpp").install(monkeypatch)
    llama = discover(ADDRESS)
    assert (llama.context, llama.slots) == (512, 8)
    assert llama.version


def models(**entry: object) -> tuple[int, str]:
    return 200, json.dumps({"object": "list", "data": [{"id": "m", **entry}]})


SGLANG = {"model_path": "m", "version": "0.5.2", "max_running_requests": None}

DOCUMENTED: dict[str, tuple[dict[str, tuple[int, str]], Dialect]] = {
    # From the servers' documentation and source code; none of them ran.
    "sglang": (
        {
            "/v1/models": models(owned_by="sglang", max_model_len=4096),
            "/get_server_info": (
                200,
                json.dumps(
                    {
                        **SGLANG,
                        "internal_states": [{"effective_max_running_requests_per_dp": 48}],
                    }
                ),
            ),
        },
        Dialect("sglang", "0.5.2", ("m",), slots=48, context=4096),
    ),
    "sglang under a newer path": (
        {
            "/v1/models": models(owned_by="sglang"),
            "/server_info": (200, json.dumps({**SGLANG, "max_running_requests": 16})),
        },
        Dialect("sglang", "0.5.2", ("m",), slots=16),
    ),
    "tgi": (
        {
            "/v1/models": models(owned_by="m"),
            "/info": (
                200,
                '{"router": "text-generation-router", "version": "3.3.6", "max_total_tokens": 99}',
            ),
        },
        Dialect("tgi", "3.3.6", ("m",), context=99),
    ),
    "openvino": ({"/v1/models": models(owned_by="OVMS")}, Dialect("openvino", None, ("m",))),
    "vllm behind a router": (
        {"/v1/models": models(owned_by="vllm", max_model_len=64)},
        Dialect("vllm", None, ("m",), context=64),
    ),
    "vllm with two models": (
        {
            "/v1/models": (
                200,
                json.dumps(
                    {
                        "data": [
                            {"id": name, "owned_by": "vllm", "max_model_len": size}
                            for name, size in (("a", 64), ("b", 32))
                        ]
                    }
                ),
            )
        },
        Dialect("vllm", None, ("a", "b"), context=32),
    ),
    "another": (
        {"/v1/models": models(owned_by="me"), "/version": (200, '{"version": "1"}')},
        Dialect("openai", None, ("m",)),
    ),
    "another without a list of models": ({}, Dialect("openai")),
    "one whose list is not JSON": ({"/v1/models": (200, "<html>")}, Dialect("openai")),
    "one that closes the connection at other paths": (
        {"/v1/models": models(), "/props": (0, ""), "/info": (0, "")},
        Dialect("openai", None, ("m",)),
    ),
}


@pytest.mark.parametrize("case", DOCUMENTED)
def test_other_servers_are_known_as_documented(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table, expected = DOCUMENTED[case]
    Answers(table).install(monkeypatch)
    found = discover(ADDRESS)
    told = [expected.name, expected.version, expected.served_models]
    assert [found.name, found.version, found.served_models] == told
    assert (found.slots, found.context) == (expected.slots, expected.context)


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_wants_a_key_is_a_usage_error(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Answers({"/v1/models": (status, "{}")}).install(monkeypatch)
    with pytest.raises(UsageError, match=f"HTTP {status}.*--api-key"):
        discover(ADDRESS)


def test_a_server_with_its_api_under_v3_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    Answers({"/v3/models": models(owned_by="OVMS")}).install(monkeypatch)
    with pytest.raises(UsageError, match=r"type --target http://127\.0\.0\.1:1/v3$"):
        discover(ADDRESS)


def test_a_server_that_is_not_there_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Answers({"/v1/models": (0, "")}).install(monkeypatch)
    with pytest.raises(UsageError, match="--target"):
        discover(ADDRESS)


KEYS = st.sampled_from(
    (
        *("data", "id", "owned_by", "total_slots", "version", "paths", "router", "model_path"),
        *("max_model_len", "internal_states", "default_generation_settings", "n_ctx"),
    )
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
OWNERS = st.sampled_from(["llamacpp", "vllm", "sglang", "OVMS", "me"])
PATHS = ("/v1/models", "/props", "/version", "/get_server_info", "/info", "/openapi.json")


@given(st.dictionaries(st.sampled_from(PATHS), VALUES), OWNERS, VALUES)
def test_no_answer_breaks_discovery(table: dict[str, Any], owner: str, value: Any) -> None:
    listed = {"data": [{"id": value, "owned_by": owner, "max_model_len": value}, value]}
    with pytest.MonkeyPatch.context() as patch:
        answers = {path: (200, json.dumps(answer)) for path, answer in table.items()}
        Answers({"/v1/models": (200, json.dumps(listed)), **answers}).install(patch)
        found = discover(ADDRESS)
    assert found.name in DIALECTS
    assert all(isinstance(name, str) for name in found.served_models)
    assert found.slots is None or found.slots > 0
    assert found.context is None or found.context > 0


# Requests


@pytest.mark.parametrize("name", DIALECTS)
def test_a_request_is_greedy_streamed_and_of_the_given_length(name: str) -> None:
    sent = body(DIALECTS[name])
    asked = {key: sent[key] for key in ("model", "prompt", "max_tokens", "temperature", "stream")}
    assert asked == {
        "model": "served",
        "prompt": "Hello",
        "max_tokens": 7,
        "temperature": 0,
        "stream": True,
    }


def test_each_server_has_its_own_way_past_the_end_of_text() -> None:
    for name in ("llama.cpp", "vllm", "sglang", "openvino", "openai"):
        assert body(DIALECTS[name])["ignore_eos"] is True
        assert "ignore_eos" not in body(DIALECTS[name], ignore_eos=False)
    assert "ignore_eos" not in body(DIALECTS["tgi"])
    config = json.loads(body(DIALECTS["transformers"])["generation_config"])
    assert (config["max_new_tokens"], config["eos_token_id"]) == (7, -1)
    assert "generation_config" not in body(DIALECTS["transformers"], ignore_eos=False)


def test_a_prompt_is_ids_where_the_server_takes_them_and_a_text_in_a_chat() -> None:
    assert body(DIALECTS["vllm"], [3, 1, 2])["prompt"] == [3, 1, 2]
    assert body(DIALECTS["vllm"], "Hi", CHAT)["messages"] == [{"role": "user", "content": "Hi"}]
    for name, endpoint in (("transformers", COMPLETIONS), ("tgi", COMPLETIONS), ("vllm", CHAT)):
        with pytest.raises(UsageError, match="--tokenizer"):
            body(DIALECTS[name], [3, 1, 2], endpoint)


STREAM = Stream(Sampling(0.7, 0.9, 0, 3), 5)


def sampled(name: str, stream: Stream = STREAM) -> dict[str, Any]:
    return dict(body(DIALECTS[name], drawn=stream))


@pytest.mark.parametrize("name", DIALECTS)
def test_a_sampled_request_has_its_temperature_its_cut_and_a_seed_of_its_own(name: str) -> None:
    sent, next_request = sampled(name), sampled(name, STREAM._replace(request=6))
    assert (sent["temperature"], sent["top_p"]) == (0.7, 0.9)
    assert sent["seed"] == sampled(name)["seed"] != next_request["seed"]
    assert 0 <= sent["seed"] < 2**31
    other = Stream(replace(STREAM.sampling, seed=4), 5)
    assert sampled(name, other)["seed"] != sent["seed"]


def test_servers_that_cut_by_themselves_are_told_to_keep_all_tokens() -> None:
    """llama.cpp keeps 40 tokens and 0.95 unless told; others do as the model's files say."""
    keeps = {
        "llama.cpp": {"top_p": 1, "top_k": 0, "min_p": 0},
        "vllm": {"top_p": 1, "top_k": -1, "min_p": 0},
        "sglang": {"top_p": 1, "top_k": -1, "min_p": 0},
        "tgi": {},  # refuses a top_p of 1
        "transformers": {"top_p": 1},
        "openvino": {"top_p": 1},
        "openai": {"top_p": 1},
    }
    assert keeps.keys() == DIALECTS.keys()
    for name, fields in keeps.items():
        sent = sampled(name, Stream(Sampling(0.7), 5))
        assert {key: sent[key] for key in ("top_p", "top_k", "min_p") if key in sent} == fields
    for name in ("llama.cpp", "vllm", "sglang", "openvino"):
        assert DIALECTS[name].top_k
        assert sampled(name, Stream(Sampling(0.7, 1.0, 20), 5))["top_k"] == 20
    config = json.loads(sampled("transformers")["generation_config"])
    assert (config["do_sample"], config["top_k"]) == (True, 0)
    assert [name for name, dialect in DIALECTS.items() if not dialect.top_k] == ["tgi", "openai"]


def test_prompt_caches_are_off_where_a_request_can_turn_them_off() -> None:
    for name, dialect in DIALECTS.items():
        once, again = body(dialect), body(dialect)
        isolated = once != again  # a salt of its own
        off = once.get("cache_prompt") is False
        assert (isolated or off) == (dialect.prompt_cache_off), name


def test_the_users_fields_replace_ours_and_null_removes_one() -> None:
    sent = body(DIALECTS["vllm"], extra_body={"temperature": 1, "ignore_eos": None, "n": 2})
    assert (sent["temperature"], sent["n"]) == (1, 2)
    assert "ignore_eos" not in sent


def test_a_request_asks_for_token_ids_and_counts_where_a_server_can_send_them() -> None:
    assert (
        body(DIALECTS["llama.cpp"]).items() >= {"verbose": True, "timings_per_token": True}.items()
    )
    for name in ("vllm", "sglang"):
        sent = body(DIALECTS[name])
        assert sent["return_token_ids"] is True
        assert sent["stream_options"]["continuous_usage_stats"] is True


def test_a_request_asks_for_the_usage_except_where_it_comes_unasked() -> None:
    for name, dialect in DIALECTS.items():
        asked = body(dialect).get("stream_options", {}).get("include_usage", False)
        assert asked == (name != "transformers")


# Streams


@pytest.mark.parametrize("endpoint", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("name", RECORDED)
def test_a_real_stream_has_the_tokens_that_were_asked_for(name: str, endpoint: str) -> None:
    posts = recorded(name)["posts"]
    stream = next(v["body"] for k, v in posts.items() if k.startswith(endpoint))
    reply = parse(streamed(stream), 3, ends_with_done=DIALECTS[name].ends_with_done)
    assert reply.failure is None
    assert (reply.output_tokens, reply.usage_output, reply.finish_reason) == (3, 3, "length")
    assert reply.itl_known
    has_ids = name == "vllm" or (name == "llama.cpp" and endpoint == COMPLETIONS)
    assert (reply.token_ids is not None) == has_ids


def llama_chunk(text: str, count: int, finish: str | None = None) -> str:
    choice = {"text": text, "index": 0, "finish_reason": finish}
    usage = {"usage": {"completion_tokens": count}} if finish else {}
    return f"data: {json.dumps({'choices': [choice], 'timings': {'predicted_n': count}, **usage})}"


def test_a_token_that_is_half_a_character_has_the_time_of_the_chunk_that_counts_it() -> None:
    """llama.cpp holds such a token back, and counts it with the next, or with the end."""
    chunks = [llama_chunk("a", 1), llama_chunk("\u2192", 3), llama_chunk("", 4, "length")]
    reply = parse(streamed("\n\n".join([*chunks, "data: [DONE]"])), 4)
    assert reply.failure is None
    assert reply.itl_known
    assert reply.token_times_ns.tolist() == [1, 2, 2, 3]  # the read of each event; 0 is the head
    assert reply.token_ids is None


@pytest.mark.parametrize("name", ["vllm", "transformers"])
def test_a_real_server_refuses_a_model_that_it_does_not_serve(name: str) -> None:
    answer = recorded(name)["posts"][f"{COMPLETIONS} no-such-model"]
    assert answer["status"] in (400, 404)
