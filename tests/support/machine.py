"""The machine that tests see: processor, terminal, locale, home folder, network and signals.

``conftest.py`` calls :func:`settle` before the first test file is imported, so that nothing of the
user's own reaches a test, nor a process that a test starts.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from batchbench.batching import machine as processor_file
from batchbench.batching.machine import Processor

HOME = "BATCHBENCH_TEST_HOME"
"""The home folder of a session's tests, which pytest-xdist's workers share."""

KEPT = {
    *("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "TEMP", "TMP"),
    *("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE", "PYTHONUTF8"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_HOME"),
    *("BATCHBENCH_LLAMA_SERVER", "BATCHBENCH_VLLM_PYTHON", "BATCHBENCH_TRANSFORMERS"),
    *("BATCHBENCH_GGUF_PYTHON", "BATCHBENCH_TRAINED_GGUF"),
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "TEST_PROCESSOR", "TEST_ORDER"),
}
"""Variables that a test still sees. None of them may decide how a test ends."""

GIVEN = {
    "COLUMNS": "80",
    "TERM": "xterm",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "PYTHONIOENCODING": "utf-8",
    "TZ": "UTC",
    "OMP_NUM_THREADS": "1",  # a tiny model gains nothing from a second thread
    # Kernels of a GPU run on the CPU, except where there is one.
    "TRITON_INTERPRET": "0" if Path("/dev/nvidiactl").exists() else "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_COUNT": "1",  # a checkout may belong to another user
    "GIT_CONFIG_KEY_0": "safe.directory",
    "GIT_CONFIG_VALUE_0": "*",
    **dict.fromkeys(("no_proxy", "NO_PROXY"), "localhost,127.0.0.1"),
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9"),
}
"""Variables that every test sees; port 9 discards, so that no process reaches the network."""

_AVX512 = "fma avx2 avx512f avx512bw avx512vl avx512dq"
_X86 = "processor\t: 0\nvendor_id\t: {}\nmodel name\t: made up\nflags\t\t: {}\n\nprocessor\t: 1\n"

PROCESSORS: Mapping[str, str] = {
    "haswell": _X86.format("GenuineIntel", "fma avx2"),
    "skylake": _X86.format("GenuineIntel", _AVX512),
    "cooperlake": _X86.format("GenuineIntel", f"{_AVX512} avx512_bf16"),
    "sapphirerapids": _X86.format(
        "GenuineIntel", f"{_AVX512} avx512_bf16 amx_tile amx_bf16 amx_int8"
    ),
    "zen3": _X86.format("AuthenticAMD", "fma avx2"),
    "zen4": _X86.format("AuthenticAMD", f"{_AVX512} avx512_bf16"),
    "arm64": "processor\t: 0\nFeatures\t: fp asimd bf16 sve\nCPU implementer\t: 0x41\n\n",
    "unknown": "",
}
"""``/proc/cpuinfo`` of processors, cut to what the code reads."""

ORDER = os.environ.get("TEST_ORDER", "")
"""The seed of another order of tests; empty for pytest's own order."""

CHOSEN = os.environ.get("TEST_PROCESSOR", "")
"""The processor of :data:`PROCESSORS` that tests run on; this machine's own if empty."""


def settle() -> Callable[[], None]:
    """Set the machine for this process and those it starts; return a function that cleans up."""
    home, own = os.environ.get(HOME), None
    if home is None:
        home = own = tempfile.mkdtemp(prefix="batchbench-tests-")
    seen = environment(os.environ, home)
    os.environ.clear()
    os.environ.update(seen)
    if hasattr(time, "tzset"):
        time.tzset()
    _restore_signals()
    socket.socket.connect = _connect  # type: ignore[method-assign,assignment]
    if CHOSEN:
        _choose(CHOSEN, Path(home))
    return lambda: shutil.rmtree(own, ignore_errors=True) if own else None


def environment(users: Mapping[str, str], home: str) -> dict[str, str]:
    """Return the environment variables of tests, made from the user's own."""
    of_pytest = ("PYTEST_", "COV_", "COVERAGE_")  # with which its plugins talk to their processes
    kept = {k: v for k, v in users.items() if k in KEPT or k.startswith(of_pytest)}
    return {**kept, **GIVEN, **_folders(home), HOME: home}


def _folders(home: str) -> dict[str, str]:
    """Return the variables that name the folders of programs, all below a home."""
    return {
        "HOME": home,
        "USERPROFILE": home,
        "XDG_CACHE_HOME": f"{home}/.cache",
        "XDG_CONFIG_HOME": f"{home}/.config",
        "HF_HOME": f"{home}/huggingface",
        "MPLCONFIGDIR": f"{home}/matplotlib",
        "TORCHINDUCTOR_CACHE_DIR": f"{home}/inductor",
    }


def _restore_signals() -> None:
    """Handle signals as a program in the foreground does.

    A shell starts background jobs with SIGINT ignored, and nohup ignores SIGHUP. The processes that
    tests start would inherit that.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGHUP", "SIGTERM"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, ())


_real_connect = socket.socket.connect


def _connect(self: socket.socket, address: Any) -> None:
    """Connect within this machine; refuse other addresses."""
    local = not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1", "localhost")
    if not local:
        raise OSError(f"tests have no network; one asked for {address}")
    _real_connect(self, address)


def _choose(name: str, home: Path) -> None:
    """Let the code see a processor of :data:`PROCESSORS`, less what this machine cannot run."""
    real = Processor.here().features
    lacking = {word for word in [*_AVX512.split(), "avx512_bf16"] if word not in real}
    text = PROCESSORS[name].split("\n")
    lines = (
        " ".join(word for word in line.split(" ") if word not in lacking)
        if line.startswith("flags")
        else line
        for line in text
    )
    made_up = home / f"cpuinfo-{os.getpid()}"
    made_up.write_text("\n".join(lines), encoding="utf-8")
    processor_file.CPUINFO = made_up


def shuffle(items: list[pytest.Item]) -> None:
    """Put test files, and the tests within each, in the random order of ``TEST_ORDER``, a number.

    Tests of a file stay together, since they share what is made once a file.
    """
    if not ORDER:
        return
    chance = random.Random(ORDER)
    keys = {item.path: chance.random() for item in items}
    items.sort(key=lambda item: (keys[item.path], chance.random()))
