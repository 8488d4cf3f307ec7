"""How much more memory a piece of work takes, at its height, than was taken before."""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType

import psutil

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
