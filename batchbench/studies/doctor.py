"""Facts of this machine that matter for a run: found without torch, in less than two seconds."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from batchbench.batching.machine import (
    Processor,
    allowed_cpus,
    command_output,
    cpu_name,
    find_compiler,
    free_host_bytes,
    last_level_cache_bytes,
    rapl_packages,
    usable_cores,
)
from batchbench.files import cache_folder
from batchbench.version import __version__

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "gpu": ("pynvml", "triton"),
    "gguf": ("gguf", "accelerate"),
    "vllm": ("vllm",),
    "ray": ("ray",),
    "slurm": ("submitit",),
}
"""Modules of each extra of the distribution."""

_BUSY = 0.25
"""Share of the processors in use by others from which times are doubtful."""

_REACH_S = 1.0


@dataclass(frozen=True)
class Finding:
    """A fact. ``mend`` is what to type if something is missing; it is needed if ``fault``."""

    name: str
    text: str
    mend: str | None = None
    fault: bool = False


def examine() -> list[Finding]:
    """Return the facts of this machine, in the order in which people ask."""
    psutil.cpu_percent()  # the next call returns the load since this one
    hub = _ask_hub()
    found = [*_software(), *_processor(), *_gpus(), *_folders()]
    return [*found, hub(), *_extras(), _load()]


def _version(name: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _software() -> Iterator[Finding]:
    yield Finding("batchbench", f"{__version__}, in {Path(__file__).parents[1]}")
    yield Finding("Python", f"{platform.python_version()}, {sys.executable}")
    for name in ("torch", "transformers"):
        if version := _version(name):
            built = f", built for {_built_for()}" if name == "torch" else ""
            yield Finding(name, version + built)
        else:
            yield Finding(name, "is missing", f"pip install {name}", fault=True)


def _built_for() -> str:
    """Return the platform that torch was built for, from its file ``version.py``."""
    found = importlib.util.find_spec("torch")
    file = Path(found.origin).with_name("version.py") if found and found.origin else Path()
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return "an unknown platform"
    for name in ("cuda", "hip"):
        if version := re.search(rf"^{name}\b[^=]*= '([^']+)'", text, re.MULTILINE):
            return f"{'ROCm' if name == 'hip' else 'CUDA'} {version[1]}"
    return "CPUs (and MPS on a Mac)" if sys.platform == "darwin" else "CPUs"


def _processor() -> Iterator[Finding]:
    cache = last_level_cache_bytes()
    size = "" if cache is None else f", {cache / 2**20:.0f} MiB of last-level cache"
    yield Finding("Processor", f"{cpu_name()}{size}")
    usable, allowed = usable_cores(), len(allowed_cpus())
    text = f"{usable} by default" + (f", of {allowed} processors" if usable != allowed else "")
    if variable := os.environ.get("OMP_NUM_THREADS"):
        text += f"; OMP_NUM_THREADS is {variable}"
    yield Finding("Threads", text)
    processor, compiler = Processor.here(), find_compiler()
    if not processor.runs_kernels:
        yield Finding("CPU kernels", "torch's own: this processor has no AVX-512")
    elif compiler is None:
        mend = "apt-get install g++" if shutil.which("apt-get") else "install g++ (GCC)"
        text = "torch's own, which are slower: g++ is missing"
        yield Finding("CPU kernels", text, mend)
    else:
        widened = "" if processor.multiplies_bfloat16 else ", widened to float32"
        bits = "AMX" if processor.has_amx else f"AVX-512{widened}"
        yield Finding("CPU kernels", f"batchbench's, compiled by {compiler}; bfloat16 uses {bits}")
    total, free = psutil.virtual_memory().total / 2**30, free_host_bytes() / 2**30
    yield Finding("Memory", f"{free:.1f} GiB free of {total:.1f} GiB")
    packages = len(rapl_packages())
    found = f"{packages} RAPL counter(s) of the processor can be read"
    lost = "no counter of the processor can be read; energy is not reported"
    yield Finding("Energy", found if packages else lost)


def _gpus() -> Iterator[Finding]:
    query = "--query-gpu=name,driver_version,memory.total,memory.used"
    listed = command_output("nvidia-smi", query, "--format=csv,noheader") or ""
    for line in listed.splitlines():
        name, driver, total, used = (part.strip() for part in [*line.split(","), "", "", ""][:4])
        yield Finding("GPU", f"{name}, driver {driver}, {used} of {total} in use")
    if listed and "CUDA" not in _built_for():
        text = f"torch is built for {_built_for()}, so it cannot use the GPU"
        mend = "install torch's CUDA build; see pytorch.org/get-started"
        yield Finding("CUDA", text, mend, fault=True)
    if not listed:
        is_apple = sys.platform == "darwin" and platform.machine() == "arm64"
        yield Finding("GPU", "Apple's (MPS)" if is_apple else "no NVIDIA GPU, or no driver")


def _folders() -> Iterator[Finding]:
    yield _folder("Kernel cache", cache_folder(), "set XDG_CACHE_HOME to a folder you can write to")
    home = os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
    models = sorted(p.name[8:].replace("--", "/") for p in hub.glob("models--*"))
    names = ", ".join(models[:3]) + (f" and {len(models) - 3} more" if len(models) > 3 else "")
    yield Finding("Model cache", f"{hub}: {names or 'no models'}")
    free = f", {shutil.disk_usage(os.getcwd()).free / 2**30:.1f} GiB free"
    yield _folder("Current folder", Path.cwd(), "change to a folder that can be written", free)


def _folder(name: str, folder: Path, mend: str, room: str = "") -> Finding:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if os.access(there, os.W_OK):
        return Finding(name, f"{folder}{room}")
    return Finding(name, f"{folder} cannot be written", mend)


def _ask_hub() -> Callable[[], Finding]:
    """Connect to the model hub in a thread; return a function that waits for the answer."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        text = f"{endpoint} is switched off by HF_HUB_OFFLINE"
        return partial(Finding, "Model hub", text, "unset HF_HUB_OFFLINE")
    answers = ["does not answer"]

    def ask() -> None:
        parts = urlsplit(endpoint)
        port = parts.port or (80 if parts.scheme == "http" else 443)
        try:
            with socket.create_connection((parts.hostname or "", port), _REACH_S):
                answers.append("can be reached")
        except OSError as error:
            answers.append(f"cannot be reached ({type(error).__name__})")

    def finding() -> Finding:
        asking.join(_REACH_S)
        mend = "give a local folder or a GGUF file as --model; gpt2 works with random weights"
        works = answers[-1] == "can be reached"
        return Finding("Model hub", f"{endpoint} {answers[-1]}", None if works else mend)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    return finding


def _extras() -> Iterator[Finding]:
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if not missing:
            yield Finding(f"Extra {extra}", "is installed")
        else:
            mend = f"pip install 'batchbench-llm[{extra}]'"
            yield Finding(f"Extra {extra}", f"lacks {', '.join(missing)}", mend)


def _load() -> Finding:
    share = psutil.cpu_percent(0.3) / 100
    mend = "stop other programs: times on a busy machine are suspect"
    text = f"{share:.0%} of the processors are in use"
    return Finding("Load", text, mend if share > _BUSY else None)
