"""Trace events: held against the Trace Event Format, and against the recordings they come from."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
from batchbench.batching.session import conduct
from batchbench.errors import UsageError
from batchbench.reports.formats import trace_events
from batchbench.reports.formats.trace_events import check_trace_file, write_trace
from batchbench.reports.result import Result, make_result
from batchbench.workloads.spec import WorkloadSpec

Event = dict[str, Any]

METADATA = {
    "process_name": ("name", str),
    "process_labels": ("labels", str),
    "process_sort_index": ("sort_index", int),
    "thread_name": ("name", str),
    "thread_sort_index": ("sort_index", int),
}
"""The argument that each name of a metadata event needs."""

NS = 0.001  # µs


def made(serving: ServingSpec | None = None, **workload: Any) -> Result:
    """A simulated result."""
    return make_result(
        conduct(
            Experiment(
                workload=WorkloadSpec(**workload),
                serving=serving or ServingSpec(batch_size=4),
                trials=TrialsSpec(trials=1),
                simulated=True,
            )
        )
    )


@pytest.fixture(scope="module")
def closed() -> Result:
    """Twenty requests that are there at the start."""
    return made(queue_size=20)


@pytest.fixture(scope="module")
def timed() -> Result:
    """Requests that come over time, with lengths of all kinds."""
    return made(queue_size=40, request_rate=60.0, output_tokens="uniform:min=1,max=40", seed=3)


def read(file: Path) -> dict[str, Any]:
    """A trace file's JSON; NaN is none."""
    data = file.read_bytes()
    text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    trace: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return trace


def faults(trace: dict[str, Any]) -> list[str]:
    """Return the places where a trace breaks the format: required fields, times, nesting."""
    found = []
    tracks: dict[tuple[int, int], list[Event]] = defaultdict(list)
    if trace.get("displayTimeUnit", "ms") not in ("ms", "ns"):
        found.append("displayTimeUnit")
    for event in trace["traceEvents"]:
        missing = {"ph", "pid", "tid", "ts", "name"} - event.keys()
        if missing:
            found.append(f"{event}: lacks {missing}")
            continue
        if not all(type(event[key]) is int and event[key] >= 0 for key in ("pid", "tid")):
            found.append(f"{event}: pid or tid")
        if not isinstance(event["ts"], int | float) or event["ts"] < 0:
            found.append(f"{event}: ts")
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append(event)
            if not event.get("dur", -1) >= 0:
                found.append(f"{event}: dur")
        elif event["ph"] == "C":
            values = event.get("args", {}).values()
            if not values or not all(type(v) in (int, float) and v >= 0 for v in values):
                found.append(f"{event}: values")
        elif event["ph"] == "M":
            key, kind = METADATA.get(event["name"], ("", object))
            if not isinstance(event.get("args", {}).get(key), kind):
                found.append(f"{event}: args")
        else:
            found.append(f"{event}: phase")
    return found + [fault for events in tracks.values() for fault in _nesting(events)]


def _nesting(events: list[Event]) -> list[str]:
    """Slices of one track that overlap without one holding the other."""
    found: list[str] = []
    open_until: list[float] = []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        while open_until and open_until[-1] <= event["ts"] + NS / 2:
            open_until.pop()
        end = event["ts"] + event["dur"]
        if open_until and end > open_until[-1] + NS / 2:
            found.append(f"{event}: overlaps")
        open_until.append(end)
    return found


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
@pytest.mark.parametrize("which", ["closed", "timed"])
def test_a_trace_keeps_to_the_format(
    which: str, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    write_trace(tmp_path / name, request.getfixturevalue(which))
    trace = read(tmp_path / name)
    assert faults(trace) == []
    assert [file.name for file in tmp_path.iterdir()] == [name]


def _overlap(events: list[Event]) -> None:
    event = next(e for e in events if e["ph"] == "X")
    event["dur"] += 1


def _backwards(events: list[Event]) -> None:
    next(e for e in events if e["ph"] == "X")["dur"] = -1


def _nameless(events: list[Event]) -> None:
    del events[0]["args"]["name"]


def _negative(events: list[Event]) -> None:
    next(e for e in events if e["ph"] == "C")["args"] = {"requests": -1}


@pytest.mark.parametrize("spoil", [_overlap, _backwards, _nameless, _negative])
def test_the_check_sees_what_is_wrong(
    spoil: Callable[[list[Event]], None], closed: Result, tmp_path: Path
) -> None:
    write_trace(tmp_path / "trace.json", closed)
    trace = read(tmp_path / "trace.json")
    spoil(trace["traceEvents"])
    assert faults(trace)


def test_slices_are_the_requests_of_the_recording(timed: Result) -> None:
    events = list(trace_events.trace_events(timed))
    for pid, (name, (recording,)) in enumerate(timed.recordings.items(), 1):
        mine = [e for e in events if e["pid"] == pid]
        assert mine[0]["args"] == {"name": name}
        slices = {e["args"]["request"]: e for e in mine if e.get("cat") == "request"}
        r = recording.requests
        assert sorted(slices) == list(range(40))
        for i, event in slices.items():
            assert event["tid"] == r.slot[i] + 1
            assert event["ts"] * 1000 == pytest.approx(recording.step_starts_ns[r.admitted[i]])
            end = recording.step_ends_ns[r.released[i] - 1]
            assert (event["ts"] + event["dur"]) * 1000 == pytest.approx(end)
            told = event["args"]
            assert told["ttft_ms"] >= told["queued_ms"] >= 0
            assert told["output_tokens"] == r.output_tokens[i]
        parts = [e for e in mine if e.get("cat") in ("prefill", "decode", "held")]
        whole = sum(e["dur"] for e in slices.values())
        assert sum(e["dur"] for e in parts) == pytest.approx(whole)
        assert ("held" in {e["cat"] for e in parts}) == (name == "static")


def test_counters_count_the_queue_and_the_slots(timed: Result) -> None:
    events = list(trace_events.trace_events(timed))
    for pid, (recording,) in enumerate(timed.recordings.values(), 1):
        mine = [e for e in events if e["pid"] == pid and e["ph"] == "C"]
        assert [e["ts"] for e in mine] == sorted(e["ts"] for e in mine)
        queue = [e["args"]["requests"] for e in mine if e["name"] == "waiting"]
        slots = [e["args"] for e in mine if e["name"] == "slots"]
        assert max(s["running"] + s["held"] for s in slots) <= recording.header.slots
        assert (queue[-1], slots[-1]) == (0, {"running": 0, "held": 0})
        # Area under the queue: what the requests waited, all together.
        times = np.array([e["ts"] for e in mine if e["name"] == "waiting"])
        r = recording.requests
        waited = (recording.starts_of(r.admitted) - r.due_ns).clip(0).sum() / 1000
        assert (np.diff(times) * queue[:-1]).sum() == pytest.approx(waited)


def test_a_large_trace_is_cut_and_says_so(
    closed: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_events, "MOST_REQUESTS", 5)
    monkeypatch.setattr(trace_events, "MOST_SAMPLES", 7)
    write_trace(tmp_path / "trace.json", closed)
    trace = read(tmp_path / "trace.json")
    assert faults(trace) == []
    assert trace["otherData"]["left_out"] == "all but the first 5 of 20 requests to be admitted"
    requests = [e for e in trace["traceEvents"] if e.get("cat") == "request"]
    counters = [e for e in trace["traceEvents"] if e["ph"] == "C"]
    assert (len(requests), len(counters)) == (2 * 5, 2 * 2 * 7)


def test_the_same_result_gives_the_same_bytes(closed: Result, tmp_path: Path) -> None:
    for name in ("a.json.gz", "b.json.gz"):
        write_trace(tmp_path / name, closed)
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (".", "is a directory; give a file"),
        ("nowhere/trace.json", "no such folder as .*nowhere; make it first"),
        ("file/trace.json", "no such folder"),
    ],
)
def test_a_file_that_cannot_be_is_refused(name: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=f"^--trace-out .*{told}"):
        check_trace_file(tmp_path / name)


def test_a_trace_is_written_whole_or_not_at_all(
    closed: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "trace.json"
    file.write_text("old")

    def fail(result: Result) -> Any:
        yield {}
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trace_events, "trace_events", fail)
    with pytest.raises(UsageError, match="cannot be written: no space left on device"):
        write_trace(file, closed)
    assert [f.read_text() for f in tmp_path.iterdir()] == ["old"]
