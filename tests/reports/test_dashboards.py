"""Results for dashboards: what github-action-benchmark, Bencher and pytest-benchmark read."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft7Validator
from pytest_benchmark.stats import Stats
from support.laws import law
from support.program import Program
from support.program import here as here
from support.program import program as program
from support.results import clean, paced, result_of, simulated

from batchbench.cli.options import DOCUMENTS, ReportSpec
from batchbench.reports.formats import dashboards as pytest_benchmark
from batchbench.reports.formats.dashboards import Measure, measures
from batchbench.reports.output import make_document
from batchbench.reports.result import Result

JSON_FORMATS = ("github-bigger", "github-smaller", "bencher", "pytest-benchmark")


def document(format: str, *results: Result) -> Any:
    """Return the document of results that are called r0, r1, …"""
    folders = [Path(f"r{i}") for i in range(len(results))]
    return json.loads(make_document(format, folders, results, None))


def scattered() -> Result:
    """Return a result whose trials differ."""
    static, continuous = (paced(n, 10, 11, 10.5, 12) for n in ("static", "continuous"))
    return result_of({"static": static, "continuous": continuous})


# The figures


@pytest.mark.parametrize("result", [clean(), scattered(), simulated()])
def test_figures_are_numbers_and_lie_in_their_range(result: Result) -> None:
    found = measures(result)
    assert len({(each.strategy, each.metric) for each in found}) == len(found)
    for each in found:
        assert math.isfinite(each.value)
        if each.low is not None and each.high is not None:
            assert each.low <= each.value <= each.high


def test_a_figure_is_that_of_the_result() -> None:
    result = scattered()
    found = {(each.strategy, each.metric): each for each in measures(result)}
    strategy = result.data["strategies"]["continuous"]
    trials = [trial["output_throughput"] for trial in strategy["trials"]]
    throughput = found["continuous", "output_throughput"]
    assert throughput.value == strategy["summary"]["output_throughput"]
    assert (throughput.low, throughput.high) == (min(trials), max(trials))
    assert throughput.higher_is_better
    passes = strategy["counters"]["forward_passes"]
    counted = Measure("continuous", "forward_passes", "passes", False, passes)
    assert found["continuous", "forward_passes"] == counted
    speedup = result.data["comparison"]["speedup"]
    ratio = found["continuous", "speedup"]
    assert [ratio.value, ratio.low, ratio.high] == [speedup["median"], *speedup["ci95"]]


# github-action-benchmark

# As the action reads a range: a number of two characters or more behind ± or +-.
RANGE = re.compile(r"(\+-|±)\s*(?P<value>\d.+)")


@pytest.mark.parametrize("format", ["github-bigger", "github-smaller"])
def test_github_action_benchmark_gets_what_it_asks_for(format: str) -> None:
    entries = document(format, scattered())
    assert entries
    for entry in entries:
        assert {"name", "unit", "value"} <= entry.keys() <= {*entry, "range", "extra"}
        assert isinstance(entry["name"], str)
        assert isinstance(entry["unit"], str)
        assert isinstance(entry["value"], int | float)
        if "range" in entry:
            found = RANGE.fullmatch(entry["range"])
            assert found is not None
            assert float(found["value"]) >= 0
        assert "run valid" in entry["extra"]
    assert len({entry["name"] for entry in entries}) == len(entries)
    ranged = [entry["name"] for entry in entries if "range" in entry]
    assert ranged


def test_what_is_better_is_in_the_file_that_says_so() -> None:
    names = {
        format: {entry["name"] for entry in document(format, clean())}
        for format in ("github-bigger", "github-smaller")
    }
    assert "continuous.output_throughput" in names["github-bigger"]
    assert "continuous.speedup" in names["github-bigger"]
    assert {"static.duration", "continuous.forward_passes"} <= names["github-smaller"]
    assert not names["github-bigger"] & names["github-smaller"]


def test_a_curve_keeps_its_name_from_commit_to_commit() -> None:
    """The folder of a run holds the time of day: it is in a name only to tell several apart."""
    alone = document("github-bigger", clean())
    assert not any("r0" in entry["name"] for entry in alone)
    together = document("github-bigger", clean(), clean())
    assert {entry["name"].split("/")[0] for entry in together} == {"r0", "r1"}


# Bencher

# The schema that bencher.dev publishes for its metric format says no more than this.
METRIC = {
    "type": "object",
    "properties": {name: {"type": "number"} for name in ("value", "lower_value", "upper_value")},
    "required": ["value"],
    "additionalProperties": False,
}
BMF = {
    "type": "object",
    "minProperties": 1,
    "additionalProperties": {
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"pattern": "^[a-z0-9]+(-[a-z0-9]+)*$", "maxLength": 64},  # slugs
        "additionalProperties": METRIC,
    },
}


@pytest.mark.parametrize("results", [[clean()], [scattered(), simulated()]])
def test_bencher_metric_format(results: list[Result]) -> None:
    found = document("bencher", *results)
    Draft7Validator(BMF).validate(found)
    assert len(found) == sum(len(result.names) for result in results)
    for measures_of in found.values():
        for metric in measures_of.values():
            if "lower_value" in metric:
                assert metric["lower_value"] <= metric["value"] <= metric["upper_value"]


# pytest-benchmark


def compare(*words: str, folder: Path) -> str:
    """Return the output of the real command, which must have loaded every file."""
    code = "import sys; from pytest_benchmark.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "compare", *words],
        capture_output=True,
        encoding="utf-8",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "Failed to load" not in done.stderr + done.stdout
    return done.stdout


def test_pytest_benchmark_compares_our_files(tmp_path: Path) -> None:
    results = {"before.json": clean(), "after.json": scattered()}
    for name, result in results.items():
        text = make_document("pytest-benchmark", [Path("r")], [result], None)
        (tmp_path / name).write_text(text)
    said = compare(*results, "--csv=table.csv", "--sort=name", folder=tmp_path)
    assert clean().title in said
    with (tmp_path / "table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    durations = {
        trial["duration"]
        for result in results.values()
        for name in result.names
        for trial in result.data["strategies"][name]["trials"]
    }
    assert {float(row["min"]) for row in rows} <= durations
    assert {int(row["rounds"]) for row in rows} == {
        len(result.recordings["static"]) for result in results.values()
    }


def test_pytest_benchmark_gets_the_parts_that_it_writes_itself() -> None:
    found = document("pytest-benchmark", clean(), scattered())
    assert found.keys() == {"machine_info", "commit_info", "benchmarks", "datetime", "version"}
    names = [each["fullname"] for each in found["benchmarks"]]
    assert len(set(names)) == 4
    for each in found["benchmarks"]:
        assert each["stats"].keys() == {*Stats.fields, "data", "iterations"}
        assert each["stats"]["rounds"] == len(each["stats"]["data"])


@law
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12))
def test_statistics_are_those_of_pytest_benchmark(durations: list[float]) -> None:
    import numpy as np

    theirs = Stats()
    theirs.data = durations
    ours = pytest_benchmark._stats(np.array(durations))
    for name in set(Stats.fields) - {"outliers", "stddev_outliers", "iqr_outliers", "hd15iqr"}:
        # A spread of values that are all but equal is rounding.
        near = pytest.approx(getattr(theirs, name), rel=1e-9, abs=1e-9 * max(durations))
        assert ours[name] == near, name


# The command


@pytest.mark.parametrize("format", JSON_FORMATS)
def test_report_writes_them(format: str, program: Program, here: Path) -> None:
    made = program("simulate", "--batch-size", "2", "--queue-size", "4", "--output", "r", "--quiet")
    assert made.code == 0, made.err
    said = program("report", "r", "--format", format)
    assert (said.code, said.out) == (0, f"File: r/{DOCUMENTS[format]}\n")
    written = (here / "r" / DOCUMENTS[format]).read_text(encoding="utf-8")
    assert program("report", "r", "--format", format, "--output", "-").out == written
    assert json.loads(written)


def test_every_format_has_a_file() -> None:
    choices = ReportSpec.__dataclass_fields__["format"].metadata["batchbench"].choices
    assert set(choices) == {"terminal", "json", *DOCUMENTS}
    assert set(DOCUMENTS) == {"html", "markdown", "llmd", *JSON_FORMATS}
