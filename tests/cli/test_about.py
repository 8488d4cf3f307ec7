"""The commands doctor and help: what a machine lacks is named, and every page can be read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from support.program import Program
from support.program import here as here
from support.program import program as program

from batchbench.batching.machine import Processor
from batchbench.cli.about import find_pages, title_of
from batchbench.studies import doctor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def found(name: str) -> doctor.Finding:
    return next(f for f in doctor.examine() if f.name == name)


def without(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name: None if name == module else find(name)
    )


def gpu(monkeypatch: pytest.MonkeyPatch, built_for: str) -> None:
    line = "NVIDIA H200, 570.1, 143771 MiB, 4 MiB"
    monkeypatch.setattr(
        doctor, "command_output", lambda *words: line if words[0] == "nvidia-smi" else None
    )
    monkeypatch.setattr(doctor, "_built_for", lambda: built_for)


def test_extras_are_those_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert doctor.EXTRAS.keys() == project["optional-dependencies"].keys() - {"dev", "docs"}


def test_a_missing_extra_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "gguf")
    finding = found("Extra gguf")
    assert finding.text == "lacks gguf"
    assert finding.mend == "pip install 'batchbench-llm[gguf]'"


def test_a_missing_compiler_is_named_where_it_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"})
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "find_compiler", lambda: None)
    monkeypatch.setattr(Processor, "here", lambda: Processor("GenuineIntel", needed))
    assert found("CPU kernels").mend == "install g++ (GCC)"
    monkeypatch.setattr(Processor, "here", lambda: Processor("", frozenset()))
    assert found("CPU kernels").mend is None


def test_a_torch_that_cannot_use_the_gpu_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, program: Program
) -> None:
    gpu(monkeypatch, "CPUs")
    assert found("GPU").text == "NVIDIA H200, driver 570.1, 4 MiB of 143771 MiB in use"
    said = program("doctor")
    assert said.code == 1
    assert "torch is built for CPUs, so it cannot use the GPU" in said.out
    gpu(monkeypatch, "CUDA 12.8")
    assert program("doctor").code == 0


def test_a_missing_torch_is_a_fault(monkeypatch: pytest.MonkeyPatch, program: Program) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "torch" else version(name))
    said = program("doctor", "--json")
    assert said.code == 1
    findings = {f["name"]: f for f in json.loads(said.out)["findings"]}
    assert findings["torch"] == {
        "name": "torch",
        "text": "is missing",
        "mend": "pip install torch",
        "fault": True,
    }


def test_a_hub_that_does_not_answer_is_told_in_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("Model hub").mend == "unset HF_HUB_OFFLINE"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused = found("Model hub")
    assert refused.text == "http://127.0.0.1:9 cannot be reached (ConnectionRefusedError)"
    assert refused.mend is not None


def test_a_folder_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert found("Current folder").mend == "change to a folder that can be written"


@pytest.mark.parametrize(
    ("text", "built"),
    [
        ("cuda: Optional[str] = '12.8'\nhip = None", "CUDA 12.8"),
        ("cuda = None\nhip: Optional[str] = '6.4'", "ROCm 6.4"),
        ("cuda: Optional[str] = None", "CPUs"),
    ],
)
def test_the_platform_of_torch_is_read_from_its_file(
    text: str, built: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(text, encoding="utf-8")
    spec: Any = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(sys, "platform", "linux")
    assert doctor._built_for() == built


def test_doctor_imports_no_torch() -> None:
    code = (
        "import sys; from batchbench.studies.doctor import examine; examine(); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("page", find_pages())
def test_every_page_can_be_read(page: str, program: Program) -> None:
    said = program("help", page)
    assert said.code == 0
    assert title_of(find_pages()[page]).split()[0] in said.out
    assert "](" not in re.sub(r"\]\(https?:", "", said.out)


def test_help_lists_pages_and_shows_the_options_of_a_command(program: Program) -> None:
    said = program("help")
    assert {line.split()[0] for line in said.out.splitlines()[:-2]} == set(find_pages())
    assert program("help", "simulate").out == program("simulate", "--help").out
    said = program("help", "metrix")
    assert said.code == 2
    assert said.err == "batchbench: metrix: is no page or command; did you mean metrics?\n"
