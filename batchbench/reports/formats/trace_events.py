"""The trace of a result in Chrome's Trace Event Format, for ui.perfetto.dev.

Each strategy is a process, each slot a track, each request a slice with prefill, decode and held
parts inside; counters show waiting requests and occupied slots. Times are microseconds since the
start of each strategy's trial of median duration. "Trace Event Format" describes the format
(docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU).
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from batchbench.batching.recording import Recording
from batchbench.errors import UsageError
from batchbench.files import check_place, reason_of, replacing
from batchbench.reports.metrics import typical_trial
from batchbench.reports.occupancy import Holdings, levels_of
from batchbench.reports.result import Result

MOST_REQUESTS = 200_000
"""Requests of one strategy that are written; Perfetto still opens these quickly."""

MOST_SAMPLES = 20_000
"""Values of the counters of one strategy that are written."""

_COUNTERS = 0
"""Thread of the counters; slot n is thread n + 1."""


def check_trace_file(file: Path, output: Path | None = None) -> None:
    """Check that a trace can be written, before anything is measured.

    Args:
        output: the result's folder; it may be missing.

    Raises:
        UsageError: it cannot be written.
    """
    if file.is_dir():
        raise UsageError(f"--trace-out {file}: is a directory; give a file, such as trace.json.gz")
    if not file.parent.is_dir() and file.parent != output:
        raise UsageError(f"--trace-out {file}: no such folder as {file.parent}; make it first")
    check_place(file, f"--trace-out {file}")


def write_trace(file: Path, result: Result) -> None:
    """Write the trace, whole or not at all; compressed if the name ends in ``.gz``.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        with ExitStack() as stack:
            raw: Any = stack.enter_context(stack.enter_context(replacing(file)).open("wb"))
            if file.suffix == ".gz":
                # Without name and time, so that the same trace gives the same bytes.
                raw = stack.enter_context(gzip.GzipFile("", "wb", 6, raw, mtime=0))
            _write(stack.enter_context(io.TextIOWrapper(raw, encoding="utf-8")), result)
    except OSError as error:
        raise UsageError(f"--trace-out {file}: cannot be written: {reason_of(error)}") from error


def _write(out: io.TextIOWrapper, result: Result) -> None:
    """Write event by event: a trace may be larger than memory."""
    about = {
        "title": result.title,
        "command": result.data["command"],
        "batchbench_version": result.data["batchbench_version"],
    }
    requests = result.data["workload"]["num_requests"]
    hidden = [name for name, trials in result.recordings.items() if not trials[0].has_steps]
    left_out = [f"{name}, which logs no steps" for name in hidden]
    if requests > MOST_REQUESTS:
        left_out.append(f"all but the first {MOST_REQUESTS} of {requests} requests to be admitted")
    if left_out:
        about["left_out"] = "; ".join(left_out)
    head = json.dumps({"displayTimeUnit": "ms", "otherData": about}, ensure_ascii=False)
    out.write(head.removesuffix("}") + ', "traceEvents": [')
    for i, event in enumerate(trace_events(result)):
        out.write(",\n" if i else "\n")
        out.write(json.dumps(event, ensure_ascii=False, allow_nan=False))
    out.write("\n]}\n")


def trace_events(result: Result) -> Iterator[dict[str, Any]]:
    """Yield all events, strategy after strategy: names, slices in the order of time, counters."""
    for pid, (name, trials) in enumerate(result.recordings.items(), 1):
        recording = typical_trial(trials)
        if recording.has_steps:
            yield from _names(pid, name, recording)
            yield from _slices(pid, recording)
            yield from _counters(pid, recording)


def _names(pid: int, name: str, recording: Recording) -> Iterator[dict[str, Any]]:
    def metadata(kind: str, tid: int, **args: Any) -> dict[str, Any]:
        return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "ts": 0, "args": args}

    labels = "simulated" if recording.header.simulated else "measured"
    yield metadata("process_name", _COUNTERS, name=name)
    yield metadata("process_labels", _COUNTERS, labels=labels)
    yield metadata("process_sort_index", _COUNTERS, sort_index=pid)
    for slot in np.unique(recording.requests.slot).tolist():
        yield metadata("thread_name", slot + 1, name=f"slot {slot}")
        yield metadata("thread_sort_index", slot + 1, sort_index=slot)


def _slices(pid: int, recording: Recording) -> Iterator[dict[str, Any]]:
    r, held = recording.requests, Holdings.of(recording)
    order = np.argsort(r.admitted, kind="stable")[:MOST_REQUESTS]
    start, tokens = recording.starts_of(r.started), (r.prompt_tokens, r.output_tokens)
    columns = (*tokens, r.due_ns, start, *held)
    rows = zip(*(column[order].tolist() for column in columns), strict=True)
    for prompt, output, due, begin, i, slot, admitted, first, done, freed in rows:
        args = {
            "request": i,
            "prompt_tokens": prompt,
            "output_tokens": output,
            "due_ms": due / 1e6,
            "queued_ms": (begin - due) / 1e6,
            "ttft_ms": (first - due) / 1e6,
            "e2el_ms": (done - due) / 1e6,
        }
        track = {"ph": "X", "pid": pid, "tid": slot + 1}
        whole = _span(admitted, freed)
        yield {**track, "name": f"request {i}", "cat": "request", **whole, "args": args}
        for name, start_ns, end_ns in (
            ("prefill", begin, first),
            ("decode", first, done),
            ("held", done, freed),
        ):
            if end_ns > start_ns:
                yield {**track, "name": name, "cat": name, **_span(start_ns, end_ns)}


def _span(start: int, end: int) -> dict[str, float]:
    """Return microseconds, exact to the nanosecond."""
    return {"ts": start / 1000, "dur": (end - start) / 1000}


def _counters(pid: int, recording: Recording) -> Iterator[dict[str, Any]]:
    levels = levels_of(recording)
    counts = (levels.waiting, levels.running, levels.finished)
    columns = [levels.edges_ns, *(np.append(count, 0) for count in counts)]  # 0 at the end
    sampled = np.linspace(0, len(columns[0]) - 1, min(len(columns[0]), MOST_SAMPLES))
    at = np.unique(sampled.astype(np.int64))
    rows = (column[at].astype(np.int64).tolist() for column in columns)
    for now, waiting, running, held in zip(*rows, strict=True):
        event = {"ph": "C", "pid": pid, "tid": _COUNTERS, "ts": now / 1000}
        yield {**event, "name": "waiting", "args": {"requests": waiting}}
        yield {**event, "name": "slots", "args": {"running": running, "held": held}}
