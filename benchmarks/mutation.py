"""Mutation testing: change the code in many small ways, and see that a test fails each time.

    python benchmarks/mutation.py                       all files
    python benchmarks/mutation.py latency policies      these files
    python benchmarks/mutation.py latency --survivors   only what no test killed last time

The mutants are those of mutmut's operators: a number plus one, ``<`` as ``<=``, an argument left
out, a value replaced by None, and so on. mutmut's own runner leaves out all that stands outside of
functions, and every function that has a decorator: most definitions of a time or a count here. So
this script applies the operators to the whole file and runs each mutant itself. A process that has
imported numpy, scipy and pytest forks, imports the package with the changed file, and runs the
tests of that file until one fails. The tests that killed most so far come first.

No mutants are made of annotations, decorators, base classes, type aliases, calls of ``cast``, and
the text of raised messages: tests compare the substance of messages and not their letters.

``equivalent_mutants.toml`` lists mutants that change nothing a test could see, each with the
reason. The score of a file is the share of its other mutants that were killed. Exit code 1 where a
score is below the goal, where a listed mutant was killed, or where it no longer exists.

Outcomes are kept in ``.mutation/``, so that a run that was interrupted goes on where it stopped as
long as no file has changed. A whole run writes ``results/mutation/mutation.json``.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import os
import resource
import signal
import sys
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

import libcst as cst
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from libcst.metadata import PositionProvider
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).parents[1]
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.toml")
KEPT = ROOT / ".mutation"
RESULT = Path(__file__).parent / "results" / "mutation" / "mutation.json"
GOAL = 0.95

PRELOADED = (
    "numpy.testing",
    "scipy.integrate",
    "scipy.optimize",
    "scipy.special",
    "scipy.stats",
    "hypothesis.strategies",
    "huggingface_hub.constants",
)
"""Modules that take long to import and that no mutant changes."""

BATCHING, REPORTS = "batchbench/batching", "batchbench/reports"
SUBJECTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "policies": (BATCHING, ("policy_decisions", "own_policies", "policies")),
    "scheduler": (BATCHING, ("queue", "plans", "own_policies", "scheduler", "policies")),
    "recording": (BATCHING, ("span_times", "recorder", "by_hand", "recording")),
    "recording_file": (BATCHING, ("recording",)),
    "verification": (BATCHING, ("deviations",)),
    "latency": (REPORTS, ("by_hand", "stalls", "metrics", "golden")),
    "metrics": (REPORTS, ("by_hand", "metrics", "golden")),
    "statistics": (REPORTS, ("sequential_values",)),
}
"""The folder of each file by its name, and the tests that must notice its mutants."""

LEFT_OUT = ("test_a_hundred_thousand_requests_take_no_five_seconds",)
"""Tests that look at a real clock, and so fail by chance on a busy machine."""


@dataclass(frozen=True)
class Mutant:
    """One small change of a file."""

    function: str  # qualified name of the definition that holds it
    diff: str  # lines that go and lines that come, without their indentation
    nth: int  # of the mutants of this function with this diff, from 1
    source: str  # the whole file as changed

    @property
    def identity(self) -> str:
        """Name of the mutant that survives changes elsewhere in the file."""
        return f"{self.function}\n{self.diff}" + f"\n# {self.nth}" * (self.nth > 1)


@dataclass
class Report:
    """Outcomes of the mutants of one file, by identity."""

    path: str
    outcomes: dict[str, str] = field(default_factory=dict)
    equivalent: set[str] = field(default_factory=set)
    cpu_s: float = 0.0

    def count(self, outcome: str) -> int:
        return sum(o == outcome for i, o in self.outcomes.items() if i not in self.equivalent)

    @property
    def score(self) -> float:
        """Share of the mutants that were killed, of those not listed as equivalent."""
        counted = len(self.outcomes) - len(self.equivalent)
        return (self.count("killed") + self.count("timed out")) / counted if counted else 1.0


# Mutants


class _Changes(cst.CSTVisitor):
    """Collects each node that an operator changes, with what it becomes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, cst.CSTNode, cst.CSTNode]] = []
        self._inside: list[str] = []
        self._bases: set[cst.CSTNode] = set()  # of classes
        self._raises = 0

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self._inside.append(node.name.value)
        if isinstance(node, cst.ClassDef):
            self._bases.update(node.bases)
        if isinstance(node, cst.Raise):
            self._raises += 1
        if self._is_left_out(node):
            return False
        if not self._is_plain(node):
            for kind, operator in mutation_operators:
                if isinstance(node, kind):
                    name = ".".join(self._inside) or "module"
                    self.found += [(name, node, changed) for changed in operator(node)]
        return True

    def on_leave(self, node: cst.CSTNode) -> None:
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self._inside.pop()
        if isinstance(node, cst.Raise):
            self._raises -= 1

    def _is_left_out(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Assign):  # a type alias
            return not self._inside and isinstance(node.value, cst.Subscript)
        return (
            isinstance(node, cst.Annotation | cst.Decorator)
            or node in self._bases
            or _calls(node, "cast")
        )

    def _is_plain(self, node: cst.CSTNode) -> bool:
        """Return True if a node's own mutants tell nothing; those of nodes inside it may."""
        return _calls(node, "len", "isinstance") or (
            self._raises > 0 and isinstance(node, cst.BaseString)
        )


def _calls(node: cst.CSTNode, *names: str) -> bool:
    return (
        isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value in names
    )


def mutants_of(source: str) -> list[Mutant]:
    """Every mutant of a file that compiles and differs from all others."""
    wrapper = cst.MetadataWrapper(cst.parse_module(source))
    module, positions = wrapper.module, wrapper.resolve(PositionProvider)
    begins = np.cumsum([0, *map(len, source.splitlines(keepends=True))])
    visitor = _Changes()
    module.visit(visitor)
    mutants, sources, seen = list[Mutant](), {source}, Counter[tuple[str, str]]()
    for function, node, changed in visitor.found:
        place = positions[node]
        start, stop = (begins[p.line - 1] + p.column for p in (place.start, place.end))
        if source[start:stop] == module.code_for_node(node):  # fifty times as fast
            text = source[:start] + module.code_for_node(changed) + source[stop:]
        else:
            text = module.deep_replace(node, changed).code
        if text in sources or not _compiles(text):
            continue
        sources.add(text)
        lines = difflib.unified_diff(source.splitlines(), text.splitlines(), n=0, lineterm="")
        diff = "\n".join(
            f"{line[0]} {line[1:].strip()}" for line in list(lines)[2:] if line[0] in "+-"
        )
        seen[function, diff] += 1
        mutants.append(Mutant(function, diff, seen[function, diff], text))
    return mutants


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True


# One run of the tests, in a process of its own


class _Changed(importlib.machinery.SourceFileLoader):
    """Loads a module from changed text."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._source, self.path, "exec", dont_inherit=True)


class _Finder:
    """Finds the changed module before the real one is looked for."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self._name, self._path, self._source = name, str(path), source

    def find_spec(
        self, name: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        loader = _Changed(name, self._path, self._source)
        return importlib.util.spec_from_file_location(name, self._path, loader=loader)


class _Runner:
    """Orders the tests, stops one that takes far longer than usual, and ends with a failure."""

    def __init__(self, ranks: dict[str, float], usual_s: dict[str, float], write: int) -> None:
        self._ranks, self._usual_s, self._write = ranks, usual_s, write
        self._took_s: dict[str, float] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.name not in LEFT_OUT]
        items.sort(key=lambda item: self._ranks.get(item.nodeid, 0.0))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        # Processor time, so that a busy machine kills nobody; the default action ends the process.
        limit = 5 + 10 * self._usual_s.get(nodeid, 1.0) if self._usual_s else 600.0
        signal.setitimer(signal.ITIMER_VIRTUAL, limit)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
            self.tell(killer=item.nodeid)
            os._exit(1)  # nobody reads a report
        self._took_s[item.nodeid] = self._took_s.get(item.nodeid, 0.0) + call.duration

    def pytest_sessionfinish(self) -> None:
        if not self._usual_s:
            self.tell(took_s=self._took_s)

    def tell(self, **saw: object) -> None:
        """Tell the process that reads."""
        os.write(self._write, json.dumps(saw).encode())


@dataclass
class Job:
    """The tests of one file, and what is known of them."""

    module: str
    path: Path
    tests: list[str]
    usual_s: dict[str, float] = field(default_factory=dict)
    kills: Counter[str] = field(default_factory=Counter)

    def launch(self, source: str, first: Sequence[str] = ()) -> tuple[int, int]:
        """Run the tests on changed text; returns the process and where it writes what it saw."""
        read, write = os.pipe()
        if process := os.fork():
            os.close(write)
            return process, read
        code = 70
        try:
            os.close(read)
            code = self._run(source, first, write)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _run(self, source: str, first: Sequence[str], write: int) -> int:
        if "SHOW" not in os.environ:
            silent = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(silent, stream)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_DATA, (3 * 2**30, 3 * 2**30))
        signal.setitimer(signal.ITIMER_VIRTUAL, 60)
        signal.alarm(900)
        sys.meta_path.insert(0, _Finder(self.module, self.path, source))
        ranks = {test: seconds - 1e6 * self.kills[test] for test, seconds in self.usual_s.items()}
        ranks |= {test: -1e12 for test in first if test in ranks}
        runner = _Runner(ranks, self.usual_s, write)
        options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
        return int(pytest.main([*options, *self.tests], plugins=[runner]))


def wait_for_one() -> tuple[int, str, float]:
    """The next process that ends: its id, its outcome, and the processor time that it took."""
    process, status, usage = os.wait3(0)
    cpu_s = usage.ru_utime + usage.ru_stime
    if os.WIFSIGNALED(status):
        stopped = os.WTERMSIG(status) in (signal.SIGVTALRM, signal.SIGALRM)
        return process, "timed out" if stopped else "killed", cpu_s
    if os.WEXITSTATUS(status) in (70, int(pytest.ExitCode.INTERNAL_ERROR)):
        sys.exit("a run of the tests broke down; SHOW=1 shows why")
    return process, "survived" if os.WEXITSTATUS(status) == 0 else "killed", cpu_s


def read_all(descriptor: int) -> dict[str, Any]:
    """Return what a process wrote before it ended; nothing if it was stopped."""
    with os.fdopen(descriptor, "rb") as stream:
        content = stream.read()
    return json.loads(content) if content else {}


# All mutants of a file


def learn_usual_times(job: Job) -> None:
    """Run the tests on the file as it is.

    Raises:
        SystemExit: a test fails without any mutant.
    """
    _, read = job.launch(job.path.read_text())
    saw = read_all(read)
    _, outcome, _ = wait_for_one()
    if outcome != "survived" or not saw.get("took_s"):
        sys.exit(f"{job.path}: tests fail on the file as it is ({saw.get('killer')})")
    job.usual_s = saw["took_s"]


def run_mutants(
    job: Job, mutants: Sequence[Mutant], jobs: int, report: Report
) -> Iterator[tuple[Mutant, str]]:
    """Each mutant with its outcome, as they come."""
    killers: dict[str, list[str]] = {}  # by function, the latest first
    running: dict[int, tuple[Mutant, int]] = {}
    todo = list(reversed(mutants))
    while todo or running:
        while todo and len(running) < jobs:
            mutant = todo.pop()
            process, read = job.launch(mutant.source, killers.get(mutant.function, ())[:3])
            running[process] = mutant, read
        process, outcome, cpu_s = wait_for_one()
        mutant, read = running.pop(process)
        saw = read_all(read)
        report.cpu_s += cpu_s
        if killer := saw.get("killer"):
            job.kills[killer] += 1
            known = killers.setdefault(mutant.function, [])
            killers[mutant.function] = [killer, *(k for k in known if k != killer)]
        yield mutant, outcome


def digest_of(files: Sequence[Path]) -> str:
    """Return the digest of everything that an outcome depends on."""
    code = sorted([*(ROOT / "batchbench").rglob("*.py"), *files, Path(__file__)])
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in code)).hexdigest()


def test_file(name: str, folder: str, names: Sequence[str], args: argparse.Namespace) -> Report:
    """Run all mutants of one file, or those that are left."""
    path = ROOT / folder / f"{name}.py"
    relative = str(path.relative_to(ROOT))
    tests = [next((ROOT / "tests").rglob(f"test_{n}.py")) for n in names]
    digest = digest_of(
        [*tests, *(ROOT / "tests").glob("support/*.py"), ROOT / "tests" / "conftest.py"]
    )
    kept = KEPT / f"{name}.json"
    before = json.loads(kept.read_text()) if kept.exists() else {"digest": "", "outcomes": {}}
    mutants = mutants_of(path.read_text())
    report = Report(relative)
    if before["digest"] == digest and not args.survivors:
        report.outcomes, report.cpu_s = before["outcomes"], before["cpu_s"]
    elif args.survivors:
        digest = ""  # a later run without this option begins anew
        report.outcomes = {i: o for i, o in before["outcomes"].items() if o != "survived"}
    exists = {mutant.identity for mutant in mutants}
    report.outcomes = {i: o for i, o in report.outcomes.items() if i in exists}
    left = [mutant for mutant in mutants if mutant.identity not in report.outcomes]
    if left:
        job = Job(relative.removesuffix(".py").replace("/", "."), path, list(map(str, tests)))
        learn_usual_times(job)
        for done, (mutant, outcome) in enumerate(run_mutants(job, left, args.jobs, report), 1):
            report.outcomes[mutant.identity] = outcome
            if done % 20 == 0 or done == len(left):
                KEPT.mkdir(exist_ok=True)
                state = {"digest": digest, "outcomes": report.outcomes, "cpu_s": report.cpu_s}
                kept.write_text(json.dumps(state))
                print(f"\r{relative}: {done} of {len(left)}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    order = [mutant.identity for mutant in mutants]
    report.outcomes = dict(sorted(report.outcomes.items(), key=lambda row: order.index(row[0])))
    return report


# The list of equivalent mutants, and what is printed and kept


def read_equivalent() -> dict[str, dict[str, str]]:
    """Return the listed mutants of each file by identity, with the reason."""
    listed: dict[str, dict[str, str]] = {}
    for row in tomllib.loads(EQUIVALENT.read_text()).get("equivalent", []):
        for diff in row["diffs"]:
            identity = f"{row['function']}\n{diff.strip()}"
            listed.setdefault(row["file"], {})[identity] = row["reason"]
    return listed


def faults_of(report: Report, listed: dict[str, str]) -> list[str]:
    """Mark the mutants that are listed as equivalent; returns what is wrong with the list."""
    faults = []
    for identity in listed:
        outcome = report.outcomes.get(identity)
        if outcome == "survived":
            report.equivalent.add(identity)
        else:
            state = "no longer exists" if outcome is None else f"was {outcome}"
            faults.append(f"{report.path}: listed as equivalent, but {state}:\n{identity}")
    return faults


def table(reports: Sequence[Report]) -> str:
    """A row a file, in Markdown."""
    rows = [
        "| file | mutants | killed | timed out | survived | equivalent | score |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    total = Report("all")
    for report in reports:
        total.outcomes |= {f"{report.path}\n{i}": o for i, o in report.outcomes.items()}
        total.equivalent |= {f"{report.path}\n{i}" for i in report.equivalent}
    for report in (*reports, total):
        counts = [report.count(outcome) for outcome in ("killed", "timed out", "survived")]
        cells = [len(report.outcomes), *counts, len(report.equivalent), f"{report.score:.1%}"]
        rows.append(f"| {report.path} | {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def write_result(reports: Sequence[Report], wall_s: float) -> None:
    """Keep the table and every survivor."""
    files = {
        report.path: {
            "mutants": len(report.outcomes),
            "killed": report.count("killed"),
            "timed_out": report.count("timed out"),
            "survived": report.count("survived"),
            "equivalent": len(report.equivalent),
            "score": round(report.score, 4),
            "cpu_s": round(report.cpu_s),
            "survivors": [
                identity
                for identity, outcome in report.outcomes.items()
                if outcome == "survived" and identity not in report.equivalent
            ],
        }
        for report in reports
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    result = {"command": "python benchmarks/mutation.py", "wall_s": round(wall_s), "files": files}
    RESULT.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run mutants of the core files.")
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    parser.add_argument(
        "--survivors", action="store_true", help="run only mutants that no test killed last time"
    )
    args = parser.parse_args()
    if unknown := set(args.files) - set(SUBJECTS):
        parser.error(f"no such file: {', '.join(sorted(unknown))}")
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    for name in PRELOADED:
        importlib.import_module(name)
    settings.register_profile(
        "mutation",
        phases=(Phase.explicit, Phase.generate),  # a counter-example need not be a small one
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    settings.load_profile("mutation")
    gc.freeze()
    began, listed = time.monotonic(), read_equivalent()
    reports, faults = [], []
    for name in args.files or SUBJECTS:
        report = test_file(name, *SUBJECTS[name], args)
        faults += faults_of(report, listed.get(report.path, {}))
        for identity, outcome in report.outcomes.items():
            if outcome == "survived" and identity not in report.equivalent:
                print(f"{report.path}: survived in {identity}\n")
        reports.append(report)
    print(table(reports))
    if not args.files and not args.survivors:
        write_result(reports, time.monotonic() - began)
    print("\n".join(faults), file=sys.stderr)
    return int(bool(faults) or any(report.score < GOAL for report in reports))


if __name__ == "__main__":
    sys.exit(main())
