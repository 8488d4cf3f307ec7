#!/usr/bin/env python3
"""Check the wheel and the source distribution in ``dist/``, which ``make dist`` builds.

    .venv/bin/python .ci/wheel.py             with the packages of .venv: half a minute
    .venv/bin/python .ci/wheel.py --install   with packages that pip installs: minutes

The wheel must hold the files of the package, and its program must work in an empty environment,
outside the checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = "batchbench_llm.py"
VERSION = "batchbench/version.py"
SHORT = ("--model", "toy-gpt2", "--batch-size", "2", "--queue-size", "4", "--trials", "3")


def package_files() -> dict[str, bytes]:
    """Return the content of each file of the package in the checkout, by its path in a wheel."""
    files = [p for p in (ROOT / "batchbench").rglob("*") if p.is_file()]
    files = [p for p in files if p.suffix != ".pyc"]
    found = {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in [*files, ROOT / LAUNCHER]}
    pages = (ROOT / "docs").glob("*.md")  # beside the package, where ``batchbench help`` reads them
    return found | {f"batchbench/docs/{page.name}": page.read_bytes() for page in pages}


def read_wheel(wheel: Path) -> dict[str, bytes]:
    """Return the content of each file of a wheel but its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert len(names) == len(set(names)), "the wheel holds a name twice"
        return {n: archive.read(n) for n in names if ".dist-info/" not in n}


def read_source(source: Path) -> dict[str, bytes]:
    """Return the content of each file of a source distribution, without the folder around all."""
    with tarfile.open(source) as archive:
        found = {m.name.partition("/")[2]: archive.extractfile(m) for m in archive if m.isfile()}
        return {name: content.read() for name, content in found.items() if content}


def check_contents(wheel: Path, source: Path) -> str:
    """Check the files of both; return the version."""
    version = wheel.name.split("-")[1]
    assert source.name == f"batchbench_llm-{version}.tar.gz", (wheel.name, source.name)
    expected, built, packed = package_files(), read_wheel(wheel), read_source(source)
    line = f'__version__ = "{version}"\n'.encode()
    assert line in built[VERSION], f"{VERSION} of the wheel has another version"
    assert built[VERSION] == packed[VERSION]
    for files in (expected, built, packed):
        del files[VERSION]
    assert built.keys() == expected.keys(), sorted(built.keys() ^ expected.keys())
    assert built == expected, "the wheel was built from other files; type make dist"
    packed |= {f"batchbench/{n}": text for n, text in packed.items() if n.startswith("docs/")}
    assert built.items() <= packed.items()
    return version


def make_environment(folder: Path, wheel: Path, *, install: bool) -> Path:
    """Make an environment that holds the wheel; return its folder of programs."""
    venv.create(folder, with_pip=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    pip = [programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if install:
        began = time.monotonic()
        subprocess.run([*pip, "-c", ROOT / "constraints.txt", wheel], check=True)
        print(f"pip installed the wheel and all that it needs in {time.monotonic() - began:.0f} s")
        return programs
    subprocess.run([*pip, "--no-deps", wheel], check=True)
    site = next(p for p in folder.rglob("site-packages") if p.is_dir())
    # A .pth file in these folders is not read, so an editable install of batchbench is not seen.
    shared = [path for path in sys.path if path.endswith("-packages")]
    (site / "shared.pth").write_text("\n".join(shared), "utf-8")
    return programs


class Program:
    """The program of an environment, run in a folder far from the checkout."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs, self._folder = programs, folder
        self._environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def __call__(self, *words: str, name: str = "batchbench", **variables: str) -> str:
        done = subprocess.run(
            [self._programs / name, *words],
            cwd=self._folder,
            env={**self._environment, **variables},
            stdout=subprocess.PIPE,
            encoding="utf-8",
            check=False,
        )
        assert done.returncode == 0, f"{name} {' '.join(words)}: exit code {done.returncode}"
        return done.stdout


def check_program(program: Program, folder: Path, version: str) -> None:
    """Check the commands that a new user tries first, and completion."""
    for name in ("batchbench", "batchbench-llm"):
        assert program("--version", name=name) == f"batchbench {version}\n"
    place = program("-P", "-c", "import batchbench; print(batchbench.__file__)", name="python")
    assert str(folder) in place, place
    program("simulate", "--batch-size", "8", "--queue-size", "32", "--quiet", "--output", "counts")
    program("run", *SHORT, "--quiet", "--output", "result")
    result = json.loads((folder / "result" / "result.json").read_text("utf-8"))
    assert result["batchbench_version"] == version
    assert result["verification"]["passed"] is True
    assert "continuous" in program("report", "result")
    assert "TTFT" in program("help", "metrics")
    assert f"{version}, in " in program("doctor")
    program("report", "result", "--format", "html", "--output", "page.html", "--quiet")
    assert (folder / "page.html").stat().st_size > 10_000
    for shell in ("bash", "zsh"):
        script = program(_BATCHBENCH_COMPLETE=f"source_{shell}")
        assert "batchbench" in script
        if found := shutil.which(shell):
            subprocess.run([found, "-n"], input=script, encoding="utf-8", check=True)
    words = {"COMP_WORDS": "batchbench s", "COMP_CWORD": "1"}
    assert "simulate" in program(_BATCHBENCH_COMPLETE="complete_bash", **words)
    words = {"_TYPER_COMPLETE_ARGS": "batchbench s"}
    assert "simulate" in program(_BATCHBENCH_COMPLETE="complete_zsh", **words)


def main() -> None:
    """Check the distributions of ``dist/``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--install", action="store_true", help="let pip install all packages")
    install = parser.parse_args().install
    (wheel,), (source,) = (list((ROOT / "dist").glob(f"*{end}")) for end in (".whl", ".tar.gz"))
    version = check_contents(wheel, source)
    with tempfile.TemporaryDirectory(prefix="wheel-") as name:
        folder = Path(name).resolve()
        programs = make_environment(folder / "venv", wheel, install=install)
        check_program(Program(programs, folder), folder, version)
    print(f"{wheel.name}: complete, and works outside the checkout")


if __name__ == "__main__":
    main()
