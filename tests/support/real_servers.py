"""Real servers for tests marked ``server``: started by ``benchmarks/servers.py``, else skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "servers.py"

INSTALLED = {
    "llama.cpp": "BATCHBENCH_LLAMA_SERVER",
    "vllm": "BATCHBENCH_VLLM_PYTHON",
    "transformers": "BATCHBENCH_TRANSFORMERS",
}


def needs(name: str) -> pytest.MarkDecorator:
    """Return the mark that skips a test if this server is not installed."""
    variable = INSTALLED[name]
    reason = f"{variable} names no {name} server (benchmarks/servers.py install)"
    return pytest.mark.skipif(not os.environ.get(variable), reason=reason)


def call(*words: object) -> str:
    """Run the script and return its standard output."""
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=700, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def running(name: str, model: Path, slots: int, context: int = 256) -> Iterator[str]:
    """Start a server on a free port, yield its address, and stop it by its process id."""
    options = ("--slots", slots, "--context", context)
    facts = json.loads(call("start", name, model, *options).splitlines()[-1])
    try:
        yield facts["url"]
    finally:
        call("stop", facts["pid"])
