"""The machine and the software that a result was made on, and how busy others kept it."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import psutil

import batchbench

_CPUS, _CGROUP = Path("/sys/devices/system/cpu"), Path("/sys/fs/cgroup")


def usable_cores(cpus: Path = _CPUS, cgroup: Path = _CGROUP) -> int:
    """Physical cores among those this process may run on, within its quota; at least 1.

    ``cpus`` and ``cgroup`` are where the kernel tells of them.
    """
    cores = _physical(allowed_cpus(), cpus)
    quota = _quota(cgroup)
    return max(1, cores if quota is None else min(cores, math.floor(quota)))


def allowed_cpus() -> Collection[int]:
    """Return the numbers of the logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(psutil.cpu_count(logical=False) or os.cpu_count() or 1)


def _physical(allowed: Collection[int], cpus: Path) -> int:
    """Cores that the allowed hyperthreads belong to."""
    cores = set()
    for cpu in allowed:
        told = [_read(cpus / f"cpu{cpu}/topology/{n}") for n in ("physical_package_id", "core_id")]
        cores.add(tuple(told) if None not in told else (cpu,))
    return len(cores)


def _quota(cgroup: Path) -> float | None:
    """Cores' worth of time that a container may take; None where that is not limited."""
    both = (_read(cgroup / "cpu.max") or "").split()  # version 2
    if not both:
        both = [_read(cgroup / "cpu" / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
    try:
        quota, period = map(int, both)
    except ValueError:  # "max", or nothing told
        return None
    return quota / period if quota > 0 and period > 0 else None


def _read(file: Path) -> str | None:
    try:
        return file.read_text("utf-8", "replace").strip()
    except OSError:
        return None


CPUS = Path("/sys/devices/system/cpu")
"""Where Linux shows each processor's caches (kernel documentation, sysfs-devices-system-cpu)."""

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def last_level_cache_bytes(tree: Path = CPUS) -> int | None:
    """Bytes of all last-level caches together, each counted once; None where it is not shown.

    Virtual machines tell the whole host's, which is then more than they get.
    """
    found: dict[tuple[int, str], int] = {}
    for cpu in sorted(tree.glob("cpu[0-9]*")):
        for index in sorted(cpu.glob("cache/index[0-9]*")):
            try:
                kind, level, shared, size = (
                    (index / name).read_text("utf-8", "replace").strip()
                    for name in ("type", "level", "shared_cpu_list", "size")
                )
            except OSError:  # a processor that is switched off
                continue
            told = re.fullmatch(r"(\d+)([KMG]?)", size)
            if kind != "Instruction" and told and level.isdecimal():
                found[int(level), shared] = int(told[1]) * _UNITS[told[2]]
    last = max((level for level, _ in found), default=None)
    return sum(size for (level, _), size in found.items() if level == last) or None


PROCESS = Path("/proc/self")

CGROUP = Path("/sys/fs/cgroup")

_LIMITS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),  # version 2
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Files with the limit and the use, and the entry for cached files that can be dropped."""


def free_host_bytes(cgroup: Path = CGROUP) -> int:
    """Return the free memory of the host, within the limit of a container."""
    free = int(psutil.virtual_memory().available)
    for limit, used, stat, cached in _LIMITS:
        try:
            left = int(_text(cgroup / limit)) - int(_text(cgroup / used))
        except (OSError, ValueError):  # there is no limit, or it is "max"
            continue
        try:
            reclaimable = re.search(rf"^{cached} (\d+)$", _text(cgroup / stat), re.MULTILINE)
        except OSError:
            reclaimable = None
        free = min(free, max(0, left + (int(reclaimable[1]) if reclaimable else 0)))
    return free


def _text(file: Path) -> str:
    return file.read_text(encoding="ascii")


class PeakMemory:
    """Growth of the memory in use between entering and leaving, at its height.

    On the host it is resident memory, as Linux keeps its high-water mark; on a GPU what torch has
    allocated. ``growth_bytes`` is None where neither can be told.
    """

    def __init__(self, device: str, process: Path = PROCESS) -> None:
        self._device, self._process = device, process
        self.growth_bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        self._before = self._begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        peak = self._peak()
        if peak is not None and self._before is not None:
            self.growth_bytes = max(0, peak - self._before)

    def _begin(self) -> int | None:
        """Bytes in use now, from where the high-water mark begins anew."""
        if self._device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
            return int(torch.cuda.memory_allocated(self._device))
        if self._device != "cpu":
            return None
        try:
            (self._process / "clear_refs").write_text("5", "utf-8")  # proc(5): resets the mark
        except OSError:  # not Linux, or not allowed
            return None
        return self._status("VmRSS")

    def _peak(self) -> int | None:
        if self._device.startswith("cuda"):
            import torch

            return int(torch.cuda.max_memory_allocated(self._device))
        return self._status("VmHWM")

    def _status(self, name: str) -> int | None:
        try:
            text = (self._process / "status").read_text("utf-8", "replace")
        except OSError:
            return None
        found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
        return int(found[1]) * 1024 if found else None


CPUINFO = Path("/proc/cpuinfo")
"""The file in which Linux describes the processors."""

_FOR_KERNELS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"})

_LIMITED = ("default", "avx2")
"""Values of ``ATEN_CPU_CAPABILITY``, torch's own variable, that rule AVX-512 out."""


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
        facts = cpu_facts(cpuinfo)
        features = frozenset(facts.get("flags", "").split())
        if os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in _LIMITED:
            features = frozenset(f for f in features if not f.startswith(("avx512", "amx")))
        return cls(facts.get("vendor_id", ""), features)

    @property
    def runs_kernels(self) -> bool:
        """Return True if it has the instructions that batchbench's own kernels always use."""
        return self.features >= _FOR_KERNELS

    @property
    def multiplies_bfloat16(self) -> bool:
        """Return True if its bfloat16 product is faster than that of float32.

        Intel's, without AMX, does no more multiplications a cycle than float32's.
        """
        return "avx512_bf16" in self.features and self.maker == "AuthenticAMD"

    @property
    def has_amx(self) -> bool:
        """Return True if it has AMX tiles for bfloat16; oneDNN uses them."""
        return "amx_bf16" in self.features


def cpu_facts(cpuinfo: Path | None = None) -> Mapping[str, str]:
    """Return the system's description of the first processor; empty if there is none."""
    try:
        text = (cpuinfo or CPUINFO).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def environment() -> dict[str, Any]:
    """What can be told without torch; the torch engines add their device."""
    return {
        "hostname": platform.node(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cpu_cores": len(allowed_cpus()),
        "memory_bytes": psutil.virtual_memory().total,
        "packages": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "numpy", "safetensors")
        },
        "git_commit": git_commit(),
    }


def torch_environment(device_name: str) -> dict[str, Any]:
    """Device, driver, clocks where readable, threads, and whose kernels a CPU computes with."""
    import torch

    from batchbench.batching.engines.torch.kernels import native

    found: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "cpu_kernels": None,
        "gpu": None,
        "gpu_uuid": None,
        "gpu_memory_bytes": None,
        "gpu_driver": None,
        "gpu_clock_mhz": None,
        "cuda": torch.version.cuda,
    }
    if device_name.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device_name)
        found["gpu"] = properties.name
        found["gpu_uuid"] = str(properties.uuid)
        found["gpu_memory_bytes"] = properties.total_memory
        found |= _nvml(torch.device(device_name).index or 0)
    elif device_name == "cpu":
        found["cpu_kernels"] = "torch's" if native() is None else "batchbench's"
    return found


def _nvml(index: int) -> dict[str, Any]:
    """Driver and clocks through nvidia-ml-py, where it is installed."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        return {
            "gpu_driver": str(pynvml.nvmlSystemGetDriverVersion()),
            "gpu_clock_mhz": {
                "sm": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
                "memory": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            },
        }
    except Exception:  # not installed, no permission, no such counter: then it is not told
        return {}


# Comparing two machines

HARDWARE = ("device", "cpu", "cpu_cores", "threads", "gpu", "gpu_memory_bytes")
SOFTWARE = ("gpu_driver", "cuda", "torch", "transformers", "numpy", "python")
EXECUTION = ("dtype", "engine", "execution", "cpu_kernels")

MUST_MATCH_FOR_OUTPUTS = (
    *("device", "cpu", "threads", "gpu", "gpu_driver", "cuda", "torch", "transformers", "numpy"),
    *(*EXECUTION, "weights_digest"),
)
"""Facts on which the last bit of a logit depends, and with it a token that is nearly tied."""

MUST_MATCH_FOR_TIMES = (
    *(name for name in MUST_MATCH_FOR_OUTPUTS if name != "weights_digest"),
    *("cpu_cores", "gpu_memory_bytes", "python"),
)
"""Facts on which times depend: ``HARDWARE``, ``SOFTWARE`` and ``EXECUTION`` together.

The host's name and kernel are left out, because a CI pool has many hosts of one kind.
"""


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
    """Return the facts in which two environments differ.

    Args:
        base: facts of one environment, as :func:`facts_of` returns them.
        new: facts of the other.
        names: facts to compare, such as :data:`MUST_MATCH_FOR_TIMES`; None for all.
    """
    return [
        Difference(name, base.get(name), new.get(name))
        for name in ({**base, **new} if names is None else names)
        if _comparable(name, base.get(name)) != _comparable(name, new.get(name))
    ]


def _comparable(name: str, value: Any) -> Any:
    """Reduce a version of Python to its minor version, since a patch changes no time."""
    return str(value).split(".")[:2] if name == "python" and value else value


def cpu_name() -> str:
    """The processor's model name."""
    if name := cpu_facts().get("model name"):
        return name
    if sys.platform == "darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if asked.stdout.strip():
            return asked.stdout.strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of batchbench's own checkout, with ``+`` if it is changed; None outside one."""
    root = Path(batchbench.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


class LoadMeter:
    """How many cores other processes kept busy between two moments."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._read()

    def _read(self) -> tuple[float, float, float]:
        system, own = psutil.cpu_times(), self._process.cpu_times()
        idle = system.idle + getattr(system, "iowait", 0.0)
        return time.perf_counter(), sum(system[:8]) - idle, own.user + own.system

    def foreign_cores(self) -> float | None:
        """Busy cores that were not ours, on average; None where the time was too short to tell."""
        (t0, all0, own0), (t1, all1, own1) = self._before, self._read()
        if t1 - t0 < 0.5:
            return None
        return max(0.0, ((all1 - all0) - (own1 - own0)) / (t1 - t0))
