"""The functions of torch that the stand-in for CUDA takes the place of."""

from __future__ import annotations

import ctypes
import math
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from batchbench.batching.engines.torch.triton import choice as triton_choice
from support.cuda_objects import CUDAGraph, CudaTensor, Event, Stream

if TYPE_CHECKING:
    from support.cuda_stand_in import StandIn


def device_guard() -> Callable[[], object]:
    """Let torch's C++ code switch to CUDA devices, which it need not know; return how to undo it.

    A build with CUDA but without a device has a function for that. One without CUDA gets the guard
    of another device that has nothing to switch.
    """
    torch._C._ensureCUDADeviceGuardSet()
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 16).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10::DeviceType
    if guards[cuda] is not None:
        return lambda: None
    guards[cuda] = guards[meta]
    return lambda: guards.__setitem__(cuda, None)


def _keep_tied(apply: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """Wrap ``Module._apply``: parameters that were one stay one, though they are replaced."""

    def applied(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        owners = list(module.modules())
        before = [(o, name, p) for o in owners for name, p in o._parameters.items()]
        moved = apply(module, *args, **kwargs)
        new: dict[int, torch.nn.Parameter | None] = {}
        for owner, name, parameter in before:
            owner._parameters[name] = new.setdefault(id(parameter), owner._parameters[name])
        return moved

    return applied


def kernels(gpu: StandIn) -> Callable[[], object]:
    """Register the operators that make a CUDA tensor from nothing; return how to undo it."""
    library = torch.library.Library("aten", "IMPL")

    def placed(host: torch.Tensor, device: Any) -> CudaTensor:
        return gpu.wrap(host, gpu.index_of(device))

    def empty(size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> CudaTensor:
        kind = dtype or torch.get_default_dtype()
        gpu.need(gpu.index_of(device), math.prod(size) * kind.itemsize)
        # Zeros, since a value that is not computed yet may be an index.
        return placed(torch.zeros(size, dtype=dtype, device="cpu"), device)

    def strided(
        size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any
    ) -> CudaTensor:
        host = torch.empty_strided(size, stride, dtype=dtype, device="cpu")
        return placed(host.zero_(), device)

    def arange(*bounds: Any, dtype: Any = None, device: Any = None, **_: Any) -> CudaTensor:
        gpu.launches["aten.arange.default"] += 1
        return placed(torch.arange(*bounds, dtype=dtype, device="cpu"), device)

    library.impl("empty.memory_format", empty, "CUDA")
    library.impl("empty_strided", strided, "CUDA")
    library.impl("copy_", gpu._copy, "CUDA")  # torch.tensor does not ask the tensor's class
    for overload in ("arange", "arange.start", "arange.start_step"):
        library.impl(overload, arange, "CUDA")
    return library._destroy


def _own(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function, since torch's compiler wants another object under each name."""
    return lambda *args, **kwargs: function(*args, **kwargs)


def replacements(gpu: StandIn) -> Iterator[tuple[Any, str, Any]]:
    """Yield what takes the place of torch's functions: module, name and value."""
    cuda = torch.cuda

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def properties(device: Any = None) -> types.SimpleNamespace:
        index = gpu.index_of(device)
        if not 0 <= index < gpu.devices:
            raise AssertionError("Invalid device id")
        return types.SimpleNamespace(
            name="Stand-in for CUDA",
            uuid=f"00000000-0000-0000-0000-{index:012d}",
            total_memory=gpu.memory_bytes,
            L2_cache_size=50 * 2**20,
            major=9,
            minor=0,
            multi_processor_count=132,
            max_threads_per_multi_processor=2048,
            regs_per_multiprocessor=65536,
            shared_memory_per_multiprocessor=233472,
            warp_size=32,
            gcnArchName="",
        )

    functions: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: gpu.devices,
        "current_device": lambda: gpu.current,
        "set_device": gpu.set_device,
        "_exchange_device": gpu.set_device,
        "_maybe_exchange_device": gpu.set_device,
        "current_stream": gpu.stream_of,
        "default_stream": gpu.stream_of,
        "set_stream": gpu.set_stream,
        "stream": gpu.on_stream,
        "synchronize": lambda device=None: gpu.wait("synchronizes the device"),
        "graph_pool_handle": lambda: (0, 1),
        "get_device_properties": properties,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: properties(device).name,
        "mem_get_info": gpu.room,
        "memory_allocated": gpu.allocated,
        "memory_reserved": gpu.allocated,
        "memory_snapshot": list,
        "max_memory_allocated": gpu.peak,
        "max_memory_reserved": gpu.peak,
        "reset_peak_memory_stats": gpu.reset_peak,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: gpu.stream_of().capture is not None,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
    }
    for name in ("_lazy_init", "init", "empty_cache", "ipc_collect", "manual_seed_all"):
        functions[name] = nothing
    for name, value in functions.items():
        yield cuda, name, value if isinstance(value, type) else _own(value)
    yield cuda.graphs, "CUDAGraph", CUDAGraph
    yield torch._C, "_host_emptyCache", _own(nothing)
    yield triton_choice, "supports_triton", lambda device: gpu.triton and device.type == "cuda"
    if gpu.triton:
        from batchbench.batching.engines.torch.triton import ops as triton_ops

        yield triton_ops, "launch", gpu.launch_triton
    yield torch.version, "cuda", "13.0"
    yield torch.backends.cudnn, "version", lambda: 92000
    yield torch.nn.Module, "_apply", _keep_tied(torch.nn.Module._apply)
    yield torch.Tensor, "pin_memory", lambda tensor, *_: gpu.pin(tensor)
    yield torch.Tensor, "is_pinned", lambda tensor, *_: gpu.is_pinned(tensor)
