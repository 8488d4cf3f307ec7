"""Files of a result, written completely or not at all: JSON, tables, pictures and documents."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from batchbench.batching.recording import Ints, Recording
from batchbench.errors import UsageError
from batchbench.files import write_whole
from batchbench.reports.figures import draw, figure_bytes
from batchbench.reports.formats import dashboards, html, markdown
from batchbench.reports.latency import e2el_ms, queue_ms, tpot_ms, ttft_ms
from batchbench.reports.result import Result, recording_files, to_json
from batchbench.reports.side_by_side import Labelled, label_results


def write_folder(folder: Path, result: Result) -> list[Path]:
    """Write all files of a result and return their paths, ``result.json`` first."""
    files: dict[str, bytes | str] = {"result.json": to_json(result)}
    for name, figure in draw(result.recordings, result.title).items():
        files |= {f"{name}.{format}": figure_bytes(figure, format) for format in ("png", "svg")}
    files["requests.csv"] = requests_frame(result).to_csv(index=False)
    if len(steps := steps_frame(result)):
        files["steps.csv"] = steps.to_csv(index=False)
    files["report.html"] = html.render([Labelled("", result)])
    files |= recording_files(result.recordings)
    return write_whole(folder, files, stale=["recordings", "steps.csv"])


# Tables


def summary_frame(result: Result) -> pd.DataFrame:
    """Return one row per strategy: its summary, its counters, and its comparison with the first.

    Added are ``utilisation`` (useful / all slot-steps), ``speedup`` with the ends of its 95 %
    interval (if there are enough trials), and ``step_ratio``. They are empty for the baseline, as
    counters are for a strategy that reports no steps.
    """
    rows = {}
    comparisons = {entry["candidate"]: entry for entry in result.data["comparisons"]}
    for name, strategy in result.data["strategies"].items():
        counters, comparison = strategy["counters"], comparisons.get(name)
        speedup = comparison["speedup"] if comparison else None
        low, high = (speedup and speedup["ci95"]) or (None, None)
        rows[name] = {
            **strategy["summary"],
            **(counters or {}),
            "utilisation": counters and counters["useful_slot_steps"] / counters["slot_steps"],
            "speedup": speedup and speedup["median"],
            "speedup_low": low,
            "speedup_high": high,
            "step_ratio": comparison and comparison["step_ratio"],
        }
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index.name = "strategy"
    # A column that has only None would be of type object.
    return frame.astype({name: float for name in frame if frame[name].dtype == object})


def requests_frame(result: Result) -> pd.DataFrame:
    """Return one row per request, trial and strategy: its records and its latencies."""
    frame = _by_trial(result, _requests)
    if result.data["outputs"] is not None:
        texts = {row["request"]: row["output"] for row in result.data["outputs"]}
        frame["output_text"] = frame["request"].map(texts)
    return frame


def steps_frame(result: Result) -> pd.DataFrame:
    """Return one row per span of equal steps, trial and strategy."""
    return _by_trial(result, _spans)


def _by_trial(result: Result, columns: Callable[[Recording], Mapping[str, Any]]) -> pd.DataFrame:
    frames = [
        pd.DataFrame({"strategy": name, "trial": trial, **columns(recording)})
        for name, trials in result.recordings.items()
        for trial, recording in enumerate(trials)
    ]
    return pd.concat(frames, ignore_index=True)


def _requests(recording: Recording) -> Mapping[str, Any]:
    r = recording.requests

    def stepped(values: Ints) -> Ints | None:
        return values if recording.has_steps else None

    return {
        "request": np.arange(len(r.slot)),
        "slot": stepped(r.slot),
        "prompt_tokens": r.prompt_tokens,
        "output_tokens": r.output_tokens,
        "admitted_step": stepped(r.admitted),
        "started_step": stepped(r.started),
        "first_token_step": stepped(r.first),
        "last_token_step": stepped(r.last),
        "released_step": stepped(r.released),
        "due_ms": r.due_ns / 1e6,
        "admitted_ms": recording.admitted_ns / 1e6,
        "started_ms": recording.started_ns / 1e6,
        "queue_ms": queue_ms(recording),
        "ttft_ms": ttft_ms(recording),
        "tpot_ms": tpot_ms(recording),
        "e2el_ms": e2el_ms(recording),
    }


def _spans(recording: Recording) -> Mapping[str, Any]:
    s = recording.spans
    return {
        "first_step": recording.first_steps,
        "steps": s.steps,
        "start_ms": s.start_ns / 1e6,
        "end_ms": recording.span_ends_ns / 1e6,
        "decoding_slots": s.decoding,
        "prompt_chunks": s.chunks,
        "waiting": s.waiting,
    }


# Documents

MOST_RESULTS = 24
"""Maximum number of results in one document, so that it stays readable and small."""


def check_number(folders: Sequence[Path]) -> None:
    """Raise UsageError if there are too many results for one document, or one is named twice."""
    if len(folders) > MOST_RESULTS:
        raise UsageError(f"{len(folders)} results: show at most {MOST_RESULTS} side by side")
    seen: set[str] = set()
    for folder in folders:
        real = os.path.realpath(folder)  # Path.resolve fails on a link that leads to itself
        if real in seen:
            raise UsageError(f"{folder}: is named twice; name each result once")
        seen.add(real)


def make_document(
    format: str, folders: Sequence[Path], results: Sequence[Result], file: Path | None
) -> str:
    """Return a document in a format of ``report --format``; links are relative to ``file``."""
    shown = label_results(folders, results)
    if format == "markdown":
        place = Path.cwd() if file is None else file.absolute().parent
        return markdown.render(shown, [_pictures(folder, place) for folder in folders])
    return _RENDERERS[format](shown)


_RENDERERS: Mapping[str, Callable[[Sequence[Labelled]], str]] = {
    "html": html.render,
    "github-bigger": partial(dashboards.render_github_benchmark, bigger=True),
    "github-smaller": partial(dashboards.render_github_benchmark, bigger=False),
    "bencher": dashboards.render_bencher,
    "pytest-benchmark": dashboards.render_pytest_benchmark,
}


def _pictures(folder: Path, place: Path) -> dict[str, str]:
    """Return the pictures that exist in a result's folder, as paths relative to ``place``."""
    files = [folder.absolute() / f"{name}.png" for name in markdown.PICTURES]
    return {file.stem: _relative(file, place).as_posix() for file in files if file.exists()}


def _relative(file: Path, place: Path) -> Path:
    try:
        return Path(os.path.relpath(file, place))
    except ValueError:  # they are on two drives of Windows
        return file
