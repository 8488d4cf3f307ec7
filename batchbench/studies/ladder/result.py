"""What ``ladder.json`` holds: each rung's figures beside what the machine allows.

Built from recordings and from what was measured of the machine; nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from batchbench.batching.recording import Recording
from batchbench.batching.roofline import Ceiling, middle
from batchbench.batching.trials import WarmUp
from batchbench.batching.verification import Verification
from batchbench.reports import metrics
from batchbench.reports.audit import audit
from batchbench.reports.metrics import decode_steps
from batchbench.reports.result import output_digest, workload_facts
from batchbench.reports.result_file import Speedup
from batchbench.reports.statistics import paired_ratio
from batchbench.reports.time_budget import host_share
from batchbench.version import __version__
from batchbench.workloads import Workload

SCHEMA_VERSION = 1

YARDSTICKS = ("notebook", "generate_batch")
"""The rungs that others are compared with: what people know, and what they could take instead."""

_WARM = WarmUp(0, True, None, None)  # rungs are warmed up, and the first round is not the last


@dataclass(frozen=True, eq=False)
class LadderResult:
    """``ladder.json`` as data, and the recordings that it was made from."""

    data: Mapping[str, Any]
    recordings: Mapping[str, Sequence[Recording]]

    @property
    def title(self) -> str:
        """Model, device, batch size and workload in a line."""
        model, workload = self.data["model"], self.data["workload"]
        slots, requests = self.data["config"]["serving"]["batch_size"], workload["num_requests"]
        threads = self.data["environment"]["threads"]
        parts = [
            model["name"],
            model["device"] + (f", {count_threads(threads)}" if model["device"] == "cpu" else ""),
            f"{slots:,} slot{'s' * (slots != 1)}",
            f"{requests:,} request{'s' * (requests != 1)}",
        ]
        return " · ".join(parts)

    @property
    def passed(self) -> bool:
        """Whether no rung gave a wrong token."""
        return not any(rung["verification"]["wrong"] for rung in self.data["rungs"])


def count_threads(threads: int) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{threads} thread{'s' * (threads != 1)}"


def make_ladder(
    *,
    command: str,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    model: Mapping[str, Any],
    workload: Workload,
    ceilings: Sequence[Mapping[str, Ceiling]],
    rungs: Sequence[Mapping[str, Any]],
    recordings: Mapping[str, Sequence[Recording]],
    verifications: Mapping[str, Verification],
    left_out: Mapping[str, str],
    stopped: str | None,
) -> LadderResult:
    """The result of a ladder that was just climbed.

    Args:
        ceilings: by number format, as measured before each round and after the last.
        rungs: what each is, from the ground up; ``name``, ``change`` and ``dtype`` at least.
        left_out: rungs that this device does not offer, and why.
    """
    rounds = len(next(iter(recordings.values())))
    during = {
        dtype: [middle([ceilings[i][dtype], ceilings[i + 1][dtype]]) for i in range(rounds)]
        for dtype in ceilings[0]
    }
    climbed = [
        {
            **about,
            **_figures(
                recordings[about["name"]], during[about["dtype"]], on_cpu=model["device"] == "cpu"
            ),
            "speedup": {
                yardstick: _speedup(recordings, yardstick, about["name"])
                for yardstick in YARDSTICKS
            },
            "verification": _verdict(verifications[about["name"]]),
        }
        for about in rungs
    ]
    reasons = [] if stopped is None else [stopped]
    for name, trials in recordings.items():
        reasons += audit(workload, {name: trials}, verifications[name], _WARM, None)
    data = {
        "schema_version": SCHEMA_VERSION,
        "batchbench_version": __version__,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "config": config,
        "environment": dict(environment),
        "model": dict(model),
        "workload": workload_facts(workload),
        "card": make_card({dtype: middle(each) for dtype, each in during.items()}),
        "measured": [make_card(each) for each in ceilings],
        "rungs": climbed,
        "left_out": dict(left_out),
        "validity": {"status": "suspect" if reasons else "valid", "reasons": reasons},
    }
    return LadderResult(data, recordings)


def make_card(ceilings: Mapping[str, Ceiling]) -> dict[str, Any]:
    """What the machine allows, as measured; the same for all number formats but for the bytes."""
    first = next(iter(ceilings.values()))
    return {
        "rows": first.rows,
        "kv_tokens": first.kv_tokens,
        "bandwidth": {**asdict(first.bandwidth), "beyond_cache": first.bandwidth.beyond_cache},
        "formats": {
            dtype: {
                "weight_bytes": ceiling.reading.weight_bytes,
                "step_weight_bytes": ceiling.reading.step_weight_bytes,
                "kv_token_bytes": ceiling.reading.kv_token_bytes,
                "floor_ms": ceiling.floor_s * 1e3,
                "products_ms": ceiling.products_s * 1e3,
                "bound": ceiling.bound,
                "ceiling_tokens_per_s": ceiling.tokens_per_s,
            }
            for dtype, ceiling in ceilings.items()
        },
    }


def _figures(
    trials: Sequence[Recording], ceilings: Sequence[Ceiling], *, on_cpu: bool
) -> dict[str, Any]:
    """A rung's own figures; of several trials the median, each beside its own round's ceiling."""
    steps = [decode_steps(trial) for trial in trials]
    took = [found.full_ms for found in steps]
    pairs = list(zip(took, ceilings, strict=True))
    return {
        "trials": [metrics.trial_summary(trial) for trial in trials],
        "summary": metrics.summary(trials),
        "counters": metrics.counters(trials[0]) if trials[0].has_steps else None,
        "output_digest": output_digest(trials[0]),
        "decode_step_ms": _median(took),
        "decode_step_rows": steps[0].full_rows,
        "floor_share": _median([ms and c.floor_s * 1e3 / ms for ms, c in pairs]),
        "times_products": _median([ms and ms / (c.products_s * 1e3) for ms, c in pairs]),
        "outside_model": _median([outside_model(trial, on_cpu) for trial in trials]),
        # The first trial touches what later ones find touched.
        "peak_growth_bytes": _most([t.header.about.get("peak_growth_bytes") for t in trials]),
    }


def outside_model(recording: Recording, on_cpu: bool) -> float | None:
    """Share of the trial that passed outside the model's forward pass.

    On a GPU, where the host's clock cannot tell that, the share in which no step was under way.
    None where neither is known.
    """
    spent = recording.header.about.get("model_ns")
    if spent is not None:
        return max(0.0, 1 - float(spent) / recording.duration_ns)
    return host_share(recording) if recording.has_steps and not on_cpu else None


def _median(values: Sequence[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return float(np.median(told)) if told else None


def _most(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _speedup(
    recordings: Mapping[str, Sequence[Recording]], baseline: str, name: str
) -> Speedup | None:
    """How many times as fast as the baseline, over the rounds; None where one was not climbed."""
    if baseline not in recordings or name == baseline:
        return None
    above, below = ([t.duration_ns for t in recordings[n]] for n in (baseline, name))
    found = paired_ratio(above, below)
    return None if found is None else found.as_dict()


def _verdict(found: Verification) -> dict[str, Any]:
    return {"passed": found.passed, **asdict(found)}


def to_json(result: LadderResult) -> str:
    """``ladder.json``; whatever has no meaning is null, never NaN."""
    return json.dumps(result.data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
