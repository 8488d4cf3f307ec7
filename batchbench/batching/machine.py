"""The machine: its cores, memory, processor and software; the differences between two machines;
and meters of load and energy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil

from batchbench import version

CPUS = Path("/sys/devices/system/cpu")
"""Topology and caches of the processors (Linux documentation, sysfs-devices-system-cpu)."""

CGROUP, PROCESS, CPUINFO = Path("/sys/fs/cgroup"), Path("/proc/self"), Path("/proc/cpuinfo")

POWERCAP = Path("/sys/class/powercap")
"""Energy counters (Linux documentation, power/powercap)."""


def _read(file: Path) -> str:
    """Return the text of a file; empty if it cannot be read."""
    try:
        return file.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


# Cores and memory


def usable_cores(cpus: Path = CPUS, cgroup: Path = CGROUP) -> int:
    """Return the number of physical cores that this process and its container may use."""
    cores = set()
    for cpu in allowed_cpus():
        names = ("physical_package_id", "core_id")
        place = tuple(_read(cpus / f"cpu{cpu}/topology/{name}") for name in names)
        cores.add(place if all(place) else (cpu,))  # hyperthreads of a core have one place
    v1 = (_read(cgroup / f"cpu/cpu.cfs_{name}_us") for name in ("quota", "period"))
    limit = re.fullmatch(r"(\d+) (\d+)", _read(cgroup / "cpu.max") or " ".join(v1))
    return max(1, min(len(cores), int(limit[1]) // int(limit[2])) if limit else len(cores))


def allowed_cpus() -> Collection[int]:
    """Return the numbers of the logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return range(psutil.cpu_count(logical=False) or os.cpu_count() or 1)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def last_level_cache_bytes(tree: Path = CPUS) -> int | None:
    """Return the size of all last-level caches together; None if it is not known.

    Virtual machines report the caches of the whole host, which is more than they get.
    """
    sizes: dict[tuple[str, str], int] = {}  # by level and sharing processors: each cache once
    for index in tree.glob("cpu[0-9]*/cache/index[0-9]*"):
        kind, *place, size = (
            _read(index / name) for name in ("type", "level", "shared_cpu_list", "size")
        )
        amount = re.fullmatch(r"(\d+)([KMG]?)", size)  # nothing for a processor that is off
        if kind and kind != "Instruction" and all(place) and amount:
            sizes[place[0], place[1]] = int(amount[1]) * _UNITS[amount[2]]
    last = max((level for level, _ in sizes), default=None)  # one digit
    return sum(size for (level, _), size in sizes.items() if level == last) or None


_MEMORY_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),  # version 2
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Files of a container's limit and use, and the entry for cached files that can be dropped."""


def free_host_bytes(cgroup: Path = CGROUP) -> int:
    """Return the free memory of the host, within the limit of a container."""
    free = int(psutil.virtual_memory().available)
    for limit, used, stat, cached in _MEMORY_FILES:
        numbers = _read(cgroup / limit), _read(cgroup / used)
        if all(map(str.isdecimal, numbers)):  # else there is no limit, or it is "max"
            dropped = re.search(rf"^{cached} (\d+)$", _read(cgroup / stat), re.MULTILINE)
            left = int(numbers[0]) - int(numbers[1]) + (int(dropped[1]) if dropped else 0)
            free = min(free, max(0, left))
    return free


class PeakMemory:
    """Largest growth of the memory in use between entering and leaving.

    On the host it is the resident memory, whose high-water mark Linux keeps; on a GPU the memory
    that torch has allocated, and the pools in which CUDA graphs compute. ``growth_bytes`` is None
    where neither is known.
    """

    def __init__(self, device: str, process: Path = PROCESS) -> None:
        self._device, self._process = device, process
        self._on_gpu = device.startswith("cuda")
        self.growth_bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        self._before: int | None = None
        if self._on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = int(torch.cuda.memory_allocated(self._device))
        elif self._device == "cpu":
            with suppress(OSError):  # not Linux, or not allowed
                (self._process / "clear_refs").write_text("5", "utf-8")  # proc(5): resets the mark
                self._before = self._status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        peak = _peak_on_gpu(self._device) if self._on_gpu else self._status("VmHWM")
        if peak is not None and self._before is not None:
            self.growth_bytes = max(0, peak - self._before)

    def _status(self, name: str) -> int | None:
        status = _read(self._process / "status")
        value = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
        return int(value[1]) * 1024 if value else None


def _peak_on_gpu(device: str) -> int:
    """Return the peak of torch's memory, and the bytes in which CUDA graphs keep intermediate
    results, which torch calls free."""
    import torch

    index, shared = torch.device(device).index or 0, (0, 0)  # the pool of everything else
    segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    pools = [
        segment["total_size"] - segment["allocated_size"]
        for segment in segments
        if segment["device"] == index and tuple(segment["segment_pool_id"]) != shared
    ]
    return int(torch.cuda.max_memory_allocated(device)) + int(sum(pools))


# Processor


@dataclass(frozen=True)
class Processor:
    """The maker of a processor and its instruction sets, by Linux's names for them."""

    maker: str
    features: frozenset[str]

    @classmethod
    def here(cls, cpuinfo: Path | None = None) -> Processor:
        """Return this machine's processor; without features if the system does not name any.

        ``ATEN_CPU_CAPABILITY=avx2`` hides AVX-512 and AMX, as it does from torch.
        """
        description = _cpu_description(cpuinfo)
        features = frozenset(description.get("flags", "").split())
        if os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in ("default", "avx2"):
            features = frozenset(f for f in features if not f.startswith(("avx512", "amx")))
        return cls(description.get("vendor_id", ""), features)

    @property
    def runs_kernels(self) -> bool:
        """True if it has the instructions that batchbench's own kernels always use."""
        return self.features >= {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"}

    @property
    def multiplies_bfloat16(self) -> bool:
        """True if it multiplies bfloat16 faster than float32; Intel's without AMX do not."""
        return "avx512_bf16" in self.features and self.maker == "AuthenticAMD"

    @property
    def has_amx(self) -> bool:
        """True if it has AMX tiles for bfloat16; oneDNN uses them."""
        return "amx_bf16" in self.features


def find_compiler() -> str | None:
    """Return the path of ``g++``; None if it is missing or the system is not Linux."""
    return shutil.which("g++") if sys.platform.startswith("linux") else None


def _cpu_description(cpuinfo: Path | None = None) -> Mapping[str, str]:
    first = _read(cpuinfo or CPUINFO).partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_name() -> str:
    name = _cpu_description().get("model name")
    if not name and sys.platform == "darwin":
        name = command_output("sysctl", "-n", "machdep.cpu.brand_string")
    return name or platform.processor() or platform.machine()


def command_output(*command: str) -> str | None:
    """Return what a command prints; None if it fails or prints nothing."""
    try:
        printed = subprocess.check_output(
            command, stderr=subprocess.DEVNULL, encoding="utf-8", errors="replace", timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return printed.strip() or None


# Environment


def environment() -> dict[str, Any]:
    """Return the facts that are known without torch; the torch engines add their device."""
    packages = ("torch", "transformers", "numpy", "safetensors")
    return {
        "hostname": platform.node(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cpu_cores": len(allowed_cpus()),
        "memory_bytes": psutil.virtual_memory().total,
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """Return the commit of batchbench's checkout, with ``+`` if it is changed; None outside one."""
    root = Path(version.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    describe = ("describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+")  # not its tag
    return command_output("git", "-C", str(root), *describe)


# Comparing two machines

HARDWARE = ("device", "cpu", "cpu_cores", "threads", "gpu", "gpu_memory_bytes")

SOFTWARE = ("gpu_driver", "cuda", "torch", "transformers", "numpy", "python")

EXECUTION = ("dtype", "engine", "execution", "cpu_kernels")

MUST_MATCH_FOR_TIMES = (*HARDWARE, *SOFTWARE, *EXECUTION)
"""Facts on which times depend.

The host's name and kernel are left out, because a CI pool has many hosts of one kind.
"""

MUST_MATCH_FOR_OUTPUTS = (
    *(n for n in MUST_MATCH_FOR_TIMES if n not in ("cpu_cores", "gpu_memory_bytes", "python")),
    "weights_digest",
)
"""Facts on which the last bit of a logit depends, and with it a token that is nearly tied."""


class Difference(NamedTuple):
    """A fact in which two environments differ; None where one of them lacks it."""

    name: str
    base: Any
    new: Any


def facts_of(
    environment: Mapping[str, Any], model: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """Return every comparable fact of a machine, its packages and its resolved model, by name.

    ``more`` holds facts that stand elsewhere, such as ``engine=`` and ``batchbench=``.
    """
    facts = {**environment, **environment.get("packages", {})}
    for name in ("packages", "gpu_clock_mhz"):  # a clock changes from moment to moment
        facts.pop(name, None)
    resolved = ("device", "dtype", "execution", "weights_digest")
    return {**facts, **{name: model.get(name) for name in resolved}, **more}


def differences(
    base: Mapping[str, Any], new: Mapping[str, Any], names: Iterable[str] | None = None
) -> list[Difference]:
    """Return the facts, as of :func:`facts_of`, that differ; of ``names`` or of all."""
    return [
        Difference(name, base.get(name), new.get(name))
        for name in ({**base, **new} if names is None else names)
        if _comparable(name, base.get(name)) != _comparable(name, new.get(name))
    ]


def _comparable(name: str, value: Any) -> Any:
    # A patch of Python changes no time.
    return str(value).split(".")[:2] if name == "python" and value else value


# Load and energy between two moments


class LoadMeter:
    """Measures the cores that other processes keep busy, from its creation on."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._now()

    def _now(self) -> tuple[float, float, float]:
        system, own = psutil.cpu_times(), self._process.cpu_times()
        idle = system.idle + getattr(system, "iowait", 0.0)
        return time.perf_counter(), sum(system[:8]) - idle, own.user + own.system

    def foreign_cores(self) -> float | None:
        """Return the busy cores of other processes, on average; None after less than 0.5 s."""
        (t0, all0, own0), (t1, all1, own1) = self._before, self._now()
        if t1 - t0 < 0.5:
            return None
        return max(0.0, ((all1 - all0) - (own1 - own0)) / (t1 - t0))


@dataclass(frozen=True)
class Counter:
    """A counter of energy that goes up only, or wraps."""

    name: str  # in results
    read_j: Callable[[], float]  # joules so far; raises OSError if they cannot be read any more
    range_j: float | None = None  # joules after which it starts at 0 again; None for never
    least_s: float = 0.0  # shortest time in seconds over which it says something


def rapl_packages(tree: Path = POWERCAP) -> list[Counter]:
    """Return a counter for each processor package (RAPL); none if one of them cannot be read.

    Their cores and memory controllers are parts of them, ``psys`` counts them again with all else,
    and ``intel-rapl-mmio`` shows the same packages in another way.
    """
    packages = []
    try:
        for folder in sorted(tree.iterdir()):
            if not re.fullmatch(r"intel-rapl:\d+", folder.name):
                continue
            name = (folder / "name").read_text("utf-8", "replace").strip()
            if name.startswith("package"):
                read_j = partial(_joules, folder / "energy_uj")
                read_j()
                range_j = _joules(folder / "max_energy_range_uj")
                packages.append(Counter(f"rapl {name}", read_j, range_j))
    except OSError:  # there is no such tree, or only root may read it
        return []
    return packages


def _joules(file: Path) -> float:
    try:
        return int(file.read_text("utf-8", "replace")) / 1e6
    except ValueError as error:
        raise OSError(f"{file}: is not a number") from error


_Answer = TypeVar("_Answer")


def _ask_nvml(uuid: str, question: Callable[[Any, Any], _Answer]) -> _Answer | None:
    """Return NVML's answer about the GPU with torch's id; None if there is none.

    NVML's indices are no help: torch counts only the devices of ``CUDA_VISIBLE_DEVICES``.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
        return question(pynvml, handle)
    except pynvml.NVMLError:
        return None


def nvml_gpu(uuid: str) -> Counter | None:
    """Return the counter of a GPU (Volta and later); None if it has none.

    The sensor of an H100 looks at 25 ms of each 100 ms (arXiv 2312.02741), so the energy
    of a shorter time is not reliable.
    """

    def read_j() -> float:
        read = _ask_nvml(uuid, lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu))
        if read is None:
            raise OSError("the counter of the GPU cannot be read")
        return float(read) / 1e3

    try:
        read_j()
    except OSError:
        return None
    return Counter(f"nvml GPU-{uuid.removeprefix('GPU-')}", read_j, least_s=2.0)


def gpu_driver(uuid: str) -> str | None:
    """Return the version of a GPU's driver; None without nvidia-ml-py."""
    return _ask_nvml(uuid, lambda nvml, gpu: str(nvml.nvmlSystemGetDriverVersion()))


def gpu_clock_mhz(uuid: str) -> dict[str, int] | None:
    """Return the present clocks of a GPU, ``sm`` and ``memory``; None if they cannot be read."""

    def clocks(nvml: Any, gpu: Any) -> dict[str, int]:
        kinds = {"sm": nvml.NVML_CLOCK_SM, "memory": nvml.NVML_CLOCK_MEM}
        return {name: int(nvml.nvmlDeviceGetClockInfo(gpu, kind)) for name, kind in kinds.items()}

    return _ask_nvml(uuid, clocks)


def counters_for(
    device: str, gpu_uuid: str | None = None, tree: Path = POWERCAP
) -> Sequence[Counter]:
    """Return the counters of all that computes for a device, such as ``cpu`` or ``cuda:0``.

    A GPU also needs the processors of the host that drives it, where these can be read.
    """
    packages = rapl_packages(tree)
    if device == "cpu":
        return packages
    gpu = nvml_gpu(gpu_uuid) if gpu_uuid else None
    return [gpu, *packages] if gpu else []


def longest_resolution_s(counters: Sequence[Counter]) -> float:
    """Return the shortest time in seconds over which all counters say something."""
    return max((counter.least_s for counter in counters), default=0.0)


class EnergyMeter:
    """Joules between entering and leaving; None if a counter fails, since none is estimated.

    It is None too if that was shorter than a counter can tell. It reads the counters often enough
    in between not to miss a wrap.
    """

    def __init__(
        self, counters: Sequence[Counter], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._counters, self._clock = counters, clock
        self._joules: float | None = 0.0 if counters else None
        self._last: list[float] = []
        ranges = [counter.range_j for counter in counters if counter.range_j is not None]
        # Twice in the time of a wrap at 1 kW, above the sustained power of a package.
        self._every_s = min(ranges) / 1000.0 / 2 if ranges else None
        self._lock, self._done = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, daemon=True)

    def __enter__(self) -> EnergyMeter:
        self._began = self._clock()
        self._look()
        if self._every_s is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._look()
        if self._clock() - self._began < longest_resolution_s(self._counters):
            self._joules = None
        if self._every_s is not None:
            self._thread.join()

    def _keep_looking(self) -> None:
        while not self._done.wait(self._every_s):
            self._look()

    def _look(self) -> None:
        """Read all counters, and add what they counted since the last reading."""
        with self._lock:
            if self._joules is None:
                return
            try:
                now = [counter.read_j() for counter in self._counters]
            except OSError:  # a sum without this counter would be too small
                self._joules = None
                return
            for counter, before, after in zip(self._counters, self._last, now, strict=False):
                joules = after - before + (counter.range_j or 0.0 if after < before else 0.0)
                if joules < 0:  # it started again, as after a driver is loaded again
                    self._joules = None
                    return
                self._joules += joules
            self._last = now

    def about(self, servings: int = 1) -> Mapping[str, Any]:
        """Return the joules of a serving and their counters for a header, or None for both."""
        if not self._joules:  # a counter that did not move is too coarse for the time
            return {"energy_joules": None, "energy_counters": None}
        names = [counter.name for counter in self._counters]
        return {"energy_joules": self._joules / servings, "energy_counters": names}
