"""Arrivals: the times at which requests are due, and the requests that have not arrived yet."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchbench.errors import UsageError, shown
from batchbench.settings import parse_float

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from batchbench.workloads.request import Request, Workload

GRAMMAR = "at-once, poisson, gamma, constant, trace or ramp:from=1,to=16"

FASTEST = 1e9
"""Largest rate, in requests per second."""

PROCESSES = ("at-once", "poisson", "gamma", "constant", "trace", "ramp")


@dataclass(frozen=True)
class ArrivalProcess:
    """The process by which requests arrive.

    ``rate`` is in requests per second, None if there is none (at once, or a trace's own times).
    Gaps of ``gamma`` have the shape ``burstiness`` and the mean 1 / rate, so that their
    coefficient of variation is burstiness ** -0.5; shape 1 is ``poisson``. A ``ramp`` is a Poisson
    (or gamma) process whose rate goes linearly from ``rate`` to ``end_rate``.
    """

    kind: str
    rate: float | None = None
    end_rate: float | None = None
    burstiness: float = 1.0

    def gaps(self, rng: np.random.Generator, size: int) -> NDArray[np.float64]:
        """Return ``size`` gaps of mean 1, before the rate is applied to them."""
        import numpy as np
        from scipy import stats

        if self.kind == "constant":
            return np.ones(size)
        uniform = rng.random(size)
        if self.burstiness == 1.0:
            return -np.log1p(-uniform)
        scale = 1 / self.burstiness
        return np.asarray(stats.gamma.ppf(uniform, self.burstiness, scale=scale), np.float64)

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
        # The times at which the integral of the rate reaches the sums: begin t + slope t² / 2 =
        # sum, solved without cancellation.
        begin, end = self.rate, self.rate if self.end_rate is None else self.end_rate
        slope = (end**2 - begin**2) / (2 * sums[-1])
        if slope == 0:
            times = sums / begin
        else:
            times = 2 * sums / (begin + np.sqrt(np.maximum(begin**2 + 2 * slope * sums, 0.0)))
        return np.rint(times * 1e9).astype(np.int64)

    def __str__(self) -> str:
        if self.kind == "ramp":
            text = f"ramp from {self.rate:g} to {self.end_rate:g} requests/s"
        elif self.rate is None:
            text = "all at once" if self.kind == "at-once" else "the trace's own times"
        else:
            text = f"{self.kind}, {self.rate:g} requests/s"
        return text + (f", burstiness {self.burstiness:g}" if self.burstiness != 1.0 else "")


def arrival_process(
    arrivals: str | None, request_rate: float | None, burstiness: float, *, trace: bool
) -> ArrivalProcess:
    """Return the process of ``--arrivals``, ``--request-rate`` and ``--burstiness`` together."""
    text = (arrivals or "").strip()
    place = f"--arrivals {shown(text)}"
    kind, colon, rest = text.partition(":")
    wrong = UsageError(f"{place}: must be {GRAMMAR}")
    if not text:
        random = "poisson" if burstiness == 1.0 else "gamma"
        untimed = "trace" if trace else "at-once"
        kind = untimed if request_rate is None else random
    if kind not in PROCESSES or (colon and kind != "ramp"):
        raise wrong
    if kind == "trace" and not trace:
        raise UsageError(f"{place}: there is no trace; give --trace FILE")
    needs_rate = kind in ("poisson", "gamma", "constant")
    if needs_rate and request_rate is None:
        raise UsageError(f"{place}: needs a rate; give --request-rate")
    if not needs_rate and request_rate is not None:
        raise UsageError(f"{place}: takes no separate rate; drop --request-rate")
    if burstiness != 1.0 and kind not in ("gamma", "ramp"):
        raise UsageError(
            f"--burstiness {burstiness:g}: needs random arrivals; give --request-rate and "
            "--arrivals gamma"
        )
    if kind != "ramp":
        return ArrivalProcess(kind, request_rate, None, burstiness)
    pairs = [part.partition("=") for part in rest.split(",")]
    if [name.strip() for name, _, _ in pairs] != ["from", "to"]:
        raise wrong
    begin, end = (parse_float(number, place) for _, _, number in pairs)
    if not (0 < begin <= FASTEST and 0 < end <= FASTEST):
        raise UsageError(f"{place}: both rates must be above 0 and at most {FASTEST:g} requests/s")
    return ArrivalProcess(kind, begin, end, burstiness)


class Arrivals:
    """The requests that have not arrived yet; they arrive in the order of the workload.

    Without ``max_concurrency`` they arrive at fixed times, whatever the server does (an open loop).
    With it, a request arrives at its own time or when fewer than so many are unfinished, whichever
    is later. Without own times this is the classic closed loop of N clients with no think time.
    """

    def __init__(self, workload: Workload) -> None:
        self._requests = iter(workload)
        self._next = next(self._requests, None)
        self.closed_loop = workload.max_concurrency is not None
        """True if a request may arrive because another one finished; only then does the time
        matter at which :meth:`finished` is called."""
        # The time at which room came, for each free place of a closed loop. Requests arrive in
        # order, so the k-th request beyond the first N takes the place of the k-th that finished.
        self._room = deque([0] * min(workload.max_concurrency or 0, len(workload)))

    @property
    def next_due(self) -> int | None:
        """Time in ns at which the next request is due if no other finishes before; None if none
        will be."""
        if self._next is None or not self.closed_loop:
            return self._next and self._next.due_ns
        return max(self._next.due_ns, self._room[0]) if self._room else None

    @property
    def more(self) -> bool:
        """True if some requests have not arrived yet."""
        return self._next is not None

    def due(self, now: int) -> list[Request]:
        """Return the requests that became due by ``now`` since the last call, with that time."""
        due: list[Request] = []
        while self._next is not None and (at := self.next_due) is not None and at <= now:
            due.append(self._next._replace(due_ns=at) if self.closed_loop else self._next)
            if self.closed_loop:
                self._room.popleft()
            self._next = next(self._requests, None)
        return due

    def finished(self, request: Request, now: int) -> None:
        """Report that a request finished at ``now``, the end of the step of its last token."""
        self._room.append(now)
