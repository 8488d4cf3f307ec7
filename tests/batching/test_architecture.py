"""Descriptions of models, their weights by name, and the tokens of the one lean forward pass."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.models import LLAMA, TINY, Alone, MakeModel
from transformers import AutoConfig

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.torch import architecture as descriptions
from batchbench.batching.engines.torch.architecture import (
    Architecture,
    describe,
    weights_of,
)
from batchbench.batching.engines.torch.build import make_engine
from batchbench.batching.engines.torch.forward import LeanForward, TransformersForward, make_forward
from batchbench.batching.engines.torch.linear import Kernels
from batchbench.batching.engines.torch.reference import TeacherForced
from batchbench.batching.progress import Watch
from batchbench.batching.verification import verify
from batchbench.cli.main import run_command
from batchbench.errors import UsageError
from batchbench.workloads import Workload

if TYPE_CHECKING:
    from batchbench.batching.models.loading import LoadedModel

pytestmark = pytest.mark.machine

LLAMA_3: Mapping[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {**LLAMA_3, "rope_type": "yarn", "factor": 4.0}

DESCRIBED: Mapping[str, Mapping[str, Any]] = {
    "gpt2": TINY,
    "gpt2, untied": {**TINY, "tie_word_embeddings": False, "n_inner": 40},
    "llama": LLAMA,
    "llama, one head of keys each": {**LLAMA, "num_key_value_heads": 4, "head_dim": 10},
    "llama 3, tied, biases": {
        **LLAMA,
        "rope_parameters": LLAMA_3,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "intermediate_size": 50,
    },
    "llama, one head of keys for all": {**LLAMA, "num_key_value_heads": 1, "head_dim": 64},
    "qwen2": {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 24},
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 64},
    "yarn": {**LLAMA, "rope_parameters": YARN},
}

REAL: Mapping[str, Mapping[str, Any]] = {
    "SmolLM2-135M": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "Llama-3.2-1B": {
        "model_type": "llama",
        "head_dim": 64,
        "rope_scaling": {k: v for k, v in LLAMA_3.items() if k != "rope_theta"},
        "rope_theta": 500000.0,
        "eos_token_id": [128001, 128008],
        "torch_dtype": "bfloat16",
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_window_layers": 24,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "use_mrope": False,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "head_dim": 128,
        "max_window_layers": 28,
        "rope_scaling": None,
        "sliding_window": None,
    },
    "Mistral-7B-v0.1": {"model_type": "mistral", "sliding_window": 4096, "attention_dropout": 0.1},
    "gpt2": {
        "model_type": "gpt2",
        "summary_first_dropout": 0.2,
        "task_specific_params": {"text-generation": {"do_sample": True}},
        "n_ctx": 1024,
    },
}
"""Settings as these models' own files have them, cut to the unusual ones."""

NOT_DESCRIBED: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "another type": ({**LLAMA, "model_type": "gemma"}, "gemma is none of gpt2, llama,"),
    "experts": ({**LLAMA, "model_type": "mixtral"}, "mixtral is none of"),
    "activation": ({**LLAMA, "hidden_act": "gelu"}, "activation is gelu"),
    "gpt2's activation": ({**TINY, "activation_function": "relu"}, "activation is relu"),
    "scaled by layer": (
        {**TINY, "scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx: True",
    ),
    "not scaled": ({**TINY, "scale_attn_weights": False}, "scale_attn_weights: False"),
    "unknown": ({**LLAMA, "residual_multiplier": 0.2}, "residual_multiplier: 0.2"),
    "dynamic": (
        {**LLAMA, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rotary positions are of the kind dynamic",
    ),
    "partial": (
        {**LLAMA, "rope_parameters": {**LLAMA_3, "partial_rotary_factor": 0.5}},
        "rotates only 50% of each head",
    ),
    "chunked": (
        {**LLAMA, "model_type": "qwen2", "layer_types": ["chunked_attention"] * 2},
        "layers are of the types chunked_attention",
    ),
    "quantized": (
        {**LLAMA, "quantization_config": {"quant_method": "awq"}},
        "weights are quantized (awq)",
    ),
}


def config_of(settings: Mapping[str, Any]) -> Any:
    return AutoConfig.for_model(**settings)


@pytest.mark.parametrize("name", REAL)
def test_settings_of_real_models_are_described(name: str) -> None:
    found = describe(config_of(REAL[name]))
    assert isinstance(found, Architecture), found
    assert found.rotary == (name != "gpt2")


@pytest.mark.parametrize("name", NOT_DESCRIBED)
def test_what_a_description_cannot_express_has_none(name: str) -> None:
    settings, why = NOT_DESCRIBED[name]
    found = describe(config_of(settings))
    assert isinstance(found, str)
    assert why in found


def test_weights_that_were_read_as_plain_ones_are_described() -> None:
    assert isinstance(
        describe(config_of({**LLAMA, "quantization_config": {"quant_method": "gguf"}})),
        Architecture,
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "qwen3", "mistral"])
def test_no_setting_of_a_class_is_overlooked(kind: str) -> None:
    """Each is read, irrelevant, or refused when it is not the default."""
    usual = config_of({"model_type": kind}).to_dict()
    read = descriptions._READ_OF_GPT2 if kind == "gpt2" else descriptions._READ
    checked = set()
    for key in usual.keys() - read - descriptions._IRRELEVANT - {"model_type"}:
        ends, starts = descriptions._IRRELEVANT_ENDS, descriptions._IRRELEVANT_STARTS
        if key.endswith(ends) or key.startswith(starts):
            continue
        config = config_of({"model_type": kind})
        config.__dict__[key] = "changed"
        found = describe(config)
        assert isinstance(found, str), key
        assert key in found
        checked.add(key)
    assert "is_encoder_decoder" in checked


def stirred(model: LoadedModel) -> LoadedModel:
    """Return the model with norms and biases that differ from those of an untrained one."""
    numbers = torch.Generator().manual_seed(3)
    for name, weight in model.module.named_parameters():
        if weight.ndim == 1:
            drawn = torch.randn(weight.shape, generator=numbers) * 0.3
            weight.data.copy_(drawn + (0.0 if name.endswith("bias") else 1.0))
    return model


@pytest.mark.parametrize("name", DESCRIBED)
def test_all_weights_are_gathered_and_none_is_held_twice(name: str, make_model: MakeModel) -> None:
    model = stirred(make_model(DESCRIBED[name]))
    before, digest = model.weight_bytes, model.weights_digest
    weights = weights_of(model.module)
    assert not isinstance(weights, str)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in parameters(model)}
    assert sum(storage.nbytes() for storage in storages.values()) == before
    del model.__dict__["weights_digest"]
    assert model.weights_digest == digest
    again = weights_of(model.module)
    assert not isinstance(again, str)
    for one, other in zip(weights.layers, again.layers, strict=True):
        assert one.qkv.weight.data_ptr() == other.qkv.weight.data_ptr()
        assert one.qkv.weight.data_ptr() in storages
        assert one.mlp_in.weight.data_ptr() in storages


def parameters(model: LoadedModel) -> list[torch.Tensor]:
    return list(model.module.parameters())


def test_a_weight_without_a_place_leads_to_transformers_pass(make_model: MakeModel) -> None:
    model = make_model(LLAMA)
    model.module.model.layers[1].register_parameter("gain", torch.nn.Parameter(torch.ones(3)))
    forward = make_forward(model)
    assert isinstance(forward, TransformersForward)
    assert forward.why == "model.layers.1.gain has no place in the description of its model"


PROMPTS = [[5, 9, 200, 7], [3], [8] * 9, [11, 250, 4, 90, 33, 2], [60, 61, 62], [299, 298]]
WORKLOAD = Workload.of("mixed lengths", PROMPTS, [9, 14, 3, 12, 1, 7])


@pytest.mark.parametrize("most", Kernels)
@pytest.mark.parametrize("name", DESCRIBED)
def test_tokens_are_those_of_the_model_alone(
    name: str, most: Kernels, make_model: MakeModel, alone: Alone
) -> None:
    model = stirred(make_model(DESCRIBED[name]))
    forward = make_forward(model, most)
    assert isinstance(forward, LeanForward)
    expected = [alone(model, p, n) for p, n in zip(PROMPTS, WORKLOAD.output_tokens, strict=True)]
    engine, _ = make_engine("slots", model, 3, 24, forward=forward)
    for policy in ("static", "continuous"):
        for prefill in ("separate", "mixed"):
            batcher = Batcher(policy, engine, 3, prefill=prefill, max_batched_tokens=5)
            recording = batcher.serve(WORKLOAD, Watch())
            tokens = [recording.tokens_of(i).tolist() for i in range(len(PROMPTS))]
            assert tokens == expected


@pytest.mark.parametrize("name", DESCRIBED)
@pytest.mark.parametrize("most", Kernels)
def test_tokens_in_bfloat16_are_right_or_ties(
    name: str, most: Kernels, make_model: MakeModel
) -> None:
    model = stirred(make_model(DESCRIBED[name], dtype="bfloat16"))
    engine, _ = make_engine("slots", model, 3, 24, forward=make_forward(model, most))
    served = [Batcher(p, engine, 3).serve(WORKLOAD, Watch()) for p in ("static", "continuous")]
    assert verify(WORKLOAD, served, TeacherForced(model)).passed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", DESCRIBED)
def test_the_notebooks_engine_gives_the_same_tokens(
    name: str, dtype: str, make_model: MakeModel
) -> None:
    """The slots engine has joined the weights of the model, which both engines then share."""
    model = stirred(make_model(DESCRIBED[name], dtype=dtype))
    make_forward(model, Kernels.OWN)
    engine, _ = make_engine("notebook", model, 3, 24)
    served = [Batcher(p, engine, 3).serve(WORKLOAD, Watch()) for p in ("static", "continuous")]
    found = verify(WORKLOAD, served, TeacherForced(model))
    assert found.passed
    assert dtype == "bfloat16" or found.identical == len(PROMPTS)


@pytest.mark.parametrize("window", [23, 24])
def test_a_request_must_fit_into_a_sliding_window(window: int, make_model: MakeModel) -> None:
    model = make_model({**DESCRIBED["mistral"], "sliding_window": window})
    if window == 24:
        assert make_engine("slots", model, 2, 24)[0].execution_note is None
        return
    with pytest.raises(UsageError, match=r"sliding window of 23 tokens.*use --engine notebook"):
        make_engine("slots", model, 2, 24)


def test_a_run_says_why_it_takes_transformers_pass(
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the terminal, and in the result."""
    make_model({**LLAMA, "hidden_act": "gelu"}).module.save_pretrained(tmp_path / "other")
    words = ["run", "--model", tmp_path / "other", "--batch-size", 2, "--queue-size", 3]
    words += ["--long-tokens", 4, "--trials", 1, "--output", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["batchbench", *map(str, words)])
    assert run_command() == 0
    said = "transformers' forward pass: its activation is gelu"
    assert said in capsys.readouterr().err
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["model"]["execution_note"] == said
