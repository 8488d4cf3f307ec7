"""The trace of a result: Chrome's Trace Event Format, as ui.perfetto.dev opens it.

A process a strategy, a track a slot, a slice a request with its prefill, decode and held parts
inside, and counters of waiting requests and occupied slots. Times are microseconds since the start
of the trial; shown is each strategy's trial of median duration. The format is described in
"Trace Event Format" (docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU).
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from batchbench.batching.recording import Ints, Recording
from batchbench.errors import UsageError
from batchbench.files import check_place, reason_of, replacing
from batchbench.reports.result import Result

MOST_REQUESTS = 200_000
"""Requests whose slices are written of one strategy; what Perfetto still opens at ease."""

MOST_SAMPLES = 20_000
"""Values of the counters that are written of one strategy."""

_QUEUE_TRACK = 0
"""Thread of the counters; slots follow, for thread 0 is no slot."""


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
    """Write the trace, whole or not at all; compressed where the name ends in ``.gz``.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        with replacing(file) as staging, staging.open("wb") as raw:
            if file.suffix == ".gz":
                # Neither name nor time: the same trace gives the same bytes.
                with gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed:
                    _write(io.TextIOWrapper(packed, encoding="utf-8"), result)
            else:
                _write(io.TextIOWrapper(raw, encoding="utf-8"), result)
    except OSError as error:
        raise UsageError(f"--trace-out {file}: cannot be written: {reason_of(error)}") from error


def _write(out: io.TextIOWrapper, result: Result) -> None:
    """Event by event: the whole never stands in memory."""
    about = {
        "title": result.title,
        "command": result.data["command"],
        "batchbench_version": result.data["batchbench_version"],
        **_cut(result),
    }
    head = json.dumps({"displayTimeUnit": "ms", "otherData": about}, ensure_ascii=False)
    out.write(head.removesuffix("}") + ', "traceEvents": [')
    for i, event in enumerate(trace_events(result)):
        out.write(",\n" if i else "\n")
        out.write(json.dumps(event, ensure_ascii=False, allow_nan=False))
    out.write("\n]}\n")
    out.flush()
    out.detach()


def _cut(result: Result) -> dict[str, str]:
    """What is left out, in words, where something is."""
    requests = result.data["workload"]["num_requests"]
    hidden = [name for name, trials in result.recordings.items() if not trials[0].has_steps]
    left_out = [f"{name}, which shows no steps" for name in hidden]
    if requests > MOST_REQUESTS:
        left_out.append(f"of {requests} requests the first {MOST_REQUESTS} to be admitted")
    return {"left_out": "; ".join(left_out)} if left_out else {}


def trace_events(result: Result) -> Iterator[dict[str, Any]]:
    """All events, strategy after strategy: names, slices in the order of time, counters."""
    for i, (name, trials) in enumerate(result.recordings.items()):
        pid = i + 1
        recording = sorted(trials, key=lambda r: r.duration_ns)[(len(trials) - 1) // 2]
        if not recording.has_steps:  # it has no slots to show
            continue
        yield from _names(pid, name, recording)
        yield from _slices(pid, recording)
        yield from _counters(pid, recording)


def _names(pid: int, name: str, recording: Recording) -> Iterator[dict[str, Any]]:
    def metadata(kind: str, tid: int, **args: Any) -> dict[str, Any]:
        return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "ts": 0, "args": args}

    what = "simulated" if recording.header.simulated else "measured"
    yield metadata("process_name", _QUEUE_TRACK, name=name)
    yield metadata("process_labels", _QUEUE_TRACK, labels=what)
    yield metadata("process_sort_index", _QUEUE_TRACK, sort_index=pid)
    for slot in np.unique(recording.requests.slot).tolist():
        yield metadata("thread_name", slot + 1, name=f"slot {slot}")
        yield metadata("thread_sort_index", slot + 1, sort_index=slot)


def _slices(pid: int, recording: Recording) -> Iterator[dict[str, Any]]:
    """A slice a request, and its parts inside it."""
    r = recording.requests
    order = np.argsort(r.admitted, kind="stable")[:MOST_REQUESTS]
    admitted, started = (recording.starts_of(steps[order]) for steps in (r.admitted, r.started))
    first, done, freed = (
        recording.ends_of(steps[order]) for steps in (r.first, r.last, r.released - 1)
    )
    columns = (order, r.slot[order], r.due_ns[order], admitted, started, first, done, freed)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for i, slot, due, *times in rows:
        begin_at, start, first_at, done_at, freed_at = times
        args = {
            "request": i,
            "prompt_tokens": int(r.prompt_tokens[i]),
            "output_tokens": int(r.output_tokens[i]),
            "due_ms": due / 1e6,
            "queued_ms": (start - due) / 1e6,
            "ttft_ms": (first_at - due) / 1e6,
            "e2el_ms": (done_at - due) / 1e6,
        }
        track = {"ph": "X", "pid": pid, "tid": slot + 1}
        whole = _span(begin_at, freed_at)
        yield {**track, "name": f"request {i}", "cat": "request", **whole, "args": args}
        parts = (
            ("prefill", start, first_at),
            ("decode", first_at, done_at),
            ("held", done_at, freed_at),
        )
        for name, begin, end in parts:
            if end > begin:
                yield {**track, "name": name, "cat": name, **_span(begin, end)}


def _span(start: int, end: int) -> dict[str, float]:
    """Microseconds, exact to the nanosecond."""
    return {"ts": start / 1000, "dur": (end - start) / 1000}


def _counters(pid: int, recording: Recording) -> Iterator[dict[str, Any]]:
    """Requests that wait, and slots that run or are held for nothing, whenever they change."""
    r = recording.requests
    admitted = recording.starts_of(r.admitted)
    due = np.minimum(r.due_ns, admitted)
    done, freed = recording.ends_of(r.last), recording.ends_of(r.released - 1)
    at = np.unique(np.concatenate([due, admitted, done, freed]))
    at = at[np.unique(np.linspace(0, len(at) - 1, min(len(at), MOST_SAMPLES)).astype(np.int64))]
    came, entered, ended, left = (_by(times, at) for times in (due, admitted, done, freed))
    columns = (at, came - entered, entered - ended, ended - left)
    for now, waiting, running, held in zip(*(c.tolist() for c in columns), strict=True):
        event = {"ph": "C", "pid": pid, "tid": _QUEUE_TRACK, "ts": now / 1000}
        yield {**event, "name": "waiting", "args": {"requests": waiting}}
        yield {**event, "name": "slots", "args": {"running": running, "held": held}}


def _by(times: Ints, at: Ints) -> Ints:
    """How many of ``times`` have passed at each of ``at``."""
    passed: Ints = np.searchsorted(np.sort(times), at, side="right")
    return passed
