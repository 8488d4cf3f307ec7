"""The distribution batchbench-llm: its name, version and start, its workflows and container."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import batchbench
import batchbench_llm
from batchbench.batching import machine
from batchbench.version import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NAME = PROJECT["project"]["name"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


# The name


def texts_of(file: Path) -> Iterator[str]:
    """Yield the lines of a file; of a Python file its strings, with {} for what is filled in."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        yield from text.replace("\\\n", " ").splitlines()
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from node.value.splitlines()


FOLDERS = ("batchbench", "benchmarks", "docs", ".github", ".ci")
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "action.yml", "batchbench_llm.py")),
    *(
        file
        for folder in FOLDERS
        for file in sorted((ROOT / folder).rglob("*"))
        if file.suffix in (".py", ".md", ".yml", ".yaml", ".ipynb")
    ),
]

INSTALLED = re.compile(r"(?:(?<!un)install|--from|--spec|uvx|pipx run)\b(?P<words>[^\n]*)")
REQUIREMENT = re.compile(r"(?<![\w./-])(?P<name>batchbench[\w-]*|\.)(?:\[(?P<extras>[^\]]*)\])?")


def requirements(text: str) -> Iterator[tuple[str, str]]:
    """Yield the name and extras of each requirement of ours that a text tells to install."""
    for found in INSTALLED.finditer(text):
        words = re.split(r"&&|;|\||`", found["words"])[0]
        first = next((w for w in words.split() if not w.startswith("-")), "")
        for match in REQUIREMENT.finditer(words if "install" in found[0] else first):
            yield match["name"], match["extras"] or ""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pip install batchbench", [("batchbench", "")]),
        ("pip uninstall batchbench && pip install --no-deps batchbench-llm", [(NAME, "")]),
        ("pip install -c constraints.txt -e '.[ray,slurm]'", [(".", "ray,slurm")]),
        ("type pip install 'batchbench-llm[{}]'", [(NAME, "{}")]),
        (
            'pip install "batchbench @ git+https://github.com/OWNER/batchbench"',
            [("batchbench", "")],
        ),
        ("uvx --from batchbench-llm batchbench run", [(NAME, "")]),
        ("uvx batchbench run", [("batchbench", "")]),
    ],
)
def test_requirements_are_found_in_a_text(text: str, found: list[tuple[str, str]]) -> None:
    assert list(requirements(text)) == found


def test_every_line_that_installs_has_our_name_and_extras_that_exist() -> None:
    extras = {*PROJECT["project"]["optional-dependencies"], "{}"}
    seen = [
        (file.relative_to(ROOT), name, asked)
        for file in TEXTS
        for text in texts_of(file)
        if "install" in text or "uvx" in text or "pipx" in text
        for name, asked in requirements(text)
    ]
    assert [row for row in seen if row[1] not in (NAME, ".")] == []
    assert [row for row in seen if row[2] and not set(row[2].split(",")) <= extras] == []
    assert {str(file) for file, _, _ in seen} >= {"docs/clusters.md", "docs/ci.md"}


def test_the_programs_start_where_the_other_project_has_no_file() -> None:
    start = "batchbench_llm:main"
    assert PROJECT["project"]["scripts"] == {"batchbench": start, NAME: start}
    assert batchbench.__distribution__ == NAME


# The version


def test_a_build_without_git_has_the_version_of_a_checkout() -> None:
    assert PROJECT["tool"]["hatch"]["version"]["fallback-version"] == __version__


def test_the_commit_of_a_checkout_is_no_tag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "batchbench").mkdir()
    file = tmp_path / "batchbench" / "version.py"
    file.touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["tag", "-am", "x", "v1"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(machine.version, "__file__", str(file))
    assert re.fullmatch("[0-9a-f]{12}", machine.git_commit() or "")


# The start beside the other project


def start(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run our start where only ``folder`` holds packages."""
    shutil.copy(batchbench_llm.__file__, folder)
    code = "import sys; sys.path.insert(0, sys.argv.pop()); import batchbench_llm as start"
    return subprocess.run(
        [sys.executable, "-P", "-S", "-c", f"{code}; start.main()", str(folder)],
        capture_output=True,
        encoding="utf-8",
    )


def install_ours(folder: Path) -> None:
    """Lay a made-up batchbench of ours, which prints what was imported."""
    (folder / "batchbench").mkdir(exist_ok=True)
    (folder / "batchbench" / "__init__.py").write_text(f"__distribution__ = {NAME!r}")
    (folder / "batchbench" / "version.py").touch()
    code = "import sys\ndef main(): print('importlib.metadata' in sys.modules)"
    (folder / "batchbench" / "__main__.py").write_text(code)


def install_theirs(folder: Path, code: str = "", *, listed: bool = True) -> None:
    """Lay a made-up distribution batchbench 0.7.0, which overwrites files of ours."""
    (folder / "batchbench").mkdir(exist_ok=True)
    (folder / "batchbench" / "__init__.py").write_text(code)
    (folder / "batchbench" / "__main__.py").write_text("def main(): print('theirs')")
    if listed:
        about = folder / "batchbench-0.7.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: batchbench\nVersion: 0.7.0\n")


def test_the_program_starts_and_looks_up_no_distribution(tmp_path: Path) -> None:
    install_ours(tmp_path)
    done = start(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


def test_the_program_starts_after_it_has_overwritten_the_other_project(tmp_path: Path) -> None:
    install_theirs(tmp_path)
    install_ours(tmp_path)
    assert start(tmp_path).stdout == "False\n"


@pytest.mark.parametrize("code", ["", "import no_such_compiled_code", "raise RuntimeError"])
def test_the_other_project_is_told_with_the_commands_that_repair(tmp_path: Path, code: str) -> None:
    install_ours(tmp_path)
    install_theirs(tmp_path, code)
    done = start(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"batchbench-llm: {tmp_path / 'batchbench' / '__init__.py'} is a file of the other project "
        "batchbench 0.7.0; type pip uninstall batchbench && pip install --force-reinstall "
        "--no-deps batchbench-llm\n"
    )


def test_a_folder_of_that_name_is_told_too(tmp_path: Path) -> None:
    install_theirs(tmp_path, listed=False)
    done = start(tmp_path)
    assert done.returncode == 2
    assert "is a file of another project; type pip uninstall" in done.stderr


@pytest.mark.parametrize("left", [True, False])
def test_files_that_an_uninstall_has_taken_along_are_told(tmp_path: Path, left: bool) -> None:
    if left:
        install_ours(tmp_path)
        (tmp_path / "batchbench" / "__init__.py").unlink()
    done = start(tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "batchbench-llm: files of batchbench are missing; type pip install --force-reinstall "
        "--no-deps batchbench-llm\n"
    )


# Workflows


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.name)
def test_a_workflow_is_as_github_publishes(file: Path) -> None:
    check = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.github-workflows",
    ]
    done = subprocess.run([*check, file], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr


def workflow(name: str) -> dict[str, Any]:
    """A workflow as a dict; YAML reads its key ``on`` as True."""
    text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.name)
def test_a_workflow_names_what_exists_and_its_scripts_hold_no_text_of_github(file: Path) -> None:
    for job in workflow(file.stem)["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        used = set(re.findall(r"\$\{\{\s*matrix\.(\w+)", json.dumps(job)))
        assert used <= matrix.keys()
        assert {job.get("needs", "build")} <= {*workflow(file.stem)["jobs"], "build"}
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@\w[\w./]*", step.get("uses", "a/b@v1"))
            assert "${{" not in step.get("run", "")


def test_ci_runs_on_three_systems_and_all_versions_of_python() -> None:
    versions = re.findall(r"Python :: (3\.\d+)", str(PROJECT["project"]["classifiers"]))
    jobs = workflow("ci")["jobs"]
    systems = {jobs["linux"]["runs-on"], *jobs["platforms"]["strategy"]["matrix"]["os"]}
    assert systems == {"ubuntu-latest", "windows-latest", "macos-latest"}
    for job in jobs.values():
        assert job["strategy"]["matrix"]["python"] == versions


def test_a_release_is_published_without_a_password_by_a_job_that_runs_no_code_of_ours() -> None:
    release = workflow("release")
    build, publish = release["jobs"]["build"], release["jobs"]["publish"]
    assert release["permissions"] == {"contents": "read"}
    assert "permissions" not in build
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"]["name"] == "pypi"
    assert not any("run" in step for step in publish["steps"])
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    assert "secrets." not in text
    assert "password" not in text
    # The tags of hatch-vcs are those that start this workflow.
    assert release[True]["push"]["tags"] == ["v[0-9]*"]
    assert "match=v[0-9]*" in (ROOT / ".git_archival.txt").read_text(encoding="utf-8")


# The container


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile and their arguments, with continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", "\n\\").split("\n") if line.strip()]
    joined = "\n".join(lines).replace("\n\\", " ").split("\n")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined]


def test_the_container_runs_our_program_and_not_as_root() -> None:
    found = instructions()
    last = dict(found)
    assert {name for name, _ in found} <= {
        *("ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "ENTRYPOINT", "CMD")
    }
    assert json.loads(last["ENTRYPOINT"]) == ["batchbench"]
    assert json.loads(last["CMD"]) == ["--help"]
    user = int(last["USER"].partition(":")[0])
    assert user > 0
    assert any(f"useradd --uid {user} " in text for name, text in found if name == "RUN")
    writable = next(text for name, text in found if name == "RUN" and "mkdir" in text)
    assert "--mode 1777" in writable
    variables = dict(pair.split("=", 1) for pair in shlex.split(last["ENV"]))
    for place in (last["WORKDIR"], variables["HOME"], variables["BATCHBENCH_CACHE"]):
        assert any(place.startswith(folder) for folder in ("/results", "/cache"))
        assert f" /{place.split('/')[1]}" in writable
    assert variables["PATH"].startswith("/opt/batchbench/bin:")


def test_the_last_image_has_no_source_no_git_and_no_lists_of_packages() -> None:
    found = instructions()
    stage = max(i for i, (name, _) in enumerate(found) if name == "FROM")
    last = found[stage:]
    assert [t for n, t in last if n == "COPY"] == ["--from=build /opt/batchbench /opt/batchbench"]
    for _, text in [pair for pair in found if "apt-get install" in pair[1]]:
        assert "--no-install-recommends" in text
        assert text.endswith("rm -rf /var/lib/apt/lists/*")
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ".venv" in ignored
    assert ".git" not in ignored  # the version comes from it


FAKE = """#!/bin/sh
echo "$*" >> "$LOG"
if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi
"""


def install_step(device: str, folder: Path) -> tuple[int, list[list[str]]]:
    """Run the step that installs, with a python that only notes its words."""
    (step,) = [text for name, text in instructions() if name == "RUN" and "pip install" in text]
    (folder / "programs").mkdir()
    python = folder / "programs" / "python"
    python.write_text(FAKE)
    python.chmod(0o755)
    log = folder / "log"
    log.touch()
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", step.replace("/opt/batchbench", str(folder / "environment"))],
        env={**os.environ, "PATH": path, "LOG": str(log), "DEVICE": device},
        stderr=subprocess.DEVNULL,
    )
    return done.returncode, [line.split() for line in log.read_text().splitlines()]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_container_installs_for_a_cpu_or_for_cuda(tmp_path: Path, device: str) -> None:
    code, (made, installed) = install_step(device, tmp_path)
    assert code == 0
    assert made[:2] == ["-m", "venv"]
    assert installed[:3] == ["-m", "pip", "install"]
    assert "--no-cache-dir" in installed
    assert (ROOT / installed[installed.index("-c") + 1]).is_file()
    assert installed[-1] == (".[gpu]" if device == "cuda" else ".")
    assert ("https://download.pytorch.org/whl/cpu" in installed) == (device == "cpu")
    assert "gpu" in PROJECT["project"]["optional-dependencies"]


def test_the_container_refuses_another_device(tmp_path: Path) -> None:
    assert install_step("tpu", tmp_path) == (2, [])
