"""Numbers, units, plurals and intervals in words."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd

from batchbench.batching.policies import POLICIES
from batchbench.reports.statistics import Ratio


def called(name: str) -> str:
    """A strategy's name within a sentence."""
    return f"{name} batching" if name in POLICIES else name


def number(value: float | None) -> str:
    """Four significant digits, thousands apart; N/A where there is no meaning."""
    if value is None:
        return "N/A"
    if value == int(value) or abs(value) >= 999.95:
        return f"{value:,.0f}"
    decimals = 3 - (math.floor(math.log10(abs(value))) if abs(value) >= 1e-6 else -6)
    return f"{value:.{decimals}f}".rstrip("0").rstrip(".")


def decimals_of(value: float) -> int:
    """Decimals with which a number of this size has three significant digits or more."""
    return max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0


def fixed(value: float, decimals: int, sign: str = "") -> str:
    """A number with fixed decimals, and no sign before what is rounded to nothing."""
    text = f"{value:,.{decimals}f}"
    if not any(digit in "123456789" for digit in text):
        return text.lstrip("-")
    return f"{value:{sign},.{decimals}f}"


_NO_BREAK = "\N{NO-BREAK SPACE}"  # between a number and its unit


def spell_number(value: float) -> str:
    """At least three significant digits, thousands apart."""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")  # 99.99 would become "100."


def spell_percent(share: float) -> str:
    """A share in whole percent."""
    return f"{100 * share:.0f}{_NO_BREAK}%"


def spell_ratio(ratio: Ratio | None) -> str:
    """Return ``2.86× (2.85–2.87)``, without the interval where there is none."""
    if ratio is None:
        return "N/A"
    text = f"{ratio.median:.2f}×"
    if ratio.low is None or ratio.high is None:
        return text
    return f"{text} ({ratio.low:.2f}–{ratio.high:.2f})"


def clean_text(text: str) -> str:
    """One line of characters that XML allows."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def spell_option(name: str, value: Any) -> str:
    """``batch size 8``; a flag is there or not."""
    words = name.replace("_", " ")
    if isinstance(value, bool | np.bool_):
        return words if value else f"not {words}"
    if name == "strategies":
        return str(value)
    return f"{words} {spell_value(value)}"


def spell_value(value: Any) -> str:
    """A number with thousands apart, a text as it is, a dash for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or value is pd.NA:
        return "–"
    return f"{value:,.10g}" if isinstance(value, Real) else str(value)


def spell_time(seconds: float) -> str:
    """A duration as one says it: 8 s, 3 min, 2 h 10 min."""
    if seconds < 99.5:
        return f"{seconds:.2g} s" if seconds < 9.5 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
