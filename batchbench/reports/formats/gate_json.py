"""A gate as JSON, for scripts: all that was found, and the exit code."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping
from typing import Any

from batchbench.studies.gate.evidence import Gate


def render(gate: Gate, *, strict: bool = False) -> str:
    """What has no meaning is null, never NaN; what JSON does not know is text."""
    data = {**gate.as_data(), "exit_code": gate.exit_code(strict=strict)}
    return json.dumps(_told(data), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _told(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _told(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_told(inner) for inner in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return str(value)
