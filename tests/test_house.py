"""The house: who imports whom, what is public and documented, and that the documents are true."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.documents import comparable, fenced, matches

import batchbench

PACKAGE = Path(batchbench.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
NEEDS_TORCH = (
    "batching.engines.torch",
    "batching.engines.notebook",
    "batching.engines.generate_batch",
    "batching.models.loading",
)

PUBLIC = {
    "BatchbenchError",
    "Experiment",
    "ModelSpec",
    "Outcome",
    "Policy",
    "Recording",
    "Request",
    "Result",
    "ServingSpec",
    "TrialsSpec",
    "UsageError",
    "View",
    "Watch",
    "Workload",
    "WorkloadSpec",
    "__version__",
    "conduct",
    "load",
    "run",
    "simulate",
}


def module_of(file: Path) -> str:
    """``batching.scheduler``, say."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree_of(file: Path) -> ast.Module:
    """A file's syntax."""
    return ast.parse(file.read_text(encoding="utf-8"))


def imports_of(file: Path) -> Iterator[str]:
    """Modules of ours that a file imports, anywhere in it."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    ("folder", "stranger"),
    [("batching/models", "engines"), ("batching/engines", "scheduler")],
)
def test_models_know_no_engine_and_engines_no_scheduler(folder: str, stranger: str) -> None:
    for file in (PACKAGE / folder).rglob("*.py"):
        assert not any(f".{stranger}" in name for name in imports_of(file)), file


TIMES = ("ends_ns", "step_ns", "growth", "beyond_ps", "rest_ps", "growth_ps")
"""Fields from which the Recording derives the times of steps."""

KEEPERS = (
    *("batching/recording.py", "batching/recording_file.py"),
    "batching/recorder.py",
)

NAMESAKES = {
    "batching/step_cost.py": {"self.step_ns", "self.growth_ps"},  # of a StepCost
    "batching/engines/simulated.py": {"passes.growth_ps"},
    "reports/prediction.py": {"cost.step_ns"},
    "studies/predict/breakeven.py": {"cost.step_ns"},
    "batching/remote/bench.py": {"warm_up.step_ns"},
    "batching/bench.py": {"warm_up.step_ns"},  # the median of the warm-up
    # the mean of one strategy in duet and check
    "studies/gate/check.py": {
        "first.step_ns",
        "other.step_ns",
        "own.step_ns",
        "p.step_ns",
        "turn.step_ns",
    },
    "studies/gate/duet.py": {"base.step_ns", "new.step_ns", "pair.step_ns"},
    "studies/gate/report.py": {"process.step_ns"},
    # of a queue
    "studies/capacity/search.py": {"trial.growth", "t.growth", "trials[0].growth"},
    "studies/capacity/report.py": {"probe.growth", "trial.growth"},
}
"""Attributes of other classes that have such a name."""


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_only_the_recording_derives_times_within_a_span(file: Path) -> None:
    """Steps of a span differ with a fitted cost, so other files must not compute with them."""
    name = file.relative_to(PACKAGE).as_posix()
    read = {
        ast.unparse(node)
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Attribute) and node.attr in TIMES
    }
    assert name in KEEPERS or read == NAMESAKES.get(name, set())


def test_only_the_torch_engines_and_the_loading_of_models_need_torch() -> None:
    """Everything else, all of reports included, is imported where torch cannot be."""
    names = [module_of(file) for file in FILES]
    needy = (*NEEDS_TORCH, "studies.executors.ray_cluster", "studies.executors.slurm")  # extras
    free = [f"batchbench.{name}" for name in names if name and not name.startswith(needy)]
    assert "batchbench.reports.formats.terminal" in free
    script = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
for name in {[name for name in free if not name.endswith("__main__")]!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def test_importing_the_package_or_a_spec_loads_not_even_numpy() -> None:
    script = """
import sys
import tomllib
from batchbench import Experiment, ModelSpec, ServingSpec, TrialsSpec, UsageError, WorkloadSpec
Experiment()
print([m for m in ("numpy", "torch", "pandas", "scipy", "matplotlib") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_every_package_that_is_imported_is_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [
        *project["dependencies"],
        *(
            line
            for extra in ("gguf", "gpu", "ray", "slurm", "vllm")
            for line in project["optional-dependencies"][extra]
        ),
    ]
    names = {re.split(r"[^\w.-]", line)[0].lower().replace("-", "_") for line in asked}
    imported = {name.split(".")[0] for file in FILES for name in imports_of(file)}
    imported -= {"batchbench", "compression", *sys.stdlib_module_names}  # compression: from 3.14 on
    # Packages of modules that are named otherwise.
    packages = {"pynvml": "nvidia_ml_py", "PIL": "pillow", "backports": "backports.zstd"}
    packages |= {"yaml": "pyyaml"}
    assert {packages.get(name, name) for name in imported} <= names


# What is public


def test_the_public_names_are_these() -> None:
    assert set(batchbench.__all__) == PUBLIC
    assert batchbench.__all__ == sorted(batchbench.__all__)


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_each_public_name_is_there_and_documented(name: str) -> None:
    found = getattr(batchbench, name)
    text = found.__doc__ or ""
    assert text
    assert not (dataclasses.is_dataclass(found) and text.startswith(f"{name}("))  # made up


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Serving'"):
        batchbench.Serving  # noqa: B018


@pytest.mark.parametrize("room", ["workloads", "batching.models"])
def test_what_a_room_offers_is_there(room: str) -> None:
    module = importlib.import_module(f"batchbench.{room}")
    assert all(getattr(module, name) is not None for name in module.__all__)


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


# What the code looks like


def is_public(name: str) -> bool:
    """Tell whether a name has no underscore in front."""
    return not name.startswith("_")


Documented = ast.Module | ast.ClassDef | ast.FunctionDef


def docstrings() -> Iterator[str]:
    """Yield every docstring of the package, the tests and the benchmarks."""
    for file in (*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")):
        for node in ast.walk(tree_of(file)):
            if isinstance(node, Documented) and (text := ast.get_docstring(node)):
                yield text


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_modules_have_docstrings(file: Path) -> None:
    assert ast.get_docstring(tree_of(file))


def protocols() -> Iterator[ast.ClassDef]:
    for file in FILES:
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases):
                yield node


def test_protocols_and_their_methods_are_documented() -> None:
    assert list(protocols())
    for protocol in protocols():
        assert ast.get_docstring(protocol), protocol.name
        for method in protocol.body:
            if isinstance(method, ast.FunctionDef) and is_public(method.name):
                assert ast.get_docstring(method), f"{protocol.name}.{method.name}"


MANNERED = re.compile(r"(what|whether|how|which|of|where|who|whose|that)\b", re.IGNORECASE)


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    assert [text.splitlines()[0] for text in docstrings() if MANNERED.match(text)] == []


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_files_and_functions_are_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 600
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


def test_nothing_is_asserted_of_users_and_no_names_are_vague() -> None:
    vague = re.compile("util|helper|common|manager", re.IGNORECASE)
    assert [file.name for file in FILES if vague.search(file.name)] == []


# What the documents say


def examples(file: Path) -> Iterator[tuple[list[str], str]]:
    """Commands ``$ batchbench …`` in a document's blocks, each with the output shown for it."""
    for block in fenced(file, r"\w*"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            words = command.split("#")[0].split()
            if words[0] == "batchbench" and output.strip():
                yield words[1:], output


def batchbench_says(words: list[str], folder: Path) -> str:
    """Standard output of the program on a terminal of 80 columns."""
    done = subprocess.run(
        [sys.executable, "-m", "batchbench", *words],
        capture_output=True,
        encoding="utf-8",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def documented_outputs() -> list[tuple[str, list[str], str]]:
    """Outputs in README and docs that do not depend on the machine."""
    return [
        (file.name, words, output)
        for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
        for words, output in examples(file)
        if words[0] in ("simulate", "workload") or words[-1] in ("--help", "--version")
    ]


@pytest.mark.parametrize(
    ("words", "output"),
    [
        pytest.param(words, output, id=f"{name}: {' '.join(words)}")
        for name, words, output in documented_outputs()
    ],
)
def test_outputs_in_the_documents_are_the_programs_own(
    words: list[str], output: str, tmp_path: Path
) -> None:
    said = comparable(batchbench_says(words, tmp_path))
    shown = comparable(output)
    assert shown == said or matches(shown, said)


def test_the_readme_shows_an_output_that_is_the_same_everywhere() -> None:
    if not (ROOT / "README.md").read_text(encoding="utf-8").strip():
        pytest.skip("README.md is not written yet")
    assert ("README.md", "simulate") in [
        (name, words[0]) for name, words, _ in documented_outputs()
    ]


def test_links_in_the_documents_lead_somewhere() -> None:
    for file in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", file.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (file.parent / link).exists(), f"{file.name}: {link}"


def test_the_example_of_the_policy_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "docs" / "write-your-own-policy.md"
    if not page.exists():
        pytest.skip("the page is not written yet")
    (code,) = fenced(page, "python")
    (command,) = fenced(page, "console")
    (name,) = set(re.findall(r"`(\w+\.py)`", page.read_text(encoding="utf-8")))
    (tmp_path / name).write_text(code)
    words = command.removeprefix("$ batchbench ").split()
    said = batchbench_says([*words, "--dry-run"], tmp_path)
    passes = re.match(r"steps +static ([\d,]+), continuous ([\d,]+), policies:\w+ ([\d,]+) ", said)
    assert passes is not None
    assert len(set(passes.groups())) == 3  # the workload shows what the policy changes


@pytest.mark.parametrize("target", ["run", "test", "lint", "clean"])
def test_make_knows_the_target(target: str) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", text, re.MULTILINE)


def test_the_architecture_page_names_every_room_and_part() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = [f for f in PACKAGE.rglob("*") if f.is_dir() and (f / "__init__.py").exists()]
    for room in rooms:
        assert room.name in text, room
    for file in FILES:
        if is_public(file.stem):
            assert f"{file.stem}" in text, file
