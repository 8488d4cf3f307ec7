"""Engines of other packages as strategies: found, imported only when named, blamed by name."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from support.documents import ROOT, fenced

from batchbench.batching.experiment import Experiment
from batchbench.batching.progress import Watch
from batchbench.batching.session import conduct
from batchbench.batching.strategies import OURS, find, listing, registered
from batchbench.errors import UsageError
from batchbench.reports.result import load_result
from batchbench.studies.gate.spec import timed_strategies

NUMBERS = count()
"""Each test has a package of its own, lest one find another's in Python's cache."""

Install = Callable[..., str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a package with an entry point, and return the name of the strategy."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(source: str, attribute: str = "make", name: str = "", package: str = "") -> str:
        module = f"plugged_{next(NUMBERS)}"
        name, package = name or module, package or module
        (tmp_path / f"{module}.py").write_text(source)
        put_metadata(tmp_path, package, {name: f"{module}:{attribute}"})
        return name

    return install


def put_metadata(folder: Path, package: str, entries: dict[str, str]) -> None:
    """Write the metadata that an installer writes."""
    about = folder / f"{package.replace('-', '_')}-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (about / "entry_points.txt").write_text("\n".join(["[batchbench.strategies]", *lines]))


ECHO = """
from batchbench.batching.recording import Recording

class Echo:
    def __init__(self, context):
        self.context, self.name = context, context.name

    def serve(self, workload, watch, *, trial=0):
        tokens = [[7] * n for n in workload.output_tokens.tolist()]
        ends = [[1000 + i for i in range(len(t))] for t in tokens]
        return Recording.of_tokens(
            self.context.header(workload, trial, slots_seen=self.context.slots),
            workload, tokens, ends, [0] * len(tokens),
        )

make = Echo
"""


def ask(checkpoint: Path, strategy: str, **options: object) -> Experiment:
    small = {"queue_size": 4, "batch_size": 2, "long_tokens": 4, "short_tokens": 2, "trials": 1}
    given = {"model": str(checkpoint), "verify": "none", "strategy": strategy}
    return Experiment.of(small, given, options)


def test_a_plug_in_is_imported_only_when_it_is_named(install: Install) -> None:
    name = install("raise SystemExit('imported')")
    assert find(name).package == f"{name} 1.2"
    assert any(line.split() == [name, "from", "the", "package", name, "1.2"] for line in listing())
    assert name not in sys.modules
    Experiment.of({"strategy": f"static,{name}"})
    assert name not in sys.modules


def test_a_plug_in_serves_beside_ours(install: Install, checkpoint: Path) -> None:
    name = install(ECHO)
    outcome = conduct(ask(checkpoint, f"continuous,{name}"), Watch())
    recording = outcome.recordings[name][0]
    assert recording.header.about["slots_seen"] == 2
    assert set(recording.tokens_of(0).tolist()) == {7}
    assert outcome.recordings["continuous"][0].has_steps
    assert not recording.has_steps


MAKES = "def make(context):\n    "
SERVES = f"""{MAKES}return S()
class S:
    name = "x"
    def serve(self, workload, watch, *, trial=0):
        """


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import nothing_of_this_name", "cannot be made: ModuleNotFoundError: No module named"),
        ("raise SystemExit(3)", "cannot be made: SystemExit: 3"),
        ("1 +", "cannot be made: SyntaxError: invalid syntax"),
        ("", "cannot be made: AttributeError: module 'plugged_"),
        ("make = 3", "cannot be made: TypeError: 'int' object is not callable"),
        (f"{MAKES}raise ValueError('no\\nGPU')", "cannot be made: ValueError: no GPU"),
        (f"{MAKES}assert not context", "cannot be made: AssertionError: no reason given"),
        (f"{MAKES}return 3", "made a int: a strategy has a method serve(workload, watch)"),
        (f"{SERVES}raise OSError('disk')", "failed while serving: OSError: disk"),
        (f"{SERVES}return None", "returned a NoneType: serve must return Recording.of_tokens(…)"),
    ],
)
def test_a_broken_plug_in_is_one_line_that_names_its_package(
    install: Install, checkpoint: Path, source: str, says: str
) -> None:
    name = install(source, package="some-engine")
    with pytest.raises(UsageError) as raised:
        conduct(ask(checkpoint, name), Watch())
    line = str(raised.value)
    assert line.startswith(f"--strategy {name}: the package some-engine 1.2 {says}")
    if "disk" in says:
        assert line.endswith(f": OSError: disk ({name}.py, line 6)")
    assert "\n" not in line


def test_a_recording_of_other_requests_is_refused(install: Install, checkpoint: Path) -> None:
    short = ECHO.replace("def serve(self, workload, watch, *, trial=0):", SHORT)
    name = install(short)
    with pytest.raises(UsageError, match=r"returned a recording of 1 requests: the workload has"):
        conduct(ask(checkpoint, name), Watch())


SHORT = """def serve(self, workload, watch, *, trial=0):
        from batchbench.workloads import Workload
        workload = Workload.of('one', [[1]], [1])"""


def test_two_packages_with_one_name(install: Install) -> None:
    install("", name="twin", package="aaa")
    install("", name="twin", package="bbb")
    with pytest.raises(UsageError, match=r"--strategy twin: aaa 1\.2 and bbb 1\.2 both have"):
        Experiment.of({"strategy": "twin"})


def test_no_package_replaces_a_strategy_of_ours(install: Install) -> None:
    for name in ("static", *OURS):
        install("", name=name, package=f"other-{name.replace('_', '-')}")
    assert registered() == []
    assert find("generate_batch").package == "batchbench"
    assert Experiment.of({"strategy": "static"}).serving.plug_ins == ()


def test_ours_are_found_without_metadata_and_are_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: [])
    for name, plug_in in OURS.items():
        assert find(name) is plug_in
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["batchbench.strategies"] == {
        name: plug_in.target for name, plug_in in OURS.items()
    }


def test_a_plug_in_is_refused_where_steps_are_needed(
    install: Install, refused: Callable[..., str]
) -> None:
    name = install(ECHO)
    assert "it schedules by itself" in refused("simulate", "--strategy", name)
    with pytest.raises(UsageError, match=f"--strategy {name}: schedules by itself and cannot take"):
        timed_strategies(Experiment.of({"strategy": name}), None)


def test_unknown_names_are_refused_with_the_nearest(refused: Callable[..., str]) -> None:
    line = refused("run", "--strategy", "contnuous")
    assert "no such strategy; did you mean continuous? --strategy help lists all" in line


def test_help_lists_the_strategies(
    install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from batchbench.cli.main import run_command

    name = install("raise SystemExit('imported')")
    for words in (["run", "--strategy", "help"], ["sweep", "-n", "4", "--strategy=help"]):
        monkeypatch.setattr(sys, "argv", ["batchbench", *words])
        assert run_command() == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split()[0] == "static"
        assert any(line.startswith(f"{name} ") for line in lines)
        assert max(map(len, lines)) <= 80


def test_the_engine_of_the_page_runs(tmp_path: Path) -> None:
    page = ROOT / "docs" / "bring-your-own-engine.md"
    (code,) = fenced(page, "python")
    (project,) = (tomllib.loads(block) for block in fenced(page, "toml"))
    (command,) = fenced(page, "console")
    (file,) = set(re.findall(r"`(\w+\.py)`", page.read_text(encoding="utf-8")))
    (tmp_path / file).write_text(code, encoding="utf-8")
    entries = project["project"]["entry-points"]["batchbench.strategies"]
    put_metadata(tmp_path, project["project"]["name"], entries)
    words = [
        *command.split()[2:],
        "--queue-size",
        "8",
        "--trials",
        "1",
        "--quiet",
        "--output",
        "out",
    ]
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    script += f"sys.argv = {['batchbench', *words]!r}\n"
    script += "from batchbench.__main__ import main\nsys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    result = load_result(tmp_path / "out")
    assert result.names[0] in entries
    assert result.data["verification"]["passed"]
    assert result.data["verification"]["requests_checked"] == 8
    assert not result.recordings[result.names[0]][0].has_steps
