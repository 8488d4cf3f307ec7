"""Processor cores that this process may use, which are fewer than the machine has threads.

A thread of a matrix product on a core's second hyperthread has nothing to compute with, and one
beyond a container's quota makes the others wait until the quota is renewed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from pathlib import Path

import psutil

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
