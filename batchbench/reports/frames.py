"""Frames: a row a strategy, a request or a span, for spreadsheets and pandas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from batchbench.batching.recording import Ints, Recording
from batchbench.reports.latency import e2el_ms, queue_ms, tpot_ms, ttft_ms
from batchbench.reports.result import Result


def summary_frame(result: Result) -> pd.DataFrame:
    """A row a strategy: its summary, its counters, and how it compares with the first.

    Added are ``utilisation`` (useful slot-steps in all), ``speedup`` with the ends of its 95 %
    interval (where there are trials enough), and ``step_ratio``; they are empty of the baseline,
    as counters are of a strategy that shows no steps.
    """
    rows = {}
    compared = {found["candidate"]: found for found in result.data["comparisons"]}
    for name, strategy in result.data["strategies"].items():
        counted = strategy["counters"]
        against = compared.get(name, {"speedup": {"median": None, "ci95": None}})
        low, high = against["speedup"]["ci95"] or (None, None)
        rows[name] = {
            **strategy["summary"],
            **(counted or {}),
            "utilisation": counted and counted["useful_slot_steps"] / counted["slot_steps"],
            "speedup": against["speedup"]["median"],
            "speedup_low": low,
            "speedup_high": high,
            "step_ratio": against.get("step_ratio"),
        }
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index.name = "strategy"
    # What has no meaning is None, and a column of nothing else would be of no number's kind.
    return frame.astype({name: float for name in frame if frame[name].dtype == object})


def requests_frame(result: Result) -> pd.DataFrame:
    """A row a request, trial and strategy: its records and its latencies."""
    frames = []
    for name, trials in result.recordings.items():
        for trial, recording in enumerate(trials):
            frames.append(_requests(name, trial, recording))
    frame = pd.concat(frames, ignore_index=True)
    if result.data["outputs"] is not None:
        texts = {row["request"]: row["output"] for row in result.data["outputs"]}
        frame["output_text"] = frame["request"].map(texts)
    return frame


def _requests(name: str, trial: int, recording: Recording) -> pd.DataFrame:
    r = recording.requests

    def shown(values: Ints) -> Any:
        """Empty where the strategy shows no steps."""
        return values if recording.has_steps else None

    return pd.DataFrame(
        {
            "strategy": name,
            "trial": trial,
            "request": np.arange(len(r.slot)),
            "slot": shown(r.slot),
            "prompt_tokens": r.prompt_tokens,
            "output_tokens": r.output_tokens,
            "admitted_step": shown(r.admitted),
            "started_step": shown(r.started),
            "first_token_step": shown(r.first),
            "last_token_step": shown(r.last),
            "released_step": shown(r.released),
            "due_ms": r.due_ns / 1e6,
            "admitted_ms": recording.admitted_ns / 1e6,
            "started_ms": recording.started_ns / 1e6,
            "queue_ms": queue_ms(recording),
            "ttft_ms": ttft_ms(recording),
            "tpot_ms": tpot_ms(recording),
            "e2el_ms": e2el_ms(recording),
        }
    )


def steps_frame(result: Result) -> pd.DataFrame:
    """A row a span of equal steps, trial and strategy."""
    frames = []
    for name, trials in result.recordings.items():
        for trial, recording in enumerate(trials):
            s = recording.spans
            frames.append(
                pd.DataFrame(
                    {
                        "strategy": name,
                        "trial": trial,
                        "first_step": recording.first_steps,
                        "steps": s.steps,
                        "start_ms": s.start_ns / 1e6,
                        "end_ms": recording.span_ends_ns / 1e6,
                        "decoding_slots": s.decoding,
                        "prompt_chunks": s.chunks,
                        "waiting": s.waiting,
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)
