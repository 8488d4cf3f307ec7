"""Files of other tools: what they hold is read in our units, and nothing is made up.

The files in ``peers/`` were written by vLLM 0.32, guidellm 0.8.1 and aiperf 0.13, which sent eight
requests to a server of this machine, and by llm-d-benchmark's converter of August 2026.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.program import Program, here, program
from support.results import clean, of_one_token, over_time, simulated

from batchbench.errors import UsageError
from batchbench.json_file import parse_json
from batchbench.reports.peers import read_peer
from batchbench.reports.peers.llmd import read_llmd, write_llmd
from batchbench.reports.peers.values import (
    LATENCIES,
    STATISTICS,
    PeerFile,
    PeerRun,
    make_run,
    of_result,
)
from batchbench.reports.result import Result
from batchbench.reports.result_file import METRICS

__all__ = ["here", "program"]

SAMPLES = Path(__file__).parent / "peers"
FILES = sorted(SAMPLES.iterdir())


def loaded(name: str) -> Any:
    return json.loads((SAMPLES / name).read_text(encoding="utf-8"))


def read(path: Path) -> PeerFile:
    found = read_peer(path)
    assert found is not None
    return found


def run_of(name: str) -> PeerRun:
    (run,) = read(SAMPLES / name).runs
    return run


def near(value: float | None) -> Any:
    return None if value is None else pytest.approx(value, rel=1e-9)


def changed(tmp_path: Path, name: str, change: Callable[[Any], object]) -> Path:
    """Return a copy of a sample after a change of its content."""
    data = loaded(name)
    change(data)
    copy = tmp_path / name
    copy.write_text(json.dumps(data), encoding="utf-8")
    return copy


# The values of each tool


def test_single_requests_of_vllm_give_the_statistics_that_it_states() -> None:
    stated, run = loaded("vllm-detailed.json"), run_of("vllm-detailed.json")
    assert set(run.latencies) == set(LATENCIES)
    for latency in LATENCIES:
        for statistic in ("mean", "median", "std", "p90", "p99"):
            name = f"{statistic}_{latency}_ms"
            assert run.summary[name] == pytest.approx(stated[name], rel=1e-12)
    assert (run.concurrency, run.rate, run.failed, run.requests) == (4, None, 0, 8)


def test_a_summary_of_vllm_is_taken_as_it_is() -> None:
    stated, run = loaded("vllm-summary.json"), run_of("vllm-summary.json")
    assert set(run.latencies) == {"e2el"}
    for latency in ("ttft", "tpot", "itl"):
        assert run.summary[f"p99_{latency}_ms"] == stated[f"p99_{latency}_ms"]
        assert run.summary[f"p99.9_{latency}_ms"] is None


def test_a_load_without_a_limit_has_a_name(tmp_path: Path) -> None:
    unlimited = changed(tmp_path, "vllm-summary.json", lambda d: d.update(max_concurrency=None))
    assert [run.name for run in read(unlimited).runs] == ["unlimited"]
    rated = changed(tmp_path, "vllm-summary.json", lambda d: d.update(request_rate=2.5))
    assert [run.name for run in read(rated).runs] == ["rate=2.5,concurrency=4"]


def test_failed_requests_of_vllm_have_no_latencies(tmp_path: Path) -> None:
    def fail(data: Any) -> None:
        data["errors"][2], data["completed"] = "connection refused", 7
        data["ttfts"][2] = data["latencies"][2] = data["output_lens"][2] = 0
        data["itls"][2] = []

    (run,) = read(changed(tmp_path, "vllm-detailed.json", fail)).runs
    data = loaded("vllm-detailed.json")
    left = [1e3 * value for i, value in enumerate(data["ttfts"]) if i != 2]
    assert run.failed == 1
    assert run.summary["mean_ttft_ms"] == pytest.approx(np.mean(left))
    assert {key: part.count for key, part in run.latencies.items()} == {
        **dict.fromkeys(("ttft", "tpot", "e2el"), 7),
        "itl": 42,
    }


def test_tpot_of_guidellm_is_what_it_calls_inter_token_latency() -> None:
    requests = loaded("guidellm.json")["benchmarks"][0]["requests"]["successful"]
    metrics = loaded("guidellm.json")["benchmarks"][0]["metrics"]
    run = run_of("guidellm.json")
    tpot = [request["inter_token_latency_ms"] for request in requests]
    assert run.summary["mean_tpot_ms"] == pytest.approx(np.mean(tpot))
    seconds = [request["request_latency"] for request in requests]
    assert run.summary["p90_e2el_ms"] == pytest.approx(1e3 * np.percentile(seconds, 90))
    mean = metrics["inter_token_latency_ms"]["successful"]["mean"]
    assert run.summary["mean_itl_ms"] == mean
    assert all(run.summary[f"{name}_itl_ms"] is None for name in STATISTICS if name != "mean")


def test_a_sample_of_the_requests_of_guidellm_is_not_taken_for_all(tmp_path: Path) -> None:
    def sample(data: Any) -> None:
        del data["benchmarks"][0]["requests"]["successful"][3:]

    (run,) = read(changed(tmp_path, "guidellm.json", sample)).runs
    stated = loaded("guidellm.json")["benchmarks"][0]["metrics"]["time_to_first_token_ms"]
    assert run.latencies == {}
    assert run.summary["p99_ttft_ms"] == stated["successful"]["percentiles"]["p99"]
    assert run.summary["median_tpot_ms"] is None


def test_each_benchmark_of_guidellm_is_a_run(tmp_path: Path) -> None:
    def twice(data: Any) -> None:
        other = json.loads(json.dumps(data["benchmarks"][0]))
        other["config"]["strategy"] = {"type_": "constant", "rate": 2.5}
        data["benchmarks"].append(other)

    runs = read(changed(tmp_path, "guidellm.json", twice)).runs
    assert [run.name for run in runs] == ["concurrency=4", "rate=2.5"]


def test_records_of_aiperf_give_the_latencies_of_its_summary() -> None:
    single, whole = run_of("aiperf.jsonl"), run_of("aiperf.json")
    assert whole.latencies == {}
    for latency in LATENCIES:
        for statistic in ("mean", "median", "std", "p90", "p99"):
            name = f"{statistic}_{latency}_ms"
            assert single.summary[name] == pytest.approx(whole.summary[name], rel=1e-9)
    for name in ("completed", "total_input_tokens", "total_output_tokens"):
        assert single.summary[name] == whole.summary[name]
    assert single.failed == whole.failed == 1
    assert (single.concurrency, whole.concurrency) == (None, 4)


@pytest.mark.parametrize(("unit", "scale"), [("sec", 1e3), ("us", 1e-3), ("ns", 1e-6)])
def test_units_of_aiperf_are_read(tmp_path: Path, unit: str, scale: float) -> None:
    def rename(data: Any) -> None:
        data["request_latency"]["unit"] = unit

    (run,) = read(changed(tmp_path, "aiperf.json", rename)).runs
    stated = loaded("aiperf.json")["request_latency"]
    assert run.summary["p99_e2el_ms"] == pytest.approx(scale * stated["p99"])


def test_reports_of_llm_d_say_what_the_tools_say_that_it_converted() -> None:
    for converted, original in (
        ("llmd.yaml", "vllm-detailed.json"),
        ("llmd-of-aiperf.json", "aiperf.json"),
    ):
        there, here = run_of(converted).summary, run_of(original).summary
        names = [name for name in METRICS if there[name] is not None]
        assert len(names) > 10
        for name in names:
            if name != "completed":  # the converter takes aiperf's completed requests for all
                assert there[name] == near(here[name]), name


def test_a_mean_of_requests_is_no_gap_in_llm_d_s_report(tmp_path: Path) -> None:
    def of_guidellm(data: Any) -> None:
        data["scenario"]["load"]["standardized"]["tool"] = "guidellm"

    assert run_of("llmd-of-aiperf.json").summary["mean_itl_ms"] is None
    (run,) = read(changed(tmp_path, "llmd-of-aiperf.json", of_guidellm)).runs
    assert run.summary["mean_itl_ms"] is run.summary["mean_tpot_ms"] is None
    assert run.summary["mean_ttft_ms"] is not None


def test_what_no_file_holds_is_null() -> None:
    for file in FILES:
        for run in read(file).runs:
            assert run.summary.keys() == set(METRICS)
            assert run.summary["slo_attainment"] is run.summary["mean_queue_ms"] is None
            values = [value for value in run.summary.values() if value is not None]
            assert all(math.isfinite(value) for value in values)


# llm-d's report


TIME = {"enum": ["ms", "s"]}
PER_TOKEN = {"enum": ["ms/token", "s/token"]}


def statistics(units: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["units", "mean"],
        "properties": {"units": units},
        "additionalProperties": {"type": "number"},
    }


def closed(required: str = "", **properties: Any) -> dict[str, Any]:
    """Return the schema of an object that has no other names, as in llm-d's."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": properties,
    }


COUNT, TEXT = {"type": "integer", "minimum": 0}, {"type": "string"}

AGGREGATE = closed(
    requests=closed(
        "total",
        total=COUNT,
        failures=COUNT,
        input_length=statistics({"const": "count"}),
        output_length=statistics({"const": "count"}),
    ),
    latency=closed(
        time_to_first_token=statistics(TIME),
        time_per_output_token=statistics(PER_TOKEN),
        inter_token_latency=statistics(PER_TOKEN),
        request_latency=statistics(TIME),
    ),
    throughput=closed(
        request_rate=statistics({"const": "queries/s"}),
        output_token_rate=statistics({"const": "tokens/s"}),
        total_token_rate=statistics({"const": "tokens/s"}),
    ),
)

LENGTH = closed(
    "distribution value",
    distribution={"enum": ["fixed", "gaussian", "uniform", "other"]},
    value={"type": "number", "minimum": 0},
)

LOAD = closed(
    "tool tool_version source input_seq_len",
    tool=TEXT,
    tool_version=TEXT,
    source={"enum": ["random", "sampled", "unknown"]},
    input_seq_len=LENGTH,
    rate_qps={"type": "number", "exclusiveMinimum": 0},
    concurrency={"type": "integer", "minimum": 1},
)

PART = closed(
    "metadata standardized native",
    metadata=closed("label cfg_id", label=TEXT, cfg_id=TEXT),
    standardized={"type": "object", "required": ["kind", "tool", "tool_version"]},
    native={"type": "object"},
)

SCHEMA = closed(
    "version run results",
    version={"const": "0.2"},
    run=closed(
        "uid",
        uid=TEXT,
        eid=TEXT,
        time=closed(end=TEXT, duration={"pattern": "^PT[0-9.e+-]+S$"}),
        description=TEXT,
    ),
    scenario=closed(
        stack={"type": "array", "items": PART},
        load=closed(
            "metadata standardized native",
            metadata=closed(cfg_id=TEXT, description=TEXT),
            standardized=LOAD,
            native=closed(),
        ),
    ),
    results=closed(request_performance=closed("aggregate", aggregate=AGGREGATE)),
)

HELD = [
    *("duration", "completed", "total_input_tokens", "total_output_tokens"),
    *("request_throughput", "output_throughput", "total_token_throughput"),
    *(f"{statistic}_{latency}_ms" for latency in LATENCIES for statistic in STATISTICS),
]
"""Metrics that the schema has."""


def again(file: PeerFile, run: PeerRun) -> PeerFile:
    """Return what is read from the report of a run, after a check of its form."""
    report = json.loads(write_llmd(file, run))
    jsonschema.validate(report, SCHEMA)
    return read_llmd(parse_json(json.dumps(report).encode()))


times = st.lists(st.floats(1e-6, 1e9), max_size=8).map(np.array)
amounts = st.none() | st.integers(0, 10**9)
rates = st.none() | st.floats(1e-6, 1e9)


@given(
    completed=st.integers(1, 10**6),
    failed=st.integers(0, 10**6),
    tokens=st.tuples(st.integers(0, 10**9), amounts),
    seconds=rates,
    throughput=rates,
    latencies=st.fixed_dictionaries({}, optional=dict.fromkeys(LATENCIES, times)),
    concurrency=st.none() | st.integers(1, 10**6),
    rate=rates,
)
def test_what_is_written_as_llm_d_is_read_back_equal(
    completed: int,
    failed: int,
    tokens: tuple[int, int | None],
    seconds: float | None,
    throughput: float | None,
    latencies: Any,
    concurrency: int | None,
    rate: float | None,
) -> None:
    figures: dict[str, float | None] = {
        "duration": seconds,
        "completed": completed,
        "total_input_tokens": tokens[0],
        "total_output_tokens": tokens[1],
        "output_throughput": throughput,
    }
    run = make_run(figures, latencies, concurrency=concurrency, rate=rate, failed=failed)
    found = again(PeerFile("batchbench", "1.0", "gpt2", "slots engine", None, [run]), run)
    (back,) = found.runs
    assert {name: back.summary[name] for name in HELD} == {name: run.summary[name] for name in HELD}
    assert (back.concurrency, back.rate, back.failed) == (concurrency, rate, failed)
    told = (found.tool, found.version, found.model, found.backend)
    assert told == ("batchbench", "1.0", "gpt2", "slots engine")


@pytest.mark.parametrize("result", [clean, simulated, over_time, of_one_token])
def test_our_own_results_are_written_as_they_are(result: Callable[[], Result]) -> None:
    own = result()
    for name, run in zip(own.names, of_result(own).runs, strict=True):
        summary: Any = own.data["strategies"][name]["summary"]
        (back,) = again(of_result(own), run).runs
        for metric in HELD:
            assert back.summary[metric] == near(summary[metric]), metric


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_files_of_other_tools_are_converted(file: Path) -> None:
    found = read(file)
    (run,) = found.runs
    (back,) = again(found, run).runs
    for name in HELD:
        value = back.summary[name]
        # The schema requires a mean beside percentiles, so these are lost without one.
        assert value == near(run.summary[name]), name


# Files that are not whole


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as error:
        read_peer(path)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_that_was_cut_off_is_refused(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    cut = tmp_path / file.name
    for share in (0.0, 0.1, 0.5, 0.9):
        cut.write_bytes(content[: int(share * len(content)) or 0])
        try:
            read_peer(cut)
        except UsageError:
            continue
        assert file.suffix != ".json"  # YAML or lines may end at the end of a part


NEWER: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "guidellm": ("guidellm.json", lambda d: d["metadata"].update(version=3), "version 3"),
    "aiperf": ("aiperf.json", lambda d: d.update(schema_version="2.0"), "schema version 2.0"),
    "llm-d": ("llmd-of-aiperf.json", lambda d: d.update(version="0.3"), "0.2 and 0.2.1"),
    "old llm-d": ("llmd-of-aiperf.json", lambda d: d.update(version="0.1"), "0.2 and 0.2.1"),
    "units": (
        "llmd-of-aiperf.json",
        lambda d: d["results"]["request_performance"]["aggregate"]["latency"][
            "request_latency"
        ].update(units="h"),
        "must be ms or s",
    ),
    "text": ("vllm-summary.json", lambda d: d.update(duration="long"), "duration is 'long'"),
    "negative": ("vllm-summary.json", lambda d: d.update(duration=-1), "at least 0"),
    "true": ("vllm-summary.json", lambda d: d.update(duration=True), "duration is True"),
    "columns": ("vllm-detailed.json", lambda d: d["itls"].pop(), "itls has 7 entries"),
    "nothing": ("guidellm.json", lambda d: d["benchmarks"].clear(), "benchmarks is empty"),
}


@pytest.mark.parametrize("case", NEWER)
def test_newer_and_damaged_files_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    name, change, words = NEWER[case]
    assert words in refused(changed(tmp_path, name, change))


def test_yaml_may_not_refer_to_itself(tmp_path: Path) -> None:
    bomb = tmp_path / "report.yaml"
    bomb.write_text('version: "0.2"\nrun: &a [1]\nresults: [*a, *a]\n', encoding="utf-8")
    assert "aliases" in refused(bomb)
    bomb.write_text("version: " + "[" * 5000, encoding="utf-8")
    refused(bomb)


def values_in(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values."""
    inner = data.items() if isinstance(data, dict) else enumerate(data)
    found = []
    for key, value in inner:
        found.append((*path, key))
        if isinstance(value, dict | list):
            found += values_in(value, (*path, key))
    return found


STRANGE = [None, True, -1, 1.5, 2**62, 1e49, "", "text", [], {}, [None], [[1]], {"a": 1}, math.nan]


@pytest.mark.parametrize(
    "name", [file.name for file in FILES if file.suffix == ".json"] + ["aiperf.jsonl"]
)
def test_any_change_of_a_file_is_read_or_refused(name: str, tmp_path: Path) -> None:
    chance, target = random.Random(name), tmp_path / name
    lines = (SAMPLES / name).read_text(encoding="utf-8").splitlines()
    for _ in range(100):
        data = [json.loads(line) for line in lines]
        *path, last = chance.choice(values_in(data))
        place: Any = data
        for key in path:
            place = place[key]
        if chance.random() < 0.3:
            del place[last]
        else:
            place[last] = chance.choice(STRANGE)
        target.write_text("\n".join(map(json.dumps, data)), encoding="utf-8")
        try:
            found = read_peer(target)
        except UsageError:
            continue
        if found is not None:
            for run in found.runs:
                write_llmd(found, run)


# The commands


def test_report_shows_one_file(program: Program) -> None:
    said = program("report", str(SAMPLES / "vllm-detailed.json"))
    assert said.code == 0
    assert "vllm bench serve measured 408.3 output tok/s" in said.out
    assert "16.66–25.97" in said.out  # the interval of TTFT
    assert "does not tell how much another run would differ" in " ".join(said.out.split())


def test_report_shows_a_file_without_requests_and_no_interval(program: Program) -> None:
    said = program("report", str(SAMPLES / "aiperf.json"))
    assert "gives statistics as it states them, and no interval" in " ".join(said.out.split())
    assert "–" not in said.out.partition("Latencies")[2].partition("A file")[0]


@pytest.mark.parametrize("format", ["terminal", "markdown", "json"])
def test_tools_stand_side_by_side_with_our_result(program: Program, format: str) -> None:
    assert program("simulate", "--output", "own", "--quiet").code == 0
    files = [str(SAMPLES / name) for name in ("vllm-detailed.json", "guidellm.json")]
    said = program(
        "report", "own", *files, "--format", format, *["--file", "-"] * (format[0] == "m")
    )
    assert (said.code, said.err) == (0, "")
    for words in ("static", "continuous", "concurrency=4", "guidellm", "vllm bench serve"):
        assert words in said.out
    if format == "json":
        own, _, guidellm = json.loads(said.out)["files"]
        assert len(own["runs"]) == 2
        assert guidellm["runs"][0]["summary"]["p99_itl_ms"] is None


def test_a_format_that_needs_recordings_is_refused(program: Program) -> None:
    said = program("report", str(SAMPLES / "aiperf.json"), "--format", "html")
    assert said.code == 2
    assert "give --format terminal, json, markdown or llmd" in said.error


def test_llm_d_has_a_report_for_each_strategy(program: Program) -> None:
    assert program("simulate", "--output", "own", "--quiet").code == 0
    assert program("report", "own", "--format", "llmd", "--file", "own.json").code == 0
    reports = [
        json.loads(Path(f"own-{name}.json").read_text()) for name in ("static", "continuous")
    ]
    assert reports[0]["run"]["eid"] == reports[1]["run"]["eid"]
    assert reports[0]["run"]["uid"] != reports[1]["run"]["uid"]
    said = program("report", "own", "--format", "llmd", "--file", "-")
    assert said.code == 2
    assert "give --file NAME.json" in said.error


def test_one_file_per_side_cannot_tell(program: Program) -> None:
    files = [str(SAMPLES / name) for name in ("vllm-detailed.json", "vllm-summary.json")]
    said = program("compare", *files, "--fail-if", "p99_ttft_ms > 10%")
    assert said.code == 0
    assert (
        "CANNOT TELL: 1 file per side cannot show that a difference is not chance"
        in said.out.replace("\n┃ ", " ").replace("  ", "")
    )
    assert program("compare", *files, "--strict").code == 3


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (2.0, 1)])
def test_several_files_per_side_can_tell(program: Program, factor: float, code: int) -> None:
    for side, scale in (("old", 1.0), ("new", factor)):
        Path(side).mkdir()
        for i in range(5):
            data = loaded("vllm-summary.json")
            data["p99_ttft_ms"] *= scale * (1 + 0.002 * i + 0.0001 * scale)
            data["duration"] *= 1 + 0.001 * i * scale
            Path(side, f"{i}.json").write_text(json.dumps(data), encoding="utf-8")
    said = program("compare", "old", "new", "--fail-if", "p99_ttft_ms > 10%")
    assert (said.code, said.err) == (code, "")


def test_different_loads_are_not_compared(program: Program) -> None:
    data = loaded("vllm-summary.json")
    data["max_concurrency"] = 8
    Path("eight.json").write_text(json.dumps(data), encoding="utf-8")
    said = program("compare", str(SAMPLES / "vllm-summary.json"), "eight.json")
    assert said.code == 2
    assert "has the load concurrency=8" in said.error


def test_our_result_is_not_compared_with_a_file_of_another_tool(program: Program) -> None:
    assert program("simulate", "--output", "own", "--quiet").code == 0
    said = program("compare", "own", str(SAMPLES / "vllm-summary.json"))
    assert said.code == 2
    assert "side by side with batchbench report " in said.error


def test_other_tools_files_are_read_without_torch() -> None:
    script = f"""
import sys
from batchbench.cli.main import run_command
sys.argv = ["batchbench", "report", {str(SAMPLES / "guidellm.json")!r}, "--quiet"]
assert run_command() == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
