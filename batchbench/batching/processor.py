"""The processor: its model, its maker, and the instruction sets that code may use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
