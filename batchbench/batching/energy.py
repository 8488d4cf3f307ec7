"""Energy, where the machine counts it: RAPL for processors, NVML for NVIDIA's GPUs.

Counted is what computes: on a CPU its packages, on a GPU the GPU and, where they can be read, the
packages of the host that drives it. Where a counter of these is missing, may not be read, or stops
in between, there is no figure: none is ever estimated.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
"""Where Linux shows RAPL's counters (kernel documentation, power/powercap)."""

_MOST_WATTS = 1000.0
"""No package draws more for long: tells how often its counter must be read not to miss a wrap."""


class Counter(Protocol):
    """A counter of energy that only goes up, or wraps."""

    @property
    def name(self) -> str:
        """What it counts, for the result."""

    @property
    def range_j(self) -> float | None:
        """Joules after which it begins again at 0; None if it never does."""

    def read_j(self) -> float:
        """Joules so far.

        Raises:
            OSError: it cannot be read, or no longer.
        """


@dataclass(frozen=True)
class RaplPackage:
    """One processor package in the powercap tree."""

    name: str
    folder: Path
    range_j: float

    def read_j(self) -> float:
        return _micro(self.folder / "energy_uj")


@dataclass(frozen=True)
class NvmlGpu:
    """One NVIDIA GPU; counts since the driver was loaded (Volta and later)."""

    name: str
    nvml: Any
    handle: Any
    range_j: float | None = None

    def read_j(self) -> float:
        try:
            return float(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1e3
        except self.nvml.NVMLError as error:
            raise OSError(str(error)) from error


def _micro(file: Path) -> float:
    """A file's number of microjoules, in joules.

    Raises:
        OSError: it cannot be read, or holds something else.
    """
    try:
        return int(file.read_text("utf-8", "replace")) / 1e6
    except ValueError as error:
        raise OSError(f"{file}: is no number") from error


def rapl_packages(tree: Path = POWERCAP) -> list[RaplPackage]:
    """All processor packages; none where one of them cannot be read.

    Only packages: their cores and memory controllers are counted in them, ``psys`` counts them
    again with all else, and ``intel-rapl-mmio`` shows the same packages by another way.
    """
    found = []
    try:
        for folder in sorted(tree.iterdir()):
            if not re.fullmatch(r"intel-rapl:\d+", folder.name):
                continue
            name = (folder / "name").read_text("utf-8", "replace").strip()
            if not name.startswith("package"):
                continue
            package = RaplPackage(f"rapl {name}", folder, _micro(folder / "max_energy_range_uj"))
            package.read_j()
            found.append(package)
    except OSError:  # no such tree, or root alone may read it
        return []
    return found


def nvml_gpu(uuid: str) -> NvmlGpu | None:
    """The GPU of that id, as torch tells it; None where NVML or its counter is not to be had."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        name = f"GPU-{uuid.removeprefix('GPU-')}"
        gpu = NvmlGpu(f"nvml {name}", pynvml, pynvml.nvmlDeviceGetHandleByUUID(name))
        gpu.read_j()
    except (pynvml.NVMLError, OSError):
        return None
    return gpu


def counters_for(
    device: str, gpu_uuid: str | None = None, tree: Path = POWERCAP
) -> Sequence[Counter]:
    """What counts the energy of a device, such as ``cpu`` or ``cuda:0``."""
    packages = rapl_packages(tree)
    if device == "cpu":
        return packages
    gpu = nvml_gpu(gpu_uuid) if gpu_uuid else None
    return [gpu, *packages] if gpu else []


class EnergyMeter:
    """Joules between entering and leaving; read in between as often as a counter may wrap."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._counters = counters
        self._joules: float | None = None
        ranges = [counter.range_j for counter in counters if counter.range_j is not None]
        self._every_s = min(ranges) / _MOST_WATTS / 2 if ranges else None
        self._lock = threading.Lock()

    def __enter__(self) -> EnergyMeter:
        self._done = threading.Event()
        self._joules = 0.0 if self._counters else None
        self._last: list[float] = []
        self.look()
        self._watcher = threading.Thread(target=self._keep_looking, daemon=True)
        if self._every_s is not None and self._joules is not None:
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.look()
        if self._watcher.is_alive():
            self._watcher.join()

    def look(self) -> None:
        """Read all counters, and add what they moved since they were last read."""
        with self._lock:
            if self._joules is None:
                return
            try:
                now = [counter.read_j() for counter in self._counters]
            except OSError:  # gone while we measured: what there is would be too little
                self._joules = None
                return
            for counter, before, after in zip(self._counters, self._last, now, strict=False):
                moved = after - before
                if moved < 0 and counter.range_j is not None:
                    moved += counter.range_j
                if moved < 0:  # it began anew, as with a driver that was loaded again
                    self._joules = None
                    return
                self._joules += moved
            self._last = now

    def _keep_looking(self) -> None:
        while not self._done.wait(self._every_s):
            self.look()

    def about(self) -> Mapping[str, Any]:
        """For a recording's header: joules and what counted them, or null."""
        joules = self._joules or None  # one that has not moved cannot tell so short a time
        names = [counter.name for counter in self._counters] if joules else None
        return {"energy_joules": joules, "energy_counters": names}
