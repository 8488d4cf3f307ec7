"""The rules of imports: layers, no circles, late imports only at the seams, libraries in place."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import batchbench

PACKAGE = Path(batchbench.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = ("workloads", "batching", "reports", "studies", "api", "cli")
"""Layers from the ground up; each imports those before it."""

GROUND = ("version", "errors", "settings", "json_file", "files")
"""Modules that belong to no layer; they import only one another."""


def module_of(file: Path) -> str:
    """Return the dotted name of a file's module."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def imports_of(file: Path) -> Iterator[tuple[str, bool]]:
    """Yield every module that a file imports, and whether a function does it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    late = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module, id(node) in late


IMPORTS = {name: set(imports_of(file)) for name, file in MODULES.items()}


def ours(name: str) -> set[str]:
    """Return the modules of the package that a module imports, late or for types included."""
    return {other for other, _ in IMPORTS[name] if other in MODULES and other != name}


def test_there_is_no_circle_not_even_of_late_imports_or_for_types() -> None:
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != 1, " → ".join([*path[path.index(name) :], name])
        if name in state:
            return
        state[name] = 1
        for other in sorted(ours(name)):
            visit(other, (*path, name))
        state[name] = 2

    for name in MODULES:
        visit(name, ())


def layer_of(name: str) -> str:
    """Return the layer or ground module of a module; empty for the package itself."""
    return name.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_the_layers_below_it(name: str) -> None:
    layer = layer_of(name)
    if layer in ("", "__main__"):
        return
    below = LAYERS[: LAYERS.index(layer) + 1] if layer in LAYERS else ()
    assert {layer_of(other) for other in ours(name)} <= {*below, *GROUND}


STUDIES = {f.parent.name for f in FILES if f.parent.parent.name == "studies"}

NEIGHBOURS = {"predict": {"sweep"}, "trend": {"gate"}}
"""Studies that a study may import: a break-even map is a sweep, and a trend ends as a gate does."""


@pytest.mark.parametrize("name", sorted(n for n in MODULES if layer_of(n) == "studies"))
def test_a_study_imports_the_core_itself_and_executors(name: str) -> None:
    study = (*name.split("."), "")[2]
    if name == "batchbench.studies.worker":  # the name under which other versions start the worker
        study = "gate"
    others = {o.split(".")[2] for o in ours(name) if o.startswith("batchbench.studies.")}
    assert others <= {study, "executors", *NEIGHBOURS.get(study, ())}


HEAVY: Mapping[str, tuple[str, ...]] = {
    "torch": (
        *("batching.engines.*", "batching.models.loading", "batching.machine"),
        "studies.ladder.run",  # types of what the engines return
        "studies.executors.jobs",
    ),
    "rich": (
        *("*report*", "reports.formats.*", "reports.replay.terminal", "cli.*"),
        *("api", "studies.reproduce", "studies.predict.batch_sizes"),
    ),
    "ray": ("studies.executors.ray_cluster",),
    "submitit": ("studies.executors.slurm",),
    "matplotlib": (
        *("reports.figures*", "reports.replay.gif", "*figures*", "*report*", "*facets*"),
        *("api", "studies.predict.batch_sizes"),
    ),
}
"""Modules that may import a library."""


@pytest.mark.parametrize("library", HEAVY)
def test_a_library_is_imported_only_in_its_places(library: str) -> None:
    users = {
        name.removeprefix("batchbench.")
        for name in MODULES
        if any(other.split(".")[0] == library for other, _ in IMPORTS[name])
    }
    assert users
    strangers = {n for n in users if not any(fnmatchcase(n, place) for place in HEAVY[library])}
    assert strangers == set()


LATE: Mapping[str, str] = {
    # Factories: what they build imports torch.
    "api": "pictures and tables import pandas and matplotlib",
    "batching.dry_run": "an engine imports torch",
    "batching.engines.torch.triton.choice": "Triton is there on a GPU only",
    "batching.engines.torch.build": "generate_batch imports transformers' own batching",
    "batching.models": "loading a model imports torch",
    "batching.models.gguf_file": "gguf is optional",
    "batching.models.source": "the hub, safetensors and tokenizers",
    "batching.bench": "an engine imports torch",
    "batching.remote.bench": "the reference imports torch",
    "batching.session": "a server needs ssl and h11",
    "batching.strategies": "entry points are read only for a name that is not ours",
    "batching.strategies.vllm": "vLLM is optional, and the bytes of a cache are known to torch",
    "batching.trials": "measuring the machine imports torch",
    "studies.executors.spec": "Ray and submitit are optional",
    "studies.executors.jobs": "a GPU is looked at only where times are measured",
    "studies.gate.worker": "a worker imports torch, and its driver does not",
    "studies.ladder.run": "a rung of the ladder imports torch",
    # Libraries that are optional or take long to import, so that --help and errors come at once.
    "batching.machine": "torch and NVML, where they are there",
    "files": "filelock takes 60 ms",
    "workloads.arrivals": "numpy and scipy",
    "workloads.lengths": "numpy and scipy",
}
"""Modules outside the command line with late imports, and the reason."""


def test_late_imports_stand_only_at_the_seams() -> None:
    late = {
        name.removeprefix("batchbench.")
        for name, imports in IMPORTS.items()
        if any(is_late for _, is_late in imports) and layer_of(name) != "cli"
    }
    assert late <= {*LATE, "__main__"}
    assert LATE.keys() <= late


@pytest.mark.parametrize("folder", sorted({f.parent for f in FILES}), ids=lambda f: f.name)
def test_a_folder_has_at_most_17_files(folder: Path) -> None:
    assert len(list(folder.glob("*.py"))) <= 17


def test_the_package_has_at_most_200_files() -> None:
    assert len(FILES) <= 200


def test_no_test_imports_a_test() -> None:
    for file in Path(__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        names |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert not any(part.startswith("test_") for n in names for part in n.split(".")), file
