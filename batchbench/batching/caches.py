"""The processor's last-level cache: how large it is, so that a measurement can be larger."""

from __future__ import annotations

import re
from pathlib import Path

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
