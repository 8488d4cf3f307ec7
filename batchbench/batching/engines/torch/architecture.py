"""The description of a decoder-only model: what its forward pass computes, and its weights.

One forward pass computes every model that an :class:`Architecture` describes: GPT-2, Llama
(SmolLM), Qwen2, Qwen3 and Mistral. :func:`describe` reads it from a Hugging Face configuration and
is strict: a setting that it does not know leads to transformers' own forward pass, not to wrong
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from transformers import PreTrainedConfig, PreTrainedModel


class Names(NamedTuple):
    """The names of weights in a module of transformers; those of a layer are within the layer."""

    tokens: str
    layers: str
    norm_1: str
    qkv: Sequence[str]
    attention_out: str
    norm_2: str
    mlp_in: Sequence[str]
    mlp_out: str
    norm: str
    positions: str | None = None
    rotary: str | None = None
    head_norms: Sequence[str] = ()


@dataclass(frozen=True)
class Architecture:
    """A decoder-only model: pre-norm layers of causal attention and an MLP, with residuals.

    With ``rotary``, queries and keys are rotated by their positions, and norms divide by the root
    mean square; without it, positions have embeddings, and norms are layer norms. With ``gated``
    the MLP is SwiGLU, silu(gate) × up; otherwise it is one matrix and GPT-2's GELU. With
    ``head_norms`` each head of queries and keys is normed before it is rotated. Scores are scaled
    by 1 / √head_dim.
    """

    vocabulary: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int  # of the MLP
    eps: float
    rotary: bool
    gated: bool
    head_norms: bool
    tied: bool  # the last product's weight is the embedding
    names: Names

    @property
    def activations(self) -> int:
        """The most numbers of a token that a pass holds at once, in torch's own operators."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim
        return 2 * self.width + attention + self.inner * (4 if self.gated else 2)


_GPT2 = Names(
    tokens="transformer.wte",
    positions="transformer.wpe",
    layers="transformer.h",
    norm_1="ln_1",
    qkv=("attn.c_attn",),
    attention_out="attn.c_proj",
    norm_2="ln_2",
    mlp_in=("mlp.c_fc",),
    mlp_out="mlp.c_proj",
    norm="transformer.ln_f",
)
_LLAMA = Names(
    tokens="model.embed_tokens",
    rotary="model.rotary_emb",
    layers="model.layers",
    norm_1="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.o_proj",
    norm_2="post_attention_layernorm",
    mlp_in=("mlp.gate_proj", "mlp.up_proj"),
    mlp_out="mlp.down_proj",
    norm="model.norm",
)
_QWEN3 = _LLAMA._replace(head_norms=("self_attn.q_norm", "self_attn.k_norm"))
_NAMES = {"gpt2": _GPT2, "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _QWEN3}

_READ = {
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "intermediate_size", "hidden_act", "rms_norm_eps", "rope_parameters"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "max_position_embeddings"),
    "quantization_config",
}
_READ_OF_GPT2 = {
    *("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"),
    *("activation_function", "layer_norm_epsilon", "tie_word_embeddings", "quantization_config"),
}
"""Settings that :func:`describe` reads; biases and the sizes of an MLP come from the weights."""

_IRRELEVANT = {
    *("architectures", "dtype", "torch_dtype", "transformers_version", "initializer_range"),
    *("id2label", "label2id", "problem_type", "task_specific_params", "use_cache"),
    *("is_llama_config", "rope_interleaved", "use_mrope", "n_ctx", "pretraining_tp"),
    "transformers.js_config",
}
_IRRELEVANT_ENDS = ("_token_id", "_pdrop", "dropout")
_IRRELEVANT_STARTS = ("_", "summary_", "output_", "unsloth_")
"""Settings of training, of other tasks, and those that transformers' module does not read."""

_STATIC_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angles do not depend on the length of a request."""


def describe(config: PreTrainedConfig) -> Architecture | str:
    """Return the description of a configuration, or the reason why it has none.

    A setting that is neither read here nor irrelevant must have the default of its class. A sliding
    window is none for requests that fit in it: the slots engine refuses longer ones.
    """
    names = _NAMES.get(config.model_type)
    if names is None:
        return f"{config.model_type} is none of {', '.join(_NAMES)}"
    why = _unknown(config, _READ_OF_GPT2 if names is _GPT2 else _READ)
    if why is not None:
        return why
    gpt2, heads = names is _GPT2, config.num_attention_heads
    return Architecture(
        vocabulary=config.vocab_size,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=heads,
        kv_heads=heads if gpt2 else config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        inner=config.n_inner or 4 * config.n_embd if gpt2 else config.intermediate_size,
        eps=float(config.layer_norm_epsilon if gpt2 else config.rms_norm_eps),
        rotary=not gpt2,
        gated=not gpt2,
        head_norms=bool(names.head_norms),
        tied=bool(config.tie_word_embeddings),
        names=names,
    )


def architecture_of(config: PreTrainedConfig) -> Architecture | None:
    """Return the description of a configuration; None if it has none."""
    found = describe(config)
    return None if isinstance(found, str) else found


def _unknown(config: PreTrainedConfig, read: set[str]) -> str | None:
    """Return the first setting that no description expresses; None if there is none."""
    usual = type(config)().to_dict()
    for key, value in config.to_dict().items():
        known = key in read | _IRRELEVANT or (key in usual and value == usual[key])
        if not (known or key.startswith(_IRRELEVANT_STARTS) or key.endswith(_IRRELEVANT_ENDS)):
            return f"its configuration has {key}: {value!r}"[:120]
    act = getattr(config, "hidden_act", None) or config.activation_function
    if act not in (("gelu_new", "gelu_pytorch_tanh") if read is _READ_OF_GPT2 else ("silu",)):
        return f"its activation is {act}"
    how = getattr(config, "quantization_config", None)
    read_from = dict.get if isinstance(how, dict) else getattr
    method = None if how is None else read_from(how, "quant_method", None)
    if method is not None and str(getattr(method, "value", method)) != "gguf":  # read as plain ones
        return f"its weights are quantized ({method})"
    layers = set(getattr(config, "layer_types", None) or ())
    if layers - {"full_attention", "sliding_attention"}:
        return f"its layers are of the types {', '.join(sorted(layers))}"
    rope = getattr(config, "rope_parameters", None) or {}
    kind, part = rope.get("rope_type", "default"), rope.get("partial_rotary_factor") or 1.0
    if kind not in _STATIC_ROTATIONS or any(isinstance(value, dict) for value in rope.values()):
        return f"its rotary positions are of the kind {kind}"
    return None if part == 1.0 else f"it rotates only {part:.0%} of each head"


class Norm(NamedTuple):
    """A layer norm; without a bias, a norm by the root mean square. ``[width]`` each."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm of ``x`` over its last dimension, rounded where transformers rounds."""
        if self.bias is not None:
            return layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Matrix(NamedTuple):
    """The weight of a product, ``[outputs, inputs]`` with any strides, and its ``[outputs]``."""

    weight: Tensor
    bias: Tensor | None


class Layer(NamedTuple):
    """The weights of one layer.

    The outputs of ``qkv`` are the heads of queries, then those of keys, then those of values. The
    outputs of a gated ``mlp_in`` are the gate's, then those that it multiplies.
    """

    norm_1: Norm
    qkv: Matrix
    head_norms: Sequence[Norm]  # of queries and of keys; empty if they have none
    attention_out: Matrix
    norm_2: Norm
    mlp_in: Matrix
    mlp_out: Matrix


class Rotary(NamedTuple):
    """Rotary positions (Su et al. 2021), as transformers computes them for a model."""

    inverse: Tensor  # [head_dim / 2]: radians a position
    scale: float  # of cosines and sines

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Return cosines and sines of the angles, ``[2, tokens, head_dim / 2]``."""
        angles = positions[:, None].float() * self.inverse.float()
        return (torch.stack([angles.cos(), angles.sin()]) * self.scale).to(dtype)


class Rotation(NamedTuple):
    """The change of queries and keys before they are multiplied: norms of heads, and rotation."""

    rotary: Rotary
    norms: Sequence[Norm] = ()  # of queries and of keys; empty if they have none


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Return heads, ``[tokens, heads, head_dim]``, rotated by ``angles`` of :class:`Rotary`.

    A number is rotated with the one that is half a head away, as transformers does.
    """
    cos, sin = angles[:, :, None]
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class Weights(NamedTuple):
    """All weights of a described model."""

    of: Architecture
    tokens: Tensor  # [vocabulary, width]
    positions: Tensor | None  # [context, width]
    rotary: Rotary | None
    layers: Sequence[Layer]
    norm: Norm
    head: Tensor  # [vocabulary, width]


def weights_of(module: PreTrainedModel) -> Weights | str:
    """Return the weights of a loaded module by their names, or the reason why it has none.

    Weights that multiply the same input are laid end to end, so that one product computes them. The
    module's own parameters become views of them: nothing is held twice.
    """
    of = describe(module.config)
    if isinstance(of, str):
        return of
    names, used = of.names, set[int]()

    def named(root: nn.Module, name: str) -> Any:
        found = attrgetter(name)(root)
        used.update(map(id, found.parameters()))
        return found

    def norm(root: nn.Module, name: str) -> Norm:
        found = named(root, name)
        return Norm(found.weight, getattr(found, "bias", None), of.eps)

    def matrix(root: nn.Module, *parts: str) -> Matrix:
        found = [named(root, name) for name in parts]
        weight = _end_to_end([m.weight for m in found])
        # transformers' Conv1D has a weight of [inputs, outputs]
        turned = weight if isinstance(found[0], nn.Linear) else weight.t()
        biased = any(m.bias is not None for m in found)
        return Matrix(turned, _end_to_end([m.bias for m in found]) if biased else None)

    def layer(root: nn.Module) -> Layer:
        return Layer(
            norm(root, names.norm_1),
            matrix(root, *names.qkv),
            [norm(root, name) for name in names.head_norms],
            matrix(root, names.attention_out),
            norm(root, names.norm_2),
            matrix(root, *names.mlp_in),
            matrix(root, names.mlp_out),
        )

    with torch.inference_mode(False), torch.no_grad():
        rotary = names.rotary and attrgetter(names.rotary)(module)
        weights = Weights(
            of,
            named(module, names.tokens).weight,
            named(module, names.positions).weight if names.positions else None,
            Rotary(rotary.inv_freq, float(rotary.attention_scaling)) if rotary else None,
            [layer(root) for root in attrgetter(names.layers)(module)],
            norm(module, names.norm),
            named(module, "lm_head").weight,
        )
    unused = [name for name, weight in module.named_parameters() if id(weight) not in used]
    return f"{unused[0]} has no place in the description of its model" if unused else weights


def _end_to_end(parts: Sequence[Tensor]) -> Tensor:
    """Return one tensor of all parts, after which the parts are views of it."""
    first, counts = parts[0], [len(part) for part in parts]
    if len(parts) == 1:
        return first
    ends = [part.data_ptr() + part.nbytes for part in parts]
    starts = [part.data_ptr() for part in parts[1:]]
    owners = {part.untyped_storage().data_ptr() for part in parts}
    if starts != ends[:-1] or len(owners) > 1:
        for part, view in zip(parts, torch.split(torch.cat(list(parts)), counts), strict=True):
            part.data = view
    return first.data.as_strided((sum(counts), *first.shape[1:]), first.stride())
