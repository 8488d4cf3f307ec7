"""Arrival times: when requests come in, as processes of a given rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchbench.errors import UsageError, shown
from batchbench.settings import parse_float

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GRAMMAR = "at-once, poisson, gamma, constant, trace or ramp:from=1,to=16"

FASTEST = 1e9
"""Largest rate, in requests a second."""

PROCESSES = ("at-once", "poisson", "gamma", "constant", "trace", "ramp")


@dataclass(frozen=True)
class ArrivalProcess:
    """The process by which requests arrive.

    ``rate`` is in requests a second, None if there is none (at once, or a trace's own times).
    Gaps of ``gamma`` have the shape ``burstiness`` and the mean 1 / rate, so that their
    coefficient of variation is burstiness ** -0.5; shape 1 is ``poisson``. A ``ramp`` is a Poisson
    (or gamma) process whose rate goes linearly from ``rate`` to ``end_rate``.
    """

    kind: str
    rate: float | None = None
    end_rate: float | None = None
    burstiness: float = 1.0

    def gaps(self, rng: np.random.Generator, size: int) -> NDArray[np.float64]:
        """``size`` gaps of mean 1, before the rate is applied to them."""
        import numpy as np
        from scipy import stats

        if self.kind == "constant":
            return np.ones(size)
        uniform = rng.random(size)
        if self.burstiness == 1.0:
            return -np.log1p(-uniform)
        found: NDArray[np.float64] = stats.gamma.ppf(
            uniform, self.burstiness, scale=1 / self.burstiness
        )
        return found

    def due_ns(self, rng: np.random.Generator, size: int) -> NDArray[np.int64]:
        """Return ``size`` times in ns, ascending.

        The first request comes at 0 and the last after ``size`` - 1 gaps that are 1 / rate on
        average: all gaps are scaled by one factor, so that a short run has the requested
        rate, as in ``vllm bench serve``. The last request of a ramp comes when the rate reaches
        ``end_rate``.
        """
        import numpy as np

        if self.rate is None or size < 2:
            return np.zeros(size, np.int64)
        sums = np.concatenate([[0.0], np.cumsum(self.gaps(rng, size - 1))])
        if sums[-1] > 0:
            sums = sums / sums[-1] * (size - 1)
        sums[-1] = size - 1  # not rounded; and all gaps of a very bursty process may underflow
        return np.rint(self._times(sums) * 1e9).astype(np.int64)

    def _times(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the times in s at which the integral of the rate reaches ``sums``."""
        import numpy as np

        assert self.rate is not None
        begin, end = self.rate, self.rate if self.end_rate is None else self.end_rate
        slope = (end**2 - begin**2) / (2 * sums[-1])
        if slope == 0:
            return sums / begin
        # begin t + slope t² / 2 = sum, solved without cancellation.
        root = np.sqrt(np.maximum(begin**2 + 2 * slope * sums, 0.0))
        times: NDArray[np.float64] = 2 * sums / (begin + root)
        return times

    def __str__(self) -> str:
        if self.kind == "ramp":
            text = f"ramp from {self.rate:g} to {self.end_rate:g} requests/s"
        elif self.rate is None:
            return "all at once" if self.kind == "at-once" else "the trace's own times"
        else:
            text = f"{self.kind}, {self.rate:g} requests/s"
        return text + (f", burstiness {self.burstiness:g}" if self.burstiness != 1.0 else "")


def arrival_process(
    arrivals: str | None, request_rate: float | None, burstiness: float, *, trace: bool
) -> ArrivalProcess:
    """The process that ``--arrivals``, ``--request-rate`` and ``--burstiness`` name together.

    Raises:
        UsageError: they contradict each other, or one lacks another.
    """
    asked = "" if arrivals is None else arrivals.strip()
    kind = asked.partition(":")[0] or _usual(request_rate, burstiness, trace)
    if kind not in PROCESSES or (":" in asked and kind != "ramp"):
        raise UsageError(f"--arrivals {shown(asked)}: must be {GRAMMAR}")
    if kind == "trace" and not trace:
        raise UsageError(f"--arrivals {kind}: there is none; give --trace FILE")
    if kind in ("poisson", "gamma", "constant") and request_rate is None:
        raise UsageError(f"--arrivals {kind}: needs a rate; give --request-rate")
    if kind in ("at-once", "trace", "ramp") and request_rate is not None:
        raise UsageError(f"--arrivals {shown(asked)}: takes no separate rate; drop --request-rate")
    if burstiness != 1.0 and kind in ("at-once", "trace", "constant", "poisson"):
        told = {"poisson": "is 1 for poisson; take --arrivals gamma"}.get(
            kind, "needs random arrivals; give --request-rate"
        )
        raise UsageError(f"--burstiness {burstiness:g}: {told}")
    if kind == "ramp":
        return ArrivalProcess(kind, *_ramp(asked), burstiness)
    return ArrivalProcess(kind, request_rate, None, burstiness)


def _usual(request_rate: float | None, burstiness: float, trace: bool) -> str:
    if request_rate is not None:
        return "gamma" if burstiness != 1.0 else "poisson"
    return "trace" if trace else "at-once"


def _ramp(text: str) -> tuple[float, float]:
    place = f"--arrivals {shown(text)}"
    names, numbers = [], []
    for part in text.partition(":")[2].split(","):
        name, _, number = part.partition("=")
        names.append(name.strip())
        numbers.append(number)
    if names != ["from", "to"]:
        raise UsageError(f"{place}: must be {GRAMMAR}")
    begin, end = (parse_float(number, place) for number in numbers)
    if not (0 < begin <= FASTEST and 0 < end <= FASTEST):
        raise UsageError(f"{place}: both rates must be above 0 and at most {FASTEST:g} requests/s")
    return begin, end
