"""Results as Bencher Metric Format: ``{benchmark: {measure: {value, lower_value, upper_value}}}``.

A benchmark is a strategy, a measure is named by the kebab case of its metric, which is its slug.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from batchbench.reports.formats.dashboards import Measure, measures, prefixes
from batchbench.reports.side_by_side import Labelled


def render(shown: Sequence[Labelled]) -> str:
    """All results in one document."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for one, prefix in zip(shown, prefixes(shown), strict=True):
        for each in measures(one.result):
            slug = each.metric.replace("_", "-")
            found.setdefault(f"{prefix}{each.strategy}", {})[slug] = _metric(each)
    return json.dumps(found, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _metric(each: Measure) -> dict[str, float]:
    metric = {"value": each.value}
    if each.low is not None and each.high is not None:
        metric |= {"lower_value": each.low, "upper_value": each.high}
    return metric
