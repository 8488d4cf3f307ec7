"""Distributions of lengths, and the grammar in which options and files write them.

A length is drawn in two steps: a value of the distribution (``values``, not rounded), which is
then rounded to the nearest whole number and clipped to ``min`` and ``max``. Values beyond a bound
are not drawn again but count as the bound, so the bounds carry the weight of the tails. Means and
medians are those of the distribution before either step.
"""

from __future__ import annotations

import io
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchbench.errors import UsageError, shown
from batchbench.files import MIB, read_binary
from batchbench.settings import parse_number, parse_whole

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GRAMMAR = (
    "a number (7), a range (4:64), uniform:min=1,max=30, normal:mean=128,std=32, "
    "lognormal:mean=128,sigma=0.8 (or median=), exponential:mean=128, zipf:alpha=1.8,max=50, "
    "cycle:every=8,long=100,short=10 or empirical:FILE; normal, lognormal, exponential and zipf "
    "take min= (1 if not given) and max="
)

LONGEST = 10**9
"""Largest length, in tokens."""

LIMIT = 16 * MIB
"""Largest size of a file of lengths."""

_FORMS: tuple[tuple[str, set[str]], ...] = (
    ("cycle", {"every", "long", "short"}),
    ("uniform", {"min", "max"}),
    ("normal", {"mean", "std"}),
    ("lognormal", {"mean", "sigma"}),
    ("lognormal", {"median", "sigma"}),
    ("exponential", {"mean"}),
    ("zipf", {"alpha", "max"}),
)
"""Families with the keys that each must have."""

_NUMBERS = {"mean": (0, LONGEST), "median": (0, LONGEST), "std": (0, LONGEST)}
_NUMBERS |= {"sigma": (0, 10), "alpha": (1, 100)}
"""Bounds, the lower one excluded, of keys that are not whole numbers."""


@dataclass(frozen=True)
class Cycle:
    """``long`` at every position divisible by ``every``, else ``short``; nothing is random."""

    every: int
    long: int
    short: int

    @property
    def longest(self) -> int:
        return max(self.long, self.short)

    def draw(self, rng: np.random.Generator, size: int) -> NDArray[np.int64]:
        import numpy as np

        return np.where(np.arange(size) % self.every == 0, self.long, self.short).astype(np.int64)


@dataclass(frozen=True)
class Drawn:
    """A family of distributions with its parameters, rounded and clipped to ``min`` … ``max``.

    ``uniform`` has whole numbers from ``min`` to ``max``, both included, all equally likely;
    ``zipf`` has P(n) ∝ n^-alpha over n = 1, 2, 3 …, where values beyond ``max`` count as ``max``.
    A lognormal's ``sigma`` is the standard deviation of the logarithm.
    """

    family: str
    parameters: Mapping[str, float]
    min: int = 1
    max: int | None = None

    @property
    def longest(self) -> int | None:
        """The largest possible length; None if there is no bound."""
        return self.max

    def values(self, rng: np.random.Generator, size: int) -> NDArray[np.float64]:
        """Return ``size`` values before rounding and clipping (zipf's are clipped to ``max``).

        Each takes one uniform number through the inverse of the distribution function, since
        NumPy keeps the stream of uniform numbers between versions, and may change others.
        """
        import numpy as np
        from scipy import special, stats

        p, top, uniform = self.parameters, self.max or LONGEST, rng.random(size)
        if self.family == "zipf":
            # scipy's zipf sums its terms one by one; zeta has their closed form.
            tails = special.zeta(p["alpha"], np.arange(2.0, top + 1.0)) / special.zeta(p["alpha"])
            return (np.searchsorted(1.0 - tails, uniform, side="right") + 1).astype(np.float64)
        frozen: Any
        if self.family == "uniform":
            frozen = stats.uniform(self.min - 0.5, top - self.min + 1)
        elif self.family == "normal":
            frozen = stats.norm(p["mean"], p["std"])
        elif self.family == "exponential":
            frozen = stats.expon(scale=p["mean"])
        else:
            median = p["median"] if "median" in p else p["mean"] * math.exp(-(p["sigma"] ** 2) / 2)
            frozen = stats.lognorm(p["sigma"], scale=median)
        return np.asarray(frozen.ppf(uniform), np.float64)

    def draw(self, rng: np.random.Generator, size: int) -> NDArray[np.int64]:
        """Return ``size`` lengths in tokens; a larger size begins with the same ones."""
        import numpy as np

        rounded = np.floor(self.values(rng, size) + 0.5)
        return np.clip(rounded, self.min, self.max or LONGEST).astype(np.int64)


@dataclass(frozen=True)
class Empirical:
    """The lengths in a file with one per line, all equally likely; drawn with replacement."""

    file: Path
    option: str

    longest = None  # unknown before the file is read

    def lengths(self) -> NDArray[np.int64]:
        """Return the file's lengths in ascending order."""
        import numpy as np

        lengths, where = array("q"), f"{self.option} empirical:{self.file}"
        for number, line in enumerate(io.BytesIO(read_binary(self.file, where, LIMIT)), 1):
            if not line.strip(b"\r\n"):
                continue
            word = line.strip()
            length = int(word) if word.isdigit() and len(word) < 10 else 0  # nearly all lines
            if not length:
                text = word.decode("utf-8", "replace")
                length = _whole(text, f"{where}: line {number}", f"'{shown(text, 40)}'")
            lengths.append(length)
        if not lengths:
            raise UsageError(f"{where}: contains no lengths; write one per line")
        return np.sort(np.array(lengths, np.int64))

    def draw(self, rng: np.random.Generator, size: int) -> NDArray[np.int64]:
        import numpy as np

        lengths = self.lengths()
        return lengths[np.floor(rng.random(size) * len(lengths)).astype(np.int64)]


Lengths = Cycle | Drawn | Empirical


def parse_lengths(text: str, option: str) -> Lengths:
    """Return the distribution that the text of an option describes."""
    text = text.strip()
    place = f"{option} {shown(text)}"
    family, _, rest = text.partition(":")
    if family == "empirical" and rest:
        return Empirical(Path(rest), option)
    parts = rest.split(",")
    is_range = "=" not in text and text.count(":") < 2 and any(map(str.isdecimal, text))
    if is_range:  # 7 or 4:64
        ends = text.split(":")
        family, parts = "uniform", [f"min={ends[0]}", f"max={ends[-1]}"]
    pairs = [part.partition("=") for part in parts]
    values = {key.strip(): value.strip() for key, _, value in pairs}
    more = set() if family == "cycle" else {"min", "max"}
    forms = [keys for name, keys in _FORMS if name == family]
    if len(values) < len(pairs) or not any(k <= values.keys() <= k | more for k in forms):
        raise UsageError(f"{place}: must be {GRAMMAR}")
    numbers = {key: _number(place, key, values[key]) for key in values if key in _NUMBERS}
    whole = {
        key: _whole(value, place, "a length" if is_range else key)
        for key, value in values.items()
        if key not in _NUMBERS
    }
    if family == "cycle":
        return Cycle(**whole)
    drawn = Drawn(family, numbers, **whole)
    if drawn.max is not None and drawn.max < drawn.min:
        raise UsageError(f"{place}: the smaller bound comes first ({drawn.max}:{drawn.min})")
    if family == "zipf" and whole["max"] > 10**6:
        raise UsageError(f"{place}: max of zipf must be at most 1000000")
    return drawn


def _whole(text: str, place: str, what: str) -> int:
    number = parse_whole(text, place, f"{what} must be a whole number")
    if not 1 <= number <= LONGEST:
        raise UsageError(f"{place}: {what} must be at least 1 and at most {LONGEST}")
    return number


def _number(place: str, key: str, value: str) -> float:
    number = float(parse_number(value, place, f"{key} must be a number"))
    low, high = _NUMBERS[key]
    if not low < number <= high:
        raise UsageError(f"{place}: {key} must be above {low} and at most {high}")
    return number
