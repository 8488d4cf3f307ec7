"""Results for github-action-benchmark: ``customBiggerIsBetter`` and ``customSmallerIsBetter``.

Each is an array of ``{name, unit, value, range, extra}``; the action draws a chart for each name,
and compares the value with that of the commit before. It reads a range of the form ``± number``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from batchbench.reports.formats.dashboards import measures, prefixes
from batchbench.reports.result import Result
from batchbench.reports.side_by_side import Labelled


def render(shown: Sequence[Labelled], *, bigger: bool) -> str:
    """The figures of which more is better, or less."""
    entries = [
        entry
        for one, prefix in zip(shown, prefixes(shown), strict=True)
        for entry in _entries(one.result, prefix, bigger=bigger)
    ]
    return json.dumps(entries, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _entries(result: Result, prefix: str, *, bigger: bool) -> Iterator[dict[str, Any]]:
    about = "\n".join(_about(result))
    for each in measures(result):
        if each.higher_is_better is bigger:
            entry = {
                "name": f"{prefix}{each.strategy}.{each.metric}",
                "unit": each.unit,
                "value": each.value,
            }
            # With its zeros, since a range of one digit is not read.
            spread = {} if each.spread is None else {"range": f"± {each.spread:#.6g}"}
            yield {**entry, **spread, "extra": about}


def _about(result: Result) -> Iterator[str]:
    """What the chart shows beside a point."""
    data = result.data
    yield result.title
    trials = len(next(iter(result.recordings.values())))
    yield f"{trials} trial{'s' * (trials != 1)}, batchbench {data['batchbench_version']}"
    validity = data["validity"]
    yield "; ".join([f"run {validity['status']}", *validity["reasons"]])
