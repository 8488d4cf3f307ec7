"""The Python interface: keywords in, results out; and the documents about it."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from support.documents import ROOT, fenced

import batchbench
from batchbench.api import _typed
from batchbench.batching.experiment import PARTS, Experiment
from batchbench.batching.presets import Basis
from batchbench.reports.figures import PICTURES
from batchbench.reports.slo import GoalsSpec

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def classic() -> batchbench.Result:
    """The classic workload, simulated."""
    return batchbench.simulate(batch_size=8, queue_size=32)


# Options


def test_keywords_are_the_options_of_all_specs() -> None:
    for spec in (Basis, *PARTS.values(), GoalsSpec):
        usual = {f.name: f.default for f in dataclasses.fields(spec)}
        assert _typed("run", usual) == usual


def test_options_may_be_written_as_python_has_them(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a prompt\n")
    found = _typed(
        "run",
        {
            "batch_size": np.int64(4),
            "output_tokens": 7,
            "max_wait": 3,
            "prompts": str(tmp_path / "prompts.txt"),
            "strategy": ["static-fixed", "continuous"],
            "slo": ["ttft:500"],
            "request_rate": np.float64(2.5),
            "stop_at_eos": True,
        },
    )
    assert found == {
        "batch_size": 4,
        "output_tokens": "7",
        "max_wait": 3.0,
        "prompts": tmp_path / "prompts.txt",
        "strategy": "static-fixed,continuous",
        "slo": ("ttft:500",),
        "request_rate": 2.5,
        "stop_at_eos": True,
    }
    assert type(found["batch_size"]) is int
    assert type(found["request_rate"]) is float


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batchsize": 8}, r"simulate\(\) has no option 'batchsize'; did you mean batch_size\?"),
        ({"output_token": 8}, "did you mean output_tokens"),
        ({"zzz": 8}, "has no option 'zzz'; batchbench run --help lists them"),
    ],
)
def test_a_name_that_is_no_option_is_told_the_nearest(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        batchbench.simulate(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "^batch_size=0: must be at least 1$"),
        ({"batch_size": "8"}, "^batch_size='8': must be a whole number$"),
        ({"batch_size": 8.5}, "^batch_size=8.5: must be a whole number$"),
        ({"trials": True}, "^trials=True: must be a whole number$"),
        ({"max_wait": "long"}, "^max_wait='long': must be a number$"),
        ({"stop_at_eos": 1}, "^stop_at_eos=1: must be true or false$"),
        ({"prompts": 3}, "^prompts=3: must be the name of a file or folder$"),
        ({"slo": "ttft:5"}, "^slo='ttft:5': must be a list of texts$"),
        ({"preset": "nope"}, "^preset=nope: must be one of"),
        ({"workload": "nowhere.toml"}, "^workload=nowhere.toml: no such file"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(batchbench.UsageError, match=message):
        batchbench.simulate(**options)


def test_options_come_before_the_file_and_the_file_before_the_preset(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("queue_size = 9\nseed = 5\n")
    r = batchbench.simulate(preset="burst", workload=tmp_path / "mine.toml", queue_size=12)
    config = r.data["config"]["workload"]
    expected = Experiment.of({"queue_size": 12, "seed": 5}, preset="burst", simulated=True).config()
    assert config == expected["workload"]
    assert r.data["command"].startswith("batchbench simulate --preset burst")


# Results


def test_a_simulation_from_python_is_that_of_the_command_line(classic: batchbench.Result) -> None:
    assert classic.data["command"] == "batchbench simulate --batch-size 8 --queue-size 32"
    assert classic.data["config"]["trials"]["trials"] == 1
    assert classic.summary["forward_passes"].to_dict() == {"static": 400, "continuous": 130}


def test_a_run_is_silent_and_checked(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    r = batchbench.run(
        model=checkpoint, batch_size=2, queue_size=4, long_tokens=6, short_tokens=2, trials=1
    )
    assert tuple(capfd.readouterr()) == ("", "")
    assert r.data["verification"]["passed"] is True
    assert len(r.requests) == 8
    assert r.requests["output_text"].notna().all()


def test_goals_count(classic: batchbench.Result) -> None:
    priced = batchbench.simulate(price_per_hour=3.6)
    cost = priced.summary["cost_per_million_output_tokens"]
    assert cost.to_dict() == pytest.approx({"static": 0.588235, "continuous": 0.191176}, rel=1e-5)
    assert classic.summary["cost_per_million_output_tokens"].isna().all()


def test_the_summary_has_a_row_a_strategy_of_numbers(classic: batchbench.Result) -> None:
    frame = classic.summary
    assert list(frame.index) == ["static", "continuous"]
    assert all(pd.api.types.is_numeric_dtype(dtype) for dtype in frame.dtypes)
    assert pd.api.types.is_integer_dtype(frame["forward_passes"].dtype)
    assert np.isnan(frame.loc["static", "speedup"])
    assert frame.loc["continuous", "speedup"] == classic.data["comparison"]["speedup"]["median"]
    for name, strategy in classic.data["strategies"].items():
        for key, value in {**strategy["summary"], **strategy["counters"]}.items():
            found = frame.loc[name, key]
            assert np.isnan(found) if value is None else found == value


def test_each_picture_is_a_method(classic: batchbench.Result) -> None:
    assert set(PICTURES) <= set(dir(classic.plot))
    for name in PICTURES:
        picture = getattr(classic.plot, name)
        assert picture.__doc__ == PICTURES[name].__doc__
        figure = picture()
        assert isinstance(figure, Figure)
        assert figure.axes
    assert figure._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(AttributeError, match="there is no picture pie; there are throughput"):
        _ = classic.plot.pie


def test_what_is_saved_is_loaded(classic: batchbench.Result, tmp_path: Path) -> None:
    folder = classic.save(tmp_path / "mine")
    assert folder == tmp_path / "mine"
    assert batchbench.load(str(folder)).data == classic.data
    with pytest.raises(batchbench.UsageError, match=r": holds a result; .* overwrite=True$"):
        classic.save(folder)
    assert classic.save(str(folder), overwrite=True) == folder


def test_a_result_shows_itself(classic: batchbench.Result) -> None:
    assert repr(classic) == (
        "<batchbench result: gpt2 · simulated · 8 slots · 32 requests: in simulation, where every "
        "step costs the same, continuous batching was 3.08× as fast as static batching; run valid.>"
    )
    html = re.sub(r">\s+<", "><", classic._repr_html_())
    assert "<td>Forward passes</td><td></td><td>400</td><td>130</td><td>0.33×</td>" in html
    assert html.count("</tr>") > 10


def test_a_name_in_a_result_is_no_markup() -> None:
    r = batchbench.simulate()
    model = {**r.data["model"], "name": "<script>"}
    html = batchbench.Result({**r.data, "model": model}, r.recordings)._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_importing_it_and_asking_for_run_costs_nothing_that_is_not_used() -> None:
    script = """
import sys, batchbench
assert not {"numpy", "torch", "pandas", "matplotlib"} & set(sys.modules)
r = batchbench.simulate()
repr(r)
assert not {"torch", "transformers", "pandas", "matplotlib"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# The documents


def test_the_api_page_documents_every_public_name_once() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    told = re.findall(r"^<!-- generated: ([A-Z]?\w+) -->$", page, re.MULTILINE)
    assert sorted(told) == sorted({*batchbench.__all__, "pictures"} - {"__version__"})


def test_the_code_of_the_python_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = fenced(DOCS / "python.md", "python")
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "python.md", "exec"), names)
    assert {file.name for file in tmp_path.iterdir()} == {"timeline.svg", "my-run"}


Cell = dict[str, Any]


def cells() -> Iterator[Cell]:
    """The notebook's cells of code."""
    notebook = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))
    yield from (cell for cell in notebook["cells"] if cell["cell_type"] == "code")


def value_of(source: str, names: dict[str, Any]) -> Any:
    """Return the value of the last line of a cell, which is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop()
    assert isinstance(last, ast.Expr)
    exec(compile(tree, "tour.ipynb", "exec"), names)
    return eval(compile(ast.Expression(last.value), "tour.ipynb", "eval"), names)


def test_the_notebook_was_run_and_says_the_same_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells(), 1):
        assert cell["execution_count"] == number
        (output,) = cell["outputs"]
        shown = "".join(output["data"]["text/plain"])
        out = io.StringIO()
        # A smaller model says the same where it matters: its schedules.
        source = "".join(cell["source"]).replace("toy-gpt2", str(checkpoint))
        wide = pd.option_context("display.width", 80, "display.max_columns", 20)
        with wide, contextlib.redirect_stdout(out):
            found = repr(value_of(source, names))
        assert out.getvalue() == ""
        if "measured" in cell["metadata"]["tags"]:
            found, shown = (re.sub(r":.*|size.*", "", text) for text in (found, shown))
        assert found.split() == shown.split()
