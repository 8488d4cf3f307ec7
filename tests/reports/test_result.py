"""The result: its names, its schema, its folder, and reading it again."""

from __future__ import annotations

import functools
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import (
    Any,
    Literal,
    NoReturn,
    NotRequired,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from support.laws import law
from support.results import (
    CLASSIC,
    KINDS,
    clean,
    ending_early,
    measured,
    one_strategy,
    result_of,
    simulated,
    trials_of,
    with_findings,
    with_texts,
)
from support.served import served

from batchbench.batching.experiment import Experiment, ServingSpec
from batchbench.batching.session import conduct
from batchbench.batching.verification import NOT_VERIFIED
from batchbench.cli.output import output_folder
from batchbench.errors import UsageError
from batchbench.files import check_folder, default_folders
from batchbench.reports import output as folders
from batchbench.reports.latency import ttft_ms
from batchbench.reports.output import requests_frame, steps_frame, write_folder
from batchbench.reports.result import (
    Result,
    load_result,
    make_result,
    remake_result,
    to_json,
)
from batchbench.reports.result_data import ResultData, StallData, Validity
from batchbench.reports.result_file import SCHEMA_FILE
from batchbench.reports.side_by_side import Labelled, SideBySide
from batchbench.workloads.spec import WorkloadSpec

kinds = pytest.mark.parametrize("make", KINDS)


def plain(result: Result) -> Any:
    """As JSON values; fails on NaN."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(constant)

    return json.loads(to_json(result), parse_constant=refuse)


@functools.cache
def validator() -> Draft202012Validator:
    """Return the validator of the published schema."""
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


# Names and schema

LATENCIES = {
    f"{statistic}_{name}_ms"
    for statistic in ("mean", "median", "std", "p90", "p99")
    for name in ("queue", "ttft", "tpot", "itl", "e2el")
}
NAMES: Mapping[str, set[str]] = {
    "": {
        *("schema_version", "batchbench_version", "created_at", "command", "config"),
        *("environment", "workload", "strategies", "comparison", "verification", "validity"),
    },
    "workload": {
        *("name", "seed", "closed", "num_requests", "total_input_tokens"),
        *("total_output_tokens", "digest", "max_concurrency", "arrival_rate"),
    },
    "strategies.static": {
        *("trials", "summary", "counters", "output_digest", "by_output_length", "stalls"),
    },
    "strategies.static.summary": {
        *("duration", "completed", "total_input_tokens", "total_output_tokens"),
        *("request_throughput", "output_throughput", "total_token_throughput"),
        *("request_goodput", "slo_attainment", "arrival_rate"),
        *LATENCIES,
    },
    "strategies.static.counters": {
        *("forward_passes", "prefill_passes", "mixed_passes", "decode_passes", "prefill_tokens"),
        *("padded_prefill_tokens", "slot_steps", "useful_slot_steps", "prompt_slot_steps"),
        *("finished_slot_steps", "empty_slot_steps", "idle_slot_steps", "stalled_slot_steps"),
        "kv_tokens_peak",
    },
    "comparison": {"baseline", "candidate", "speedup", "step_ratio", "efficiency"},
    "comparison.speedup": {"median", "ci95"},
    "verification": {
        *("passed", "requests_checked", "identical", "numerical_ties", "wrong", "reference"),
        "max_logit_gap",
    },
    "validity": {"status", "reasons"},
}
"""The names that other tools read are these, written down a second time."""


def at(data: Any, path: str) -> Any:
    """The part of a result at a dotted path."""
    for key in filter(None, path.split(".")):
        data = data[key]
    return data


@kinds
def test_a_result_is_of_its_schema(make: Callable[[], Result]) -> None:
    validator().validate(plain(make()))


@pytest.mark.parametrize("path", NAMES)
def test_the_promised_names_are_there(path: str) -> None:
    assert at(plain(clean()), path).keys() >= NAMES[path]


@pytest.mark.parametrize("path", NAMES)
def test_the_schema_asks_for_every_promised_name(path: str) -> None:
    data = plain(clean())
    for name in NAMES[path]:
        less = deepcopy(data)
        del at(less, path)[name]
        assert not validator().is_valid(less), name


def test_the_schema_knows_of_no_other_names() -> None:
    for path in set(NAMES) - {"config", "environment"}:
        more = plain(clean())
        at(more, path)["surprise"] = 1
        assert not validator().is_valid(more), path


def without_null(schema: Any) -> Any:
    """The part of the schema for values that are not null, with its reference followed."""
    choices = schema.get("anyOf", schema.get("oneOf", [schema]))
    some = [choice for choice in choices if choice.get("type") != "null"]
    schema = some[0] if len(some) == 1 else {}
    return SCHEMA["$defs"][schema["$ref"].split("/")[-1]] if "$ref" in schema else schema


def faults_of_type(hint: Any, schema: Any, place: str) -> Iterator[str]:
    """Yield the places at which a type and a part of the schema have other names."""
    if get_origin(hint) is NotRequired or NoneType in get_args(hint):
        yield from faults_of_type(get_args(hint)[0], schema, place)
        return
    schema, inner = without_null(schema), get_args(hint)
    if is_typeddict(hint):
        hints, known = get_type_hints(hint, include_extras=True), schema["properties"]
        if hints.keys() != known.keys() and (
            schema.get("additionalProperties") is False or known.keys() - hints.keys()
        ):
            yield f"{place}: {sorted(hints.keys() ^ known.keys())} are in one of them"
        needed = {name for name, of in hints.items() if get_origin(of) is not NotRequired}
        if needed & known.keys() != set(schema.get("required", ())) and hint.__total__:
            yield f"{place}: {needed ^ set(schema.get('required', ()))} are required in one of them"
        for name in known.keys() & hints.keys():
            yield from faults_of_type(hints[name], known[name], f"{place}.{name}")
    elif get_origin(hint) is list and "items" in schema:
        yield from faults_of_type(inner[0], schema["items"], f"{place}[]")
    elif get_origin(hint) is dict and isinstance(schema.get("additionalProperties"), dict):
        yield from faults_of_type(inner[1], schema["additionalProperties"], f"{place}.*")
    elif get_origin(hint) is Literal and set(inner) != set(schema["enum"]):
        yield f"{place}: {inner}"
    elif schema.get("properties") and hint not in (dict[str, Any], dict[str, float]):
        yield f"{place}: has no type"


SCHEMA = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


def test_the_types_of_a_result_have_the_names_of_the_schema() -> None:
    assert list(faults_of_type(ResultData, SCHEMA, "result")) == []


def test_the_schema_and_a_type_that_differ_are_told_apart() -> None:
    known = SCHEMA["properties"]
    assert list(faults_of_type(StallData, known["workload"], "it")) != []
    less = {**known["validity"], "required": []}
    assert list(faults_of_type(Validity, less, "it")) != []


def test_what_is_shown_follows_from_what_is_counted() -> None:
    slowed = [measured("static", i, step_ns=(2 + i) * 1e7) for i in range(3)]
    continuous = trials_of("continuous")[:3]
    data = plain(result_of({"static": slowed, "continuous": continuous}, price=2.5))
    static, continuous = (data["strategies"][name] for name in ("static", "continuous"))
    comparison = data["comparison"]
    ratios = [
        a["duration"] / b["duration"]
        for a, b in zip(static["trials"], continuous["trials"], strict=True)
    ]
    assert (comparison["baseline"], comparison["candidate"]) == ("static", "continuous")
    assert comparison["speedup"]["median"] == pytest.approx(np.median(ratios))
    assert comparison["step_ratio"] == pytest.approx(400 / 132)
    assert comparison["efficiency"] == pytest.approx(np.median(ratios) / (400 / 132))
    summary = static["summary"]
    assert summary["duration"] == np.median([t["duration"] for t in static["trials"]])
    per_token = 2.5 / 3600 / summary["output_throughput"]
    assert summary["cost_per_million_output_tokens"] == pytest.approx(per_token * 1e6)
    assert data["verification"]["passed"] is True


def test_a_clean_run_is_stamped_valid() -> None:
    assert plain(clean())["validity"] == {"status": "valid", "reasons": []}


def test_what_was_not_checked_has_neither_passed_nor_failed() -> None:
    assert plain(result_of(verification=NOT_VERIFIED))["verification"]["passed"] is None
    assert plain(with_findings())["verification"]["passed"] is False


def test_one_strategy_is_compared_with_nothing_and_three_with_the_first() -> None:
    assert plain(one_strategy())["comparison"] is None
    three = {name: trials_of("continuous") for name in ("a", "b", "c")}
    data = plain(result_of(three))
    assert [(c["baseline"], c["candidate"]) for c in data["comparisons"]] == [
        ("a", "b"),
        ("a", "c"),
    ]
    assert data["comparison"] == data["comparisons"][-1]


def test_equal_outputs_have_equal_digests() -> None:
    data = plain(clean())["strategies"]
    assert data["static"]["output_digest"] == data["continuous"]["output_digest"]
    trials = trials_of("continuous")
    assert trials[0].tokens is not None
    trials[0] = replace(trials[0], tokens=trials[0].tokens + 1)
    other = plain(result_of({"continuous": trials}))["strategies"]
    assert other["continuous"]["output_digest"] != data["continuous"]["output_digest"]
    assert plain(simulated())["strategies"]["static"]["output_digest"] is None


def test_lengths_asked_are_told_only_where_texts_may_end_early() -> None:
    asked = plain(ending_early())["workload"]["output_lengths"]
    assert asked == CLASSIC.output_tokens.tolist()
    assert plain(clean())["workload"]["output_lengths"] is None


def test_what_is_no_number_is_never_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(replace(clean(), data={**clean().data, "stopped": float("nan")}))


def test_a_spoiled_run_is_stamped_suspect() -> None:
    validity = plain(result_of(stopped="interrupted after 1 of 4 pairs"))["validity"]
    assert validity == {"status": "suspect", "reasons": ["interrupted after 1 of 4 pairs"]}


# Frames


@kinds
def test_requests_csv_has_a_row_a_request_trial_and_strategy(make: Callable[[], Result]) -> None:
    result = make()
    frame = requests_frame(result)
    trials = [trial for of_one in result.recordings.values() for trial in of_one]
    assert len(frame) == sum(len(trial.requests.slot) for trial in trials)
    assert not frame.duplicated(["strategy", "trial", "request"]).any()
    first = frame[(frame.strategy == result.names[0]) & (frame.trial == 0)]
    ttft = ttft_ms(result.recordings[result.names[0]][0])
    assert first.ttft_ms.tolist() == ttft.tolist()


def test_requests_csv_carries_texts_where_there_are_any() -> None:
    text = requests_frame(with_texts()).to_csv(index=False)
    read = pd.read_csv(io.StringIO(text))
    assert read.output_text[read.request == 19].unique().tolist() == ["out, “19”\n"]
    assert "output_text" not in requests_frame(clean())


@kinds
def test_steps_csv_has_a_row_a_span(make: Callable[[], Result]) -> None:
    result = make()
    frame = steps_frame(result)
    for name, trials in result.recordings.items():
        for number, trial in enumerate(trials):
            rows = frame[(frame.strategy == name) & (frame.trial == number)]
            assert rows.steps.sum() == trial.num_steps
            if trial.has_steps:
                assert rows.end_ms.iloc[-1] == trial.step_ends_ns[-1] / 1e6


# The folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that cost nothing."""
    monkeypatch.setattr(folders, "draw", lambda recordings, title: {"timeline": None})
    monkeypatch.setattr(folders, "figure_bytes", lambda figure, format: format.encode())


def files_in(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.usefixtures("quick")
@kinds
def test_reading_a_folder_and_deriving_anew_gives_the_same_result(
    make: Callable[[], Result], tmp_path: Path
) -> None:
    result = make()
    write_folder(tmp_path, result)
    again = remake_result(load_result(tmp_path))
    assert plain(again) == plain(result)
    assert list(again.recordings) == list(result.recordings)
    before = files_in(tmp_path)
    write_folder(tmp_path, again)
    assert files_in(tmp_path) == before


@pytest.mark.usefixtures("quick")
def test_write_folder_tells_the_files_that_it_wrote(tmp_path: Path) -> None:
    written = write_folder(tmp_path / "new" / "folder", clean())
    assert written[0].name == "result.json"
    assert {str(f.relative_to(tmp_path / "new" / "folder")) for f in written} == set(
        files_in(tmp_path / "new" / "folder")
    )


@pytest.mark.usefixtures("quick")
def test_a_result_without_steps_has_no_table_of_steps(tmp_path: Path) -> None:
    write_folder(tmp_path, clean())
    assert "steps.csv" in files_in(tmp_path)
    written = write_folder(tmp_path, served())
    assert "steps.csv" not in files_in(tmp_path)
    assert {str(file.relative_to(tmp_path)) for file in written} == set(files_in(tmp_path))


def test_the_five_pictures_are_written(tmp_path: Path) -> None:
    written = write_folder(tmp_path, simulated())
    for format, begins in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        pictures = [file for file in written if file.suffix == f".{format}"]
        assert len(pictures) == 5
        assert all(file.read_bytes().startswith(begins) for file in pictures)


@pytest.mark.usefixtures("quick")
def test_fewer_trials_leave_no_recording_of_the_old_result(tmp_path: Path) -> None:
    write_folder(tmp_path, clean())
    write_folder(tmp_path, one_strategy())
    assert sorted(f for f in files_in(tmp_path) if f.startswith("recordings")) == [
        "recordings/0-0.npz"
    ]


class Failing:
    """``os.replace`` that fails at its ``nth`` call."""

    def __init__(self, nth: int, error: BaseException) -> None:
        self.left, self.error, self.real = nth, error, os.replace

    def __call__(self, source: Path, target: Path) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error
        self.real(source, target)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("nth", range(1, 7))
@pytest.mark.parametrize("there", [False, True])
def test_a_result_is_written_whole_or_not_at_all(
    error: BaseException,
    nth: int,
    there: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = clean(), one_strategy()
    if there:
        write_folder(tmp_path, old)
    with monkeypatch.context() as patch:
        failing = Failing(nth, error)
        patch.setattr(os, "replace", failing)
        told = UsageError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(told, match=r"^$|^--output .*: cannot be written: no space left"):
            write_folder(tmp_path, new)
    assert not list(tmp_path.glob(".*"))
    if (tmp_path / "result.json").exists():
        assert plain(remake_result(load_result(tmp_path))) == plain(old)


@pytest.mark.parametrize("broken", ["draw", "figure_bytes", "requests_frame", "to_json"])
@pytest.mark.usefixtures("quick")
def test_a_fault_while_rendering_leaves_the_old_result_as_it_was(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise RuntimeError(broken)

    write_folder(tmp_path, clean())
    before = files_in(tmp_path)
    monkeypatch.setattr(folders, broken, fail)
    with pytest.raises(RuntimeError, match=broken):
        write_folder(tmp_path, simulated())
    assert files_in(tmp_path) == before


@pytest.mark.usefixtures("quick")
def test_a_folder_with_a_result_is_refused_unless_overwritten(tmp_path: Path) -> None:
    write_folder(tmp_path, clean())
    with pytest.raises(UsageError, match="holds a result; give another folder or --overwrite"):
        check_folder(tmp_path, overwrite=False)
    check_folder(tmp_path, overwrite=True)


def test_a_folder_with_other_things_is_taken(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    check_folder(tmp_path, overwrite=False)
    check_folder(tmp_path / "deep" / "down", overwrite=False)
    assert files_in(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(
    place: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=r"^--output .*: cannot be written: "):
        check_folder(tmp_path / place, overwrite=True)


def test_the_default_folder_is_never_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = set()
    for _ in range(3):
        with output_folder(None, default_folders("openai-community/gpt2")) as folder:
            assert folder.parent.name == "batchbench-results"
            assert "openai-community--gpt2" in folder.name
            folder.mkdir(parents=True)
            made.add(folder)
    assert len(made) == 3


# Spoiled results


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a result, not to be changed."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "draw", lambda recordings, title: {})
        write_folder(folder, one_strategy())
    return folder


def refused(folder: Path, result: str | bytes | None = None) -> str:
    """The one line that reading a folder ends with."""
    if result is not None:
        text = result if isinstance(result, bytes) else result.encode()
        (folder / "result.json").write_bytes(text)
    with pytest.raises(UsageError) as told:
        to_json(remake_result(load_result(folder)))
    line = str(told.value)
    assert str(folder) in line
    assert "\n" not in line
    return line


def spoiled(data: Any, path: str, value: Any) -> str:
    """The text of a result in which one thing is something else."""
    data = deepcopy(data)
    at(data, ".".join(path.split(".")[:-1]))[path.split(".")[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "{}", '"text"', "\x00", b"\xff\xfe"])
def test_what_is_no_result_is_refused(text: str | bytes, tmp_path: Path) -> None:
    refused(tmp_path, text)


def test_a_folder_without_a_result_is_refused_and_so_is_no_folder(tmp_path: Path) -> None:
    assert "holds no result.json; give the folder that batchbench run wrote" in refused(tmp_path)
    assert "no such folder" in refused(tmp_path / "nowhere")


@settings(law, max_examples=40)
@given(share=st.floats(0, 0.999))
def test_a_torn_result_is_refused(share: float, written: Path) -> None:
    whole = (written / "result.json").read_bytes()
    try:
        refused(written, whole[: int(len(whole.rstrip()) * share)])
    finally:
        (written / "result.json").write_bytes(whole)


@settings(law, max_examples=40)
@given(share=st.floats(0, 0.999))
def test_a_torn_recording_is_refused(share: float, written: Path) -> None:
    file = written / "recordings" / "0-0.npz"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[: int(len(whole) * share)])
        assert "0-0.npz: is not a complete recording" in refused(written)
    finally:
        file.write_bytes(whole)


@pytest.mark.usefixtures("quick")
def test_a_missing_recording_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, clean())
    (tmp_path / "recordings" / "1-3.npz").unlink()
    assert "1-3.npz: no such recording" in refused(tmp_path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_version_is_refused(version: object, written: Path) -> None:
    whole = (written / "result.json").read_text(encoding="utf-8")
    try:
        line = refused(written, spoiled(json.loads(whole), "schema_version", version))
        assert f"has schema version {version}, this batchbench reads 1" in line
    finally:
        (written / "result.json").write_text(whole, encoding="utf-8")


FACTS = (
    *("created_at", "command", "simulated", "config", "environment", "model", "warm_up"),
    *("workload", "verification", "stopped", "outputs"),
)


@pytest.mark.parametrize("name", FACTS)
def test_a_result_that_lacks_a_fact_is_refused(name: str, written: Path) -> None:
    whole = (written / "result.json").read_text(encoding="utf-8")
    data = json.loads(whole)
    del data[name]
    try:
        refused(written, json.dumps(data))
    finally:
        (written / "result.json").write_text(whole, encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("config.goals.price_per_hour", float("nan")),
        ("config.goals.price_per_hour", "3"),
        ("config.report", {}),
        ("warm_up.last_change", float("inf")),
        ("warm_up", {"surprise": 1}),
        ("verification", None),
        ("verification.findings", [{"surprise": 1}]),
        ("workload.output_lengths", [1, 2]),
        ("strategies", []),
        ("strategies", {}),
        ("strategies.static", None),
        ("strategies.static.trials", []),
        ("strategies.static.trials", 1),
    ],
)
def test_a_result_that_holds_nonsense_is_refused(path: str, value: object, written: Path) -> None:
    whole = (written / "result.json").read_text(encoding="utf-8")
    try:
        refused(written, spoiled(json.loads(whole), path, value))
    finally:
        (written / "result.json").write_text(whole, encoding="utf-8")


# Side by side


def test_results_of_other_batch_sizes_say_why_their_workloads_differ() -> None:
    def shown(sizes: tuple[int, int], **workload: Any) -> str:
        results = [
            make_result(
                conduct(
                    Experiment(
                        workload=WorkloadSpec(queue_size=8, **workload),
                        serving=ServingSpec(batch_size=size),
                        simulated=True,
                    )
                )
            )
            for size in sizes
        ]
        return SideBySide([Labelled(f"{i}", result) for i, result in enumerate(results)]).sentence

    why = "workloads differ (--long-every is --batch-size unless it is given), so"
    assert why in shown((2, 4))
    assert "differ" not in shown((2, 4), long_every=4)
    assert "differ" not in shown((2, 2))
