"""Distributions of lengths, and the grammar in which options and files write them.

A length is drawn in two steps: a value of the distribution (``values``, not rounded), which is
then rounded to the nearest whole number and clipped to ``min`` and ``max``. Values beyond a bound
are not drawn again but count as the bound, so the bounds carry the weight of the tails. Means and
medians are those of the distribution before either step.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchbench.errors import UsageError, shown
from batchbench.files import MIB, open_binary
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

_LONGEST_LINE = 100
"""Largest length of a line, which has one number."""

_MUST = f"must be a whole number of tokens, from 1 to {LONGEST}"


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

    def __str__(self) -> str:
        return f"cycle:every={self.every},long={self.long},short={self.short}"


@dataclass(frozen=True)
class Drawn:
    """A family of distributions with its parameters, rounded and clipped to ``min`` … ``max``.

    ``uniform`` has whole numbers from ``min`` to ``max``, both included, all equally likely;
    ``zipf`` has P(n) ∝ n^-alpha over n = 1, 2, 3 …, where values beyond ``max`` count as ``max``.
    A lognormal's ``sigma`` is the standard deviation of the logarithm.
    """

    family: str
    parameters: tuple[tuple[str, float], ...]
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
        from scipy.special import zeta

        uniform = rng.random(size)
        if self.family != "zipf":
            return np.asarray(self._distribution().ppf(uniform), np.float64)
        # scipy's zipf sums its terms one by one; zeta has their closed form.
        assert self.max is not None
        alpha = dict(self.parameters)["alpha"]
        cumulative = 1.0 - zeta(alpha, np.arange(2.0, self.max + 1.0)) / zeta(alpha)
        return (np.searchsorted(cumulative, uniform, side="right") + 1).astype(np.float64)

    def _distribution(self) -> Any:
        from scipy import stats

        p = dict(self.parameters)
        if self.family == "uniform":
            assert self.max is not None
            return stats.uniform(self.min - 0.5, self.max - self.min + 1)
        if self.family == "normal":
            return stats.norm(p["mean"], p["std"])
        if self.family == "exponential":
            return stats.expon(scale=p["mean"])
        sigma = p["sigma"]
        median = p["median"] if "median" in p else p["mean"] * math.exp(-(sigma**2) / 2)
        return stats.lognorm(sigma, scale=median)

    def draw(self, rng: np.random.Generator, size: int) -> NDArray[np.int64]:
        """Return ``size`` lengths in tokens; a larger size begins with the same ones."""
        import numpy as np

        top = LONGEST if self.max is None else self.max
        rounded = np.floor(self.values(rng, size) + 0.5)
        return np.clip(rounded, self.min, top).astype(np.int64)

    def __str__(self) -> str:
        if self.family == "uniform" and self.min == self.max:
            return f"{self.min}"
        keys = [
            f"{key}={f'{value:.0f}' if value == int(value) else repr(value)}"
            for key, value in self.parameters
        ]
        keys += [f"min={self.min}"] * (self.family == "uniform" or self.min > 1)
        keys += [f"max={self.max}"] * (self.max is not None)
        return f"{self.family}:{','.join(keys)}"


@dataclass(frozen=True)
class Empirical:
    """The lengths in a file with one per line, all equally likely; drawn with replacement."""

    file: Path
    option: str

    @property
    def longest(self) -> None:
        """Unknown before the file is read."""

    def lengths(self) -> NDArray[np.int64]:
        """Return the file's lengths in ascending order.

        Raises:
            UsageError: it cannot be read, or a line is not a length.
        """
        import numpy as np

        lengths = array("q")
        where = f"{self.option} empirical:{self.file}"
        with open_binary(self.file, where, LIMIT) as lines:
            number = 0
            while line := lines.readline(_LONGEST_LINE):
                number += 1
                if line.strip(b"\r\n"):
                    lengths.append(_length(line, f"{where}: line {number}"))
        if not lengths:
            raise UsageError(f"{where}: contains no lengths; write one per line")
        return np.sort(np.array(lengths, np.int64))

    def draw(self, rng: np.random.Generator, size: int) -> NDArray[np.int64]:
        import numpy as np

        lengths = self.lengths()
        return lengths[np.floor(rng.random(size) * len(lengths)).astype(np.int64)]

    def __str__(self) -> str:
        return f"empirical:{self.file}"


Lengths = Cycle | Drawn | Empirical


def _length(line: bytes, where: str) -> int:
    word = line.strip()
    if word.isdigit() and len(word) < 10:  # ASCII digits, which nearly all lines are
        length = int(word)
    else:
        text = word.decode("utf-8", "replace")
        where = f"{where}: '{shown(text, 40)}' is not a length"
        length = parse_whole(text, where, _MUST)
    if not 1 <= length <= LONGEST:
        raise UsageError(f"{where}: {length} is not a length: {_MUST}")
    return length


_FAMILIES: dict[str, tuple[tuple[str, ...], ...]] = {
    "normal": (("mean", "std"),),
    "lognormal": (("mean", "sigma"), ("median", "sigma")),
    "exponential": (("mean",),),
    "zipf": (("alpha",),),
}
"""The sets of parameters that describe each family."""


def parse_lengths(text: str, option: str) -> Lengths:
    """Return the distribution that ``text`` describes.

    Raises:
        UsageError: the text does not follow the grammar; the message names ``option``.
    """
    text = text.strip()
    place = f"{option} {shown(text)}"
    wrong = UsageError(f"{place}: must be {GRAMMAR}")
    family, _, rest = text.partition(":")
    if family == "empirical" and rest:
        return Empirical(Path(rest), option)
    if "=" not in text:  # 7 or 4:64
        parts = text.split(":")
        if len(parts) > 2 or not any(char.isdecimal() for char in text):
            raise wrong
        whole = [_whole(place, "a length", part) for part in parts]
        return _uniform(place, whole[0], whole[-1])
    values: dict[str, str] = {}
    for part in rest.split(","):
        key, equals, value = part.partition("=")
        if not equals or key.strip() in values:
            raise wrong
        values[key.strip()] = value.strip()
    if family in ("uniform", "cycle"):
        keys = ("min", "max") if family == "uniform" else ("every", "long", "short")
        if values.keys() != set(keys):
            raise wrong
        whole = [_whole(place, key, values[key]) for key in keys]
        return _uniform(place, *whole) if family == "uniform" else Cycle(*whole)
    bounds = {key: _whole(place, key, values.pop(key)) for key in ("min", "max") if key in values}
    described = next((k for k in _FAMILIES.get(family, ()) if values.keys() == set(k)), ())
    if not described or (family == "zipf" and "max" not in bounds):
        raise wrong
    numbers = tuple((key, _number(place, key, values[key])) for key in described)
    _check_bounds(place, **bounds)
    if family == "zipf" and bounds["max"] > 10**6:
        raise UsageError(f"{place}: max of zipf must be at most 1000000")
    return Drawn(family, numbers, **bounds)


def _whole(place: str, key: str, value: str) -> int:
    number = parse_whole(value, place, f"{key} must be a whole number")
    if not 1 <= number <= LONGEST:
        raise UsageError(f"{place}: {key} must be at least 1 and at most {LONGEST}")
    return number


def _number(place: str, key: str, value: str) -> float:
    number = float(parse_number(value, place, f"{key} must be a number"))
    low, high = {"sigma": (0, 10), "alpha": (1, 100)}.get(key, (0, LONGEST))
    if not low < number <= high:
        raise UsageError(f"{place}: {key} must be above {low} and at most {high}")
    return number


def _uniform(place: str, low: int, high: int) -> Drawn:
    _check_bounds(place, low, high)
    return Drawn("uniform", (), low, high)


def _check_bounds(place: str, min: int = 1, max: int | None = None) -> None:
    if max is not None and max < min:
        raise UsageError(f"{place}: the smaller bound comes first ({max}:{min})")
