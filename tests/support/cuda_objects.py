"""The objects of the stand-in for CUDA: tensors, streams, events and graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from support.cuda_stand_in import StandIn

_active: list[StandIn] = []


def active() -> StandIn:
    """Return the stand-in that is installed."""
    assert _active, "a tensor or an event of the stand-in for CUDA outlived it"
    return _active[0]


def activate(gpu: StandIn | None) -> None:
    """Make this the stand-in that is installed; None: there is none."""
    assert gpu is None or not _active, "the stand-in for CUDA is installed"
    _active[:] = [] if gpu is None else [gpu]


class Memory:
    """The memory of one tensor and its views; it is free when they are gone."""

    def __init__(self, gpu: StandIn, index: int, size: int) -> None:
        self._gpu, self._index, self._size = gpu, index, size
        gpu.take(index, size)

    def __del__(self) -> None:
        self._gpu.bytes[self._index] -= self._size


class CudaTensor(torch.Tensor):
    """A CPU tensor, ``host``, that says it is on a CUDA device."""

    host: torch.Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, host: torch.Tensor, index: int, memory: Memory) -> CudaTensor:
        tensor: CudaTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device("cuda", index),
        )
        tensor.host, tensor.memory = host, memory
        return tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return active().attention(*args, **(kwargs or {}))
        if func is torch._has_compatible_shallow_copy_type:
            return False  # a module's parameters are replaced, not filled
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return active().dispatch(func, args, dict(kwargs or {}))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.host!r} on {self.device}"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, other: CudaTensor) -> None:
        self.host, self.memory = other.host, other.memory

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = self.detach().clone()
            made: Any = copied
            if isinstance(self, torch.nn.Parameter):
                made = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = made
        return memo[id(self)]


@dataclass
class Work:
    """Launched work: a kernel, a copy, a whole graph or an event."""

    name: str
    run: Callable[[], object]
    kernels: int = 1
    issued_ns: int = 0


class Stream:
    """A stand-in for ``torch.cuda.Stream``."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        gpu = active()
        self.device = torch.device("cuda", gpu.index_of(device))
        gpu.streams.append(self)
        self.stream_id = self.cuda_stream = len(gpu.streams)
        self.capture: CUDAGraph | None = None

    def synchronize(self) -> None:
        active().wait("synchronizes a stream")

    def query(self) -> bool:
        return not active().queue

    def wait_stream(self, stream: Stream) -> None:
        """Do nothing: work is done in the order of its launches."""

    def wait_event(self, event: Event) -> None:
        """Do nothing, as :meth:`wait_stream`."""

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def __enter__(self) -> Stream:
        self._context = active().on_stream(self)
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


class Event:
    """A stand-in for ``torch.cuda.Event``; its time is the device's when its turn comes."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._timing = enable_timing
        self._time_ns: int | None = None
        self._recorded = False

    def record(self, stream: Stream | None = None) -> None:
        gpu = active()
        self._recorded, self._time_ns = True, None

        def happens() -> None:
            self._time_ns = gpu.device_ns()

        self._work = Work("event", happens, kernels=0)
        gpu.enqueue(self._work, (stream or gpu.stream_of(gpu.current)).device.index)

    def query(self) -> bool:
        return not self._recorded or self._time_ns is not None

    def wait(self, stream: Stream | None = None) -> None:
        """Do nothing, as :meth:`Stream.wait_stream`."""

    def synchronize(self) -> None:
        if self._recorded:
            active().wait("waits for an event", until=self._work)

    def elapsed_time(self, other: Event) -> float:
        """Return milliseconds as CUDA does, in a float32."""
        if not (self._timing and other._timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self._time_ns is None or other._time_ns is None:
            raise RuntimeError("CUDA error: device not ready")
        elapsed = (other._time_ns - self._time_ns) * (1 + active().drift)
        return float(np.float32(elapsed / 1e6))


class CUDAGraph:
    """A stand-in for ``torch.cuda.CUDAGraph``: the work of a stream, recorded and replayed."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.works: list[Work] = []
        self.replays = 0
        self.fault: str | None = None
        self._stream: Stream | None = None

    @property
    def launches(self) -> Counter[str]:
        """The launches of one replay, by name."""
        return Counter(work.name for work in self.works)

    def capture_begin(self, pool: Any = None, **_: Any) -> None:
        gpu = active()
        self._stream = gpu.stream_of(gpu.current)
        self._stream.capture = self
        gpu.capturing.append(self)

    def capture_end(self) -> None:
        gpu = active()
        assert self._stream is not None
        self._stream.capture = None
        gpu.capturing.remove(self)
        if self.fault is not None:
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture"
            )
        gpu.graphs.append(self)

    def replay(self) -> None:
        gpu = active()
        assert self._stream is not None, "a graph is replayed before it is captured"
        if gpu.capturing:
            gpu.forbid("replay")
        self.replays += 1

        def replay() -> None:
            for work in self.works:
                work.run()

        gpu.launches.update(self.launches)
        gpu.enqueue(Work("graph", replay, len(self.works)), self._stream.device.index)

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    def reset(self) -> None:
        self.works = []
