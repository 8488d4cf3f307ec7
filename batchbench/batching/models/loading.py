"""Load a model onto a device: pretrained from safetensors, or with dummy weights."""

from __future__ import annotations

import copy
import gc
import hashlib
import logging
import math
import os
import zlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)
from transformers.initialization import no_init_weights

from batchbench.batching.machine import free_host_bytes, usable_cores
from batchbench.batching.models.gguf_file import GgufFile, alone
from batchbench.batching.models.source import ModelSpec, Source, fault_of
from batchbench.errors import UsageError

_EMBEDDING, _POSITION, _GAIN = 0.1, 0.2, 2.0
"""Standard deviation of token and position embeddings, and the factor by which a matrix scales its
input. With tied embeddings a small gain repeats the input token forever; a large one is chaotic:
at 4, rounding to bfloat16 changes two thirds of all next tokens, at 2 one in ten (docs/log.md)."""


@torch.no_grad()
def fill_with_dummy_weights(model: nn.Module, seed: int) -> None:
    """Fill all parameters: norms with 1 and 0, biases with 0, the rest at random."""
    filled = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if id(parameter) in filled:  # tied to an earlier one
                continue
            filled.add(id(parameter))
            if "norm" in type(module).__name__.lower():
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif parameter.ndim < 2:
                parameter.zero_()
            else:
                values = uniform(name, seed, parameter.numel(), _spread(module, path, parameter))
                parameter.copy_(torch.from_numpy(values).view(parameter.shape))


def _spread(module: nn.Module, path: str, parameter: nn.Parameter) -> float:
    if isinstance(module, nn.Embedding):
        return _POSITION if path.endswith("wpe") else _EMBEDDING
    inputs_first = type(module).__name__ == "Conv1D"  # transformers': [inputs, outputs]
    return _GAIN / math.sqrt(parameter.shape[0 if inputs_first else -1])


def uniform(name: str, seed: int, count: int, spread: float) -> NDArray[np.float32]:
    """Return ``count`` uniform float32 values of mean 0 and standard deviation ``spread``.

    They are drawn as 16-bit integers from Philox, whose stream is fixed by its definition (Salmon
    et al., SC 2011), and scaled by one product each: the same bits everywhere. The name of a
    parameter is part of the key, so the order of parameters does not matter.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    raw = np.random.Philox(key=key).random_raw((count + 3) // 4)
    values = raw.astype("<u8").view("<i2")[:count].astype(np.float32)
    values += np.float32(0.5)
    values *= np.float32(spread * math.sqrt(3.0) / 32768.0)
    return values


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal LM on its device."""

    source: Source
    module: PreTrainedModel
    device: torch.device
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """The number format: float32, bfloat16 or float16."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def weight_bytes(self) -> int:
        """The bytes of all parameters, tied ones once."""
        return sum(p.nbytes for p in self.module.parameters())

    @cached_property
    def weights_digest(self) -> str:
        """The SHA-256 of name, shape, number format and CRC-32 of every parameter.

        A CRC misses no change within 32 bits, so no weight can change unnoticed. SHA-256 of the
        weights themselves takes 1 s for gpt2, this 0.4 s.
        """
        content = hashlib.sha256()
        for name, tensor in sorted(self.module.named_parameters()):
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            line = f"{name} {tuple(tensor.shape)} {tensor.dtype} {zlib.crc32(raw):08x}\n"
            content.update(line.encode())
        return content.hexdigest()


def resolve_device(name: str) -> torch.device:
    """Return the device that ``--device`` names; raise UsageError if it is missing."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    there = ["cpu"] + ["mps"] * mps
    there += [f"cuda:{i}" for i in range(torch.cuda.device_count())] if cuda else []
    wanted = f"cuda:{torch.cuda.current_device()}" if name == "cuda" and cuda else name
    if wanted not in there:
        raise UsageError(f"--device {name}: not on this machine; it has {', '.join(there)}")
    return torch.device(wanted)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the number format that ``--dtype`` names; raise UsageError if the device lacks it."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if _computes_in(torch.bfloat16, device) else torch.float16
    dtype = _DTYPES[name]
    if not _computes_in(dtype, device):
        able = [name for name, other in _DTYPES.items() if _computes_in(other, device)]
        raise UsageError(f"--dtype {name}: {device} lacks it; it has {', '.join(able)}")
    return dtype


def _computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    on_cuda = device.type == "cuda" and dtype is torch.bfloat16
    if on_cuda and torch.cuda.get_device_capability(device)[0] < 8:  # emulated, much slower
        return False
    try:
        x = torch.ones(2, 8, dtype=dtype, device=device)
        h = functional.layer_norm(functional.gelu(x @ x.T, approximate="tanh"), [2])[None]
        functional.scaled_dot_product_attention(h, h, h).float().cpu()
    except (RuntimeError, TypeError):
        return False
    return True


def set_threads(spec: ModelSpec) -> int:
    """Set and return torch's CPU threads: the number given, else OMP_NUM_THREADS, else one for
    each core that this process may use."""
    variable = os.environ.get("OMP_NUM_THREADS", "")
    default = int(variable) if variable.isdecimal() and int(variable) else usable_cores()
    torch.set_num_threads(spec.threads or default)
    return torch.get_num_threads()


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free on a device, with those that torch keeps for itself."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return free_host_bytes()


def current(device: torch.device) -> AbstractContextManager[None]:
    """Make a CUDA device the current one, whose streams and kernels torch and Triton take."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def give_back_memory() -> None:
    """Free the memory of deleted models and caches that torch still holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_model(source: Source, spec: ModelSpec, seed: int) -> LoadedModel:
    """Load the weights, or draw dummy ones.

    Raises UsageError for a missing device or dtype, a checkpoint that does not fit its
    configuration, or too little memory.
    """
    # No progress bars and warnings of libraries between our own lines.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    device = resolve_device(spec.device)
    if device.type == "cuda":
        # Torch would take cuDNN's attention first, which builds a plan for each new shape, up to
        # 0.4 s. A batch has a new shape at almost every step outside its graphs.
        torch.backends.cuda.enable_cudnn_sdp(False)
    dtype = resolve_dtype(spec.dtype, device)
    _check_room(source, spec, dtype, device)
    is_dummy = source.load_format == "dummy"
    module = _dummy(source, dtype, seed) if is_dummy else _pretrained(source, spec, dtype)
    try:
        module = module.to(device).eval().requires_grad_(False)
    except torch.OutOfMemoryError as error:
        raise UsageError(f"--model {spec.model}: its weights do not fit on {device}") from error
    return LoadedModel(source, module, device, dtype)


def count_parameters(source: Source) -> int:
    """Return the number of parameters, tied ones once; allocates nothing."""
    return sum(p.numel() for p in _without_weights(source).parameters())


def _without_weights(source: Source) -> PreTrainedModel:
    config = model_config(source)
    try:
        with torch.device("meta"):
            shapes: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False
            )
    except Exception as error:  # anything, for a configuration of another kind of model
        why = f"is not a causal language model: {error}"
        raise UsageError(f"--model {source.name}: {why}") from error
    shapes.tie_weights()
    return shapes


def _check_room(source: Source, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
    parameters = count_parameters(source)
    # Dummy weights are drawn in float32 on the host.
    on_host = parameters * (4 if source.load_format == "dummy" else dtype.itemsize)
    if source.gguf is not None:  # each tensor is dequantised to float32, and copied
        on_host += 8 * source.gguf.largest
    for where, needed in ((torch.device("cpu"), on_host), (device, parameters * dtype.itemsize)):
        if needed > (room := free_bytes(where)):
            sizes = f"need {needed / 2**30:.1f} GiB and {where} has {room / 2**30:.1f} GiB free"
            raise UsageError(f"--model {spec.model}: its weights {sizes}; choose a smaller model")


def model_config(source: Source) -> Any:
    try:
        if source.gguf is not None:
            return copy.deepcopy(_gguf_config(source.gguf))
        if source.folder is not None:
            return AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        return AutoConfig.for_model(**source.config)
    except Exception as error:  # anything, for a damaged configuration
        why = str(error)
        if "auto_map" in source.config:
            why = "it needs its own code (auto_map), which is never run; choose another model"
        what = "config.json" if source.gguf is None else "header"
        raise UsageError(f"--model {source.name}: its {what} is not usable: {why}") from error


@lru_cache(maxsize=2)
def _gguf_config(file: GgufFile) -> Any:
    """Return the configuration in a GGUF file, which transformers takes a second to read."""
    with alone(file.path) as folder:
        config = AutoConfig.from_pretrained(
            folder, gguf_file=file.path.name, trust_remote_code=False
        )
    # For GPT-2 transformers 5.24 reads no context and takes 1024.
    config.max_position_embeddings = file.config()["max_position_embeddings"]
    if fault := fault_of(config.to_dict()):
        raise UsageError(fault)
    return config


def _dummy(source: Source, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    config = model_config(source)
    try:
        with no_init_weights():
            module: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
            )
    except ValueError as error:  # its attention implementation cannot be chosen
        raise UsageError(f"--model {source.name}: cannot be served: {error}") from error
    module.tie_weights()
    fill_with_dummy_weights(module, seed)
    return module.to(dtype)


def _pretrained(source: Source, spec: ModelSpec, dtype: torch.dtype) -> PreTrainedModel:
    module: PreTrainedModel
    folder: AbstractContextManager[Path | None] = nullcontext(source.folder)
    options: dict[str, Any] = {}
    if source.gguf is not None:
        modeling_gguf_pytorch_utils.tqdm = lambda items, **_: items  # its bar has no switch
        folder = alone(source.gguf.path)
        options = {"gguf_file": source.gguf.path.name, "config": model_config(source)}
        if hasattr(transformers, "GgufConfig"):  # weights of some architectures could stay packed
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with folder as place:
            module, report = AutoModelForCausalLM.from_pretrained(
                place,
                **options,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
            )
    except Exception as error:  # transformers raises many kinds for broken files
        raise UsageError(f"--model {spec.model}: cannot be loaded: {error}") from error
    missing, mismatched = (
        list(report.get(f"{kind}_keys", ())) for kind in ("missing", "mismatched")
    )
    if source.gguf is not None:  # transformers 5.17 takes any shape in the file
        shapes = {name: p.shape for name, p in _without_weights(source).named_parameters()}
        mismatched += [name for name, p in module.named_parameters() if p.shape != shapes[name]]
    for keys, what in ((missing, "lacks"), (mismatched, "has the wrong shape of")):
        if keys:
            first = min(key if isinstance(key, str) else str(key[0]) for key in keys)
            why = f"the checkpoint {what} {first}, which its configuration implies"
            raise UsageError(f"--model {spec.model}: {why}")
    return module
