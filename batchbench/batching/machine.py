"""The machine and the software that a result was made on, and how busy others kept it."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

import batchbench
from batchbench.batching.cores import allowed_cpus
from batchbench.batching.processor import cpu_facts


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
