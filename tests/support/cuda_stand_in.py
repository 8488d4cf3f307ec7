"""A stand-in for CUDA, so that the GPU path is tested where there is no GPU.

A :class:`CudaTensor` wraps a CPU tensor and says that it is on ``cuda:N``. Every operation on it
reaches :meth:`StandIn.dispatch`, which computes it on the CPU and counts what a GPU would do:

* ``launches``: kernels and copies, by name; views and allocations launch nothing
* ``waits``: each time that the host waits for the device, with file and line
* ``streams``, ``graphs``: those that the program made
* ``attention_shapes``: shapes for which cuDNN would build a plan, if torch chose cuDNN
* ``allocated(index)`` and ``peak(index)``: bytes of live tensors on a device

It is as strict as CUDA: tensors on two devices do not mix, a capture that contains a wait or a copy
from pageable memory fails, a graph contains only the work of its stream, and the elapsed time of
two events is a float32 of milliseconds. It has no kernels, so it says nothing about speed, and
nothing about which kernel torch takes, except for attention.

With ``lazy=True`` launched work is queued and runs only when the host waits for it, on a virtual
clock: a kernel takes ``kernel_ns`` of the device, a launch ``launch_ns`` of the host. The host's
time is :meth:`StandIn.now_ns`.

Devices must be named with their index (``cuda:0``); ``torch.zeros(1, device="cuda")`` is not
understood everywhere. Custom operators of ``torch.library`` work if they have a CPU implementation:
they are called with the CPU tensors and recorded in graphs as any other operator.

In a test, use the fixture ``cuda_stand_in``, or ``with StandIn() as gpu``. In a process of its own,
with ``tests`` on the path::

    PYTHONPATH=tests python -m support.cuda_stand_in -m batchbench run --model … --device cuda
    PYTHONPATH=tests python -m support.cuda_stand_in benchmarks/some_script.py arguments

Processes started by that one find the stand-in as well, since their environment names a folder with
a ``sitecustomize`` module; it is :func:`environment_of_children`. The variable
``BATCHBENCH_CUDA_STAND_IN`` sets the number of devices and their memory in MiB: ``2,512``. With
``2,512,triton`` and ``TRITON_INTERPRET=1`` Triton's kernels run too, in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import threading
import time
import types
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

import batchbench
from support.cuda_functions import device_guard, kernels, replacements
from support.cuda_objects import CUDAGraph, CudaTensor, Memory, Stream, Work, activate

aten = torch.ops.aten
_PACKAGE = str(Path(batchbench.__file__).parent) + os.sep
_OWN = str(Path(__file__).with_name("cuda_"))
_SITE = Path(__file__).with_name("stand_in_site")
VARIABLE = "BATCHBENCH_CUDA_STAND_IN"
"""The environment variable that installs the stand-in in child processes."""


class Wait(NamedTuple):
    """A wait of the host for the device: its reason, and the line that waited."""

    what: str
    where: str


@dataclass(frozen=True)
class _Kind:
    """The facts about an operator that decide how it is run."""

    composite: bool
    view: bool
    allocates: bool
    writes: tuple[int | str, ...]  # arguments, by place or by name


_NO_LAUNCH = (aten.empty_like, aten.new_empty, aten.new_empty_strided, aten._unsafe_view)
"""Operators that launch nothing, though they are no views by their schema."""


@cache
def _kind(func: Any) -> _Kind:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    schema = func._schema
    aliased = [r.alias_info for r in schema.returns]
    writes: list[int | str] = []
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            writes.append(argument.name if argument.kwarg_only else place)
    return _Kind(
        composite=has(func.name(), "CompositeImplicitAutograd"),
        view=bool(aliased) and not writes and all(a is not None for a in aliased),
        allocates=func.overloadpacket in _NO_LAUNCH,
        writes=tuple(writes),
    )


_WAITS = {
    aten._local_scalar_dense: "reads a number",
    aten.nonzero: "nonzero",
    aten.masked_select: "masked_select",
    aten._unique2: "unique",
    aten.unique_dim: "unique",
    aten.unique_consecutive: "unique",
    aten.equal: "equal",
    aten.repeat_interleave: "repeat_interleave",
    aten.is_nonzero: "is_nonzero",
}
"""Operators whose result the host must know before it goes on."""


def _addmm_activation(
    bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, use_gelu: bool = False
) -> torch.Tensor:
    """Compute a product and its activation as cublasLt does: GELU in its tanh form."""
    product = torch.addmm(bias, x, weight)
    return torch.nn.functional.gelu(product, approximate="tanh") if use_gelu else product.relu()


_AS_ON_CUDA = {aten._addmm_activation: _addmm_activation}
"""Operators that compute something else on a CPU than on CUDA."""

_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


def _mapped(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Apply a function to every tensor of nested arguments or results."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(_mapped(function, part) for part in value)
    return value


def _hosts(values: Any) -> Any:
    return _mapped(lambda t: t.host if isinstance(t, CudaTensor) else t, values)


def _tensors(values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _mapped(found.append, values)
    return found


def _place() -> str:
    """Return file and line of the innermost frame of batchbench, else of the caller of torch."""
    frame: types.FrameType | None = sys._getframe(1)
    outside = "?"
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE):
            return f"{name.removeprefix(_PACKAGE)}:{frame.f_lineno}"
        if outside == "?" and not name.startswith(_OWN) and f"{os.sep}torch{os.sep}" not in name:
            outside = f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return outside


@dataclass
class StandIn:
    """The stand-in for CUDA: devices, their queue of work, and what was counted."""

    devices: int = 2
    memory_bytes: int = 2**29  # little, since half of it may be read to measure bandwidth
    lazy: bool = False
    kernel_ns: int = 10_000
    launch_ns: int = 1_000
    triton: bool = False
    """True if Triton's kernels run, in Triton's interpreter; each is one launch."""
    drift: float = 0.0
    """The share by which the device's clock runs ahead of the host's."""

    waits: Counter[Wait] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    streams: list[Stream] = field(default_factory=list)
    graphs: list[CUDAGraph] = field(default_factory=list)
    capturing: list[CUDAGraph] = field(default_factory=list)
    attention_shapes: set[tuple[Any, ...]] = field(default_factory=set)
    queue: deque[Work] = field(default_factory=deque)
    current: int = 0

    def __post_init__(self) -> None:
        self.bytes, self._peaks = [0] * self.devices, [0] * self.devices
        self._host_ns = self._device_ns = 0
        self._pinned: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._main: list[Stream] = []
        self._now: dict[int, Stream] = {}
        self._undo: list[Callable[[], object]] = []

    # Time

    def now_ns(self) -> int:
        """Return the host's time: virtual if the device is lazy."""
        return self._host_ns if self.lazy else time.perf_counter_ns()

    def device_ns(self) -> int:
        return self._device_ns if self.lazy else time.perf_counter_ns()

    def sleep(self, seconds: float) -> None:
        """Let virtual time pass; the device works on."""
        self._host_ns += round(seconds * 1e9)

    # Memory

    def need(self, index: int, size: int) -> None:
        """Raise as CUDA does if so many bytes are not free."""
        if self.bytes[index] + size > self.memory_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def take(self, index: int, size: int) -> None:
        self.need(index, size)
        self.bytes[index] += size
        self._peaks[index] = max(self._peaks[index], self.bytes[index])

    def allocated(self, device: Any = None) -> int:
        return self.bytes[self.index_of(device)]

    def peak(self, device: Any = None) -> int:
        return self._peaks[self.index_of(device)]

    def reset_peak(self, device: Any = None) -> None:
        index = self.index_of(device)
        self._peaks[index] = self.bytes[index]

    def room(self, device: Any = None) -> tuple[int, int]:
        return self.memory_bytes - self.allocated(device), self.memory_bytes

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        pinned = tensor.clone()
        self._pinned.add(pinned)
        return pinned

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        start = tensor.untyped_storage().data_ptr()
        return any(start == other.untyped_storage().data_ptr() for other in self._pinned)

    # Devices and streams

    def index_of(self, device: Any) -> int:
        if device is None:
            return self.current
        if isinstance(device, int):
            return device
        index = torch.device(device).index
        return self.current if index is None else index

    def set_device(self, device: Any) -> int:
        """Make a device the current one; return the previous one."""
        before, self.current = self.current, self.index_of(device)
        return before

    def stream_of(self, device: Any = None) -> Stream:
        return self._now[self.index_of(device)]

    def set_stream(self, stream: Stream) -> None:
        self.current = stream.device.index
        self._now[self.current] = stream

    @contextlib.contextmanager
    def on_stream(self, stream: Stream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        current, before = self.current, self.stream_of(stream.device)
        self.set_stream(stream)
        try:
            yield
        finally:
            self.set_stream(before)
            self.current = current

    # The queue

    def enqueue(self, work: Work, index: int) -> None:
        """Record work in a graph, queue it, or do it at once."""
        graph = self.stream_of(index).capture
        if graph is not None:
            if graph.fault is not None:
                raise RuntimeError("CUDA error: operation failed due to a previous error")
            graph.works.append(work)
            return
        if not self.lazy:
            with torch.inference_mode():
                work.run()
            return
        with self._lock:
            self._host_ns += self.launch_ns
            work.issued_ns = self._host_ns
            self.queue.append(work)

    def wait(self, what: str, until: Work | None = None) -> None:
        """Count a wait of the host, and do the queued work that it waits for."""
        if self.capturing:
            self.forbid(what)
        self.waits[Wait(what, _place())] += 1
        with self._lock, torch.inference_mode():
            if until is not None and until not in self.queue:
                return
            while self.queue:
                work = self.queue.popleft()
                self._device_ns = max(self._device_ns, work.issued_ns)
                self._device_ns += work.kernels * self.kernel_ns
                work.run()
                if work is until:
                    break
            self._host_ns = max(self._host_ns, self._device_ns)

    def forbid(self, what: str) -> None:
        for graph in self.capturing:
            graph.fault = what
        raise RuntimeError(
            f"CUDA error: operation not permitted when stream is capturing ({what} at {_place()})"
        )

    def launch(
        self, name: str, func: Callable[..., Any], args: Any, kwargs: Any, index: int, writes: Any
    ) -> Any:
        """Launch a function of CPU tensors; ``writes`` are those that it writes, if any."""
        captured = self.stream_of(index).capture is not None
        if not captured:
            self.launches[name] += 1
        if not captured and not self.lazy:
            return func(*args, **kwargs)
        if writes:
            self.enqueue(Work(name, lambda: func(*args, **kwargs)), index)
            return writes[0] if len(writes) == 1 else writes
        out = func(*args, **kwargs)  # of stale values: it gives the shapes

        def compute() -> None:
            for mine, theirs in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
                mine.copy_(theirs)

        self.enqueue(Work(name, compute), index)
        return out

    # Operators

    def wrap(
        self,
        host: torch.Tensor,
        index: int,
        like: Sequence[CudaTensor] = (),
        *,
        view: bool = False,
    ) -> CudaTensor:
        """Return the tensor on a device; one of ``like`` if it is that, or with its memory.

        It is a ``view`` of the first of ``like`` if that is said; an empty one has no address.
        """
        start = host.untyped_storage().data_ptr()
        for tensor in like:
            if tensor.host is host:
                return tensor
            if view or (start and tensor.host.untyped_storage().data_ptr() == start):
                with torch.inference_mode(tensor.is_inference()):  # a view is as its base
                    return CudaTensor(host, index, tensor.memory)
        return CudaTensor(host, index, Memory(self, index, host.nbytes))

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operator of which at least one argument is a :class:`CudaTensor`."""
        packet, kind = func.overloadpacket, _kind(func)
        if packet is aten.copy_:
            return self._copy(*args, **kwargs)
        if packet is aten._to_copy:
            return self._converted(*args, **kwargs)
        if packet is aten._fused_sdp_choice:
            return self._attention_kernel(*args, **kwargs)
        if packet is aten.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if packet is aten.record_stream:
            return None
        if kind.composite:
            return func.decompose(*args, **kwargs)
        tensors = _tensors((args, tuple(kwargs.values())))
        ours = [t for t in tensors if isinstance(t, CudaTensor)]
        index = ours[0].device.index
        self._check_devices(packet, tensors, index)
        on_host = False
        if kwargs.get("device") is not None:
            on_host = kwargs["device"].type == "cpu"
            kwargs["device"] = torch.device("cpu")
        if packet in _WAITS:
            self.wait(_WAITS[packet])
        hosts, named = _hosts(args), {name: _hosts(value) for name, value in kwargs.items()}
        if kind.view or kind.allocates or on_host:
            out = func(*hosts, **named)
        else:
            writes = [named[w] if isinstance(w, str) else hosts[w] for w in kind.writes]
            function = _AS_ON_CUDA.get(packet, func)
            out = self.launch(str(func), function, hosts, named, index, writes)
        if on_host:
            return out
        return _mapped(lambda t: self.wrap(t, index, ours, view=kind.view), out)

    def launch_triton(self, kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        """Launch one of batchbench's Triton kernels, in Triton's interpreter."""
        tensors = _tensors(args)
        index, name = tensors[0].device.index, kernel.fn.__name__
        self._check_devices(name, tensors, index)
        hosts = _hosts(args)
        self.launch(f"triton.{name}", kernel[grid], hosts, options, index, _tensors(hosts))

    def _check_devices(self, packet: Any, tensors: Sequence[torch.Tensor], index: int) -> None:
        if packet in _INDEXING:
            masks = (torch.bool, torch.uint8)
            if any(t.dtype in masks for t in tensors[1:] if t.dim()):
                self.wait("indexes by a mask")
            if any(not isinstance(t, CudaTensor) for t in tensors[1:] if t.dim()):
                self.wait("indexes by a tensor on the host")
            return
        for tensor in tensors:
            other = tensor.device
            if tensor.dim() and other != torch.device("cuda", index):
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two "
                    f"devices, cuda:{index} and {other}! ({packet} at {_place()})"
                )

    def _copy(self, to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
        if isinstance(to, CudaTensor) and isinstance(source, CudaTensor):
            host, index = to.host, to.device.index
            self.launch("aten.copy_.default", host.copy_, (source.host,), {}, index, [host])
        elif isinstance(to, CudaTensor):
            self._send(to, source, non_blocking)
        else:
            assert isinstance(source, CudaTensor)
            self._fetch(to, source, non_blocking)
        return to

    def _send(self, to: CudaTensor, source: torch.Tensor, non_blocking: bool) -> None:
        """Copy to the device; from pinned memory, what is there when the device copies."""
        pinned = self.is_pinned(source)
        if self.capturing and not pinned:
            self.forbid("copies from pageable memory")
        if not non_blocking:
            self.wait("copies to the device, blocking")
        kept = source if pinned else source.clone()
        host, name = to.host, "copy to the device"
        self.launch(name, host.copy_, (kept,), {}, to.device.index, [host])

    def _fetch(self, to: torch.Tensor, source: CudaTensor, non_blocking: bool) -> None:
        if non_blocking and self.is_pinned(to):
            name, index = "copy to the host", source.device.index
            self.launch(name, to.copy_, (source.host,), {}, index, [to])
            return
        self.wait("copies to the host")
        to.copy_(source.host)

    def _converted(self, tensor: CudaTensor, non_blocking: bool = False, **options: Any) -> Any:
        device = options.pop("device", None) or tensor.device
        options.pop("pin_memory", None)
        index = self.index_of(device)
        if device.type == "cpu":
            converted = torch.empty_like(tensor.host, dtype=options.get("dtype"))
            if non_blocking:
                self._pinned.add(converted)
            self._fetch(converted, tensor, non_blocking)
            return converted
        name, args = "aten._to_copy.default", (tensor.host,)
        out = self.launch(name, aten._to_copy.default, args, options, index, [])
        return self.wrap(out, index)

    # Attention

    def _attention_kernel(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **__: Any
    ) -> int:
        """Return the kernel that torch takes on an H100 with cuDNN 9.20, in torch's numbering."""
        backends, kernel = torch.backends.cuda, torch.nn.attention.SDPBackend
        half = query.dtype in (torch.float16, torch.bfloat16)
        if backends.cudnn_sdp_enabled() and half:
            return int(kernel.CUDNN_ATTENTION.value)
        if backends.flash_sdp_enabled() and half and attn_mask is None:
            return int(kernel.FLASH_ATTENTION.value)
        if backends.mem_efficient_sdp_enabled():
            return int(kernel.EFFICIENT_ATTENTION.value)
        return int(kernel.MATH.value)

    def attention(self, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Launch attention; count cuDNN's plans, and the padding of a mask that is not aligned."""
        mask = args[0] if args else kwargs.get("attn_mask")
        tensors = [t for t in (query, key, value, mask) if t is not None]
        index = query.device.index
        self._check_devices("attention", tensors, index)
        kernels = torch.nn.attention.SDPBackend
        chosen = self._attention_kernel(query, key, value, mask)
        shapes = tuple(tuple(t.shape) for t in tensors)
        if chosen == kernels.CUDNN_ATTENTION.value:
            self.attention_shapes.add((shapes, str(query.dtype)))
        if chosen == kernels.EFFICIENT_ATTENTION.value and mask is not None and not _aligned(mask):
            for _ in range(2):  # it is filled and copied
                self.launch("padding of a mask", lambda: None, (), {}, index, [mask.host])
        hosts = _hosts((query, key, value, *args))
        named = {name: _hosts(value) for name, value in kwargs.items()}
        attend = torch.nn.functional.scaled_dot_product_attention
        return self.wrap(self.launch("attention", attend, hosts, named, index, []), index)

    # Installation

    def __enter__(self) -> StandIn:
        activate(self)
        for index in range(self.devices):
            self._now[index] = Stream(index)
        self.streams.clear()
        self._undo.append(device_guard())
        self._undo.append(kernels(self))
        for module, name, value in replacements(self):
            self._replace(module, name, value)
        torch.cuda.graph.default_capture_stream = None
        return self

    def _replace(self, module: Any, name: str, value: Any) -> None:
        missing = object()
        before = vars(module).get(name, missing)
        setattr(module, name, value)
        if before is missing:
            self._undo.append(lambda: delattr(module, name))
        else:
            self._undo.append(lambda: setattr(module, name, before))

    def __exit__(self, *_: Any) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        torch.cuda.graph.default_capture_stream = None
        activate(None)


def impossible() -> str:
    """Return the reason why there can be no stand-in here; empty if it is possible."""
    if torch.cuda.is_available():
        return "there is a GPU"
    return "" if sys.platform == "linux" else "the stand-in for CUDA needs Linux"


def _aligned(mask: torch.Tensor) -> bool:
    """Return True if efficient attention takes the mask as it is."""
    *outer, inner = mask.stride()
    return inner == 1 and all(stride % 8 == 0 for stride in outer)


def main() -> None:
    """Install the stand-in, and run a module (``-m NAME``) or a script with its arguments."""
    install_for_good()
    words = sys.argv[1:]
    if words[:1] == ["-m"]:
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def environment_of_children(settings: str = "2,512") -> dict[str, str]:
    """Return the environment variables with which a child process has the stand-in."""
    tests = str(Path(__file__).parents[1])
    path = [str(_SITE), tests, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, path))),
        VARIABLE: settings,
    }


def install_for_good() -> StandIn:
    """Install the stand-in in this process and in those that it starts."""
    settings = os.environ.get(VARIABLE) or "2,512"
    os.environ |= environment_of_children(settings)
    devices, mebibytes, *more = settings.split(",")
    if more and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("Triton's kernels need TRITON_INTERPRET=1 on the stand-in")
    return StandIn(int(devices), int(mebibytes) * 2**20, triton=bool(more)).__enter__()


if __name__ == "__main__":
    # The module that others import, not the copy that runs as __main__.
    from support import cuda_stand_in

    cuda_stand_in.main()
