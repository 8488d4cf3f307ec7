"""Numbers, units, plurals, percentages and intervals in words, spelled the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from batchbench.batching.policies import POLICIES

if TYPE_CHECKING:  # scipy takes 0.5 s to import, and spelling a number does not need it
    from batchbench.reports.statistics import Ratio

NO_BREAK = "\N{NO-BREAK SPACE}"
"""Separates a number from its unit in pictures."""

MISSING = "N/A"

WAVES = "static (waves)"
"""The static strategy on a server, where a finished request leaves the batch."""


def label_of(name: str, *, has_steps: bool) -> str:
    """Return a strategy's name for tables; a server, which reports no steps, has waves."""
    return WAVES if name == "static" and not has_steps else name


def called(name: str) -> str:
    """Return a strategy's name as it reads within a sentence: ``static batching``."""
    if name == WAVES:
        return "static batching in waves"
    return f"{name} batching" if name in POLICIES else name


# Numbers


def number(value: float | None) -> str:
    """Return four significant digits with thousands separated; N/A for None."""
    if value is None:
        return MISSING
    if value == int(value) or abs(value) >= 999.95:
        return f"{value:,.0f}"
    decimals = 3 - (math.floor(math.log10(abs(value))) if abs(value) >= 1e-6 else -6)
    return f"{value:.{decimals}f}".rstrip("0").rstrip(".")


def spell_number(value: float) -> str:
    """Return three significant digits or more with thousands separated, for pictures."""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")  # 99.99 would become "100."


def decimals_of(value: float) -> int:
    """Return the number of decimals that show three significant digits or more."""
    return max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0


def fixed(value: float, decimals: int, sign: str = "") -> str:
    """Return a number with fixed decimals, without a sign if it rounds to 0."""
    text = f"{value:{sign},.{decimals}f}"
    return text if any(digit in "123456789" for digit in text) else text.lstrip("+-")


def plural(count: int, noun: str, nouns: str = "") -> str:
    """Return a count and its noun: ``1 slot``, ``1,024 slots``, ``2 passes``."""
    return f"{count:,} {noun if count == 1 else nouns or f'{noun}s'}"


def span(low: int, high: int) -> str:
    """Return a range of whole numbers: ``1–1,024``, or ``8`` if both ends are equal."""
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


# Shares and ratios


def percent(share: float | None, decimals: int = 0, sign: str = "") -> str:
    """Return a share in percent: ``80%``, or ``+4.1%`` with a sign; N/A for None or NaN."""
    if share is None or not math.isfinite(share):
        return MISSING
    return f"{fixed(100 * share, decimals, sign)}%"


def spell_percent(share: float) -> str:
    """Return a share in whole percent with a no-break space, for pictures."""
    return f"{100 * share:.0f}{NO_BREAK}%"


def times(ratio: float | None) -> str:
    """Return a ratio: ``3.08×``; N/A for None."""
    return MISSING if ratio is None else f"{ratio:.2f}×"


def times_within(ratio: float | None, low: float | None, high: float | None) -> str:
    """Return a ratio with its interval, if it has one: ``3.08× (2.95–3.21)``."""
    return times(ratio) + ("" if low is None or high is None else f" ({interval(low, high)})")


def spell_ratio(ratio: Ratio | None) -> str:
    """Return a ratio with its interval, if it has one; N/A for None."""
    return MISSING if ratio is None else times_within(ratio.median, ratio.low, ratio.high)


def interval(low: float, high: float, decimals: int = 2) -> str:
    """Return two bounds with fixed decimals: ``2.95–3.21``."""
    return f"{fixed(low, decimals)}–{fixed(high, decimals)}"


def interval_percent(low: float | None, high: float | None) -> str:
    """Return an interval of a change: ``+1.2% to +3.4%``; N/A without bounds."""
    if low is None or high is None:
        return MISSING
    return f"{percent(low, 1, '+')} to {percent(high, 1, '+')}"


# Times


def spell_time(seconds: float) -> str:
    """Return a duration as one says it: ``8 s``, ``3 min``, ``2 h 10 min``."""
    if seconds < 99.5:
        return f"{seconds:.2g} s" if seconds < 9.5 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# Words


def joined(words: Sequence[str], last: str = "and") -> str:
    """Return words as an enumeration: ``a``, ``a and b``, ``a, b and c``."""
    *most, end = words
    return f"{', '.join(most)} {last} {end}" if most else end


def clean_text(text: str) -> str:
    """Return one line that has only characters which XML allows."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def spell_option(name: str, value: Any) -> str:
    """Return an option and its value: ``batch size 8``, ``verify``, ``not verify``."""
    words = name.replace("_", " ")
    if isinstance(value, bool | np.bool_):
        return words if value else f"not {words}"
    return str(value) if name == "strategies" else f"{words} {spell_value(value)}"


def spell_setting(value: Any) -> str:
    """Return a setting's value in words, N/A for none, a list with commas."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(spell_setting, value)) if isinstance(value, list) else spell_value(value)


def spell_value(value: Any) -> str:
    """Return a number with thousands separated, a text as it is, a dash for a missing value."""
    if value is None or str(value) in ("nan", "<NA>"):  # pandas.NA, without pandas
        return "–"
    if isinstance(value, Real):
        return f"{value:,}" if isinstance(value, Integral) else f"{value:,.10g}"
    return str(value)
