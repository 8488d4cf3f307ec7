"""Slots over time: which request held which slot, and how many were busy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchbench.batching.recording import Ints, Recording
from batchbench.reports.statistics import Floats

MOST_LEVELS = 1_000

"""Levels of a drawn line: more are narrower than a pixel."""


@dataclass(frozen=True, eq=False)
class Levels:
    """What is constant between edges: ``edges_ns`` is ``[levels + 1]``, the rest ``[levels]``."""

    edges_ns: Floats
    running: Floats  # slots whose request is not done
    finished: Floats  # slots held by a request that is done
    waiting: Floats  # requests that are due and not admitted
    mean_over_ns: float = 0.0  # 0 where nothing was averaged

    def thinned(self) -> Levels:
        """At most as many levels as can be seen: means over equal times, so areas stay."""
        if len(self.running) <= MOST_LEVELS:
            return self
        edges = np.linspace(self.edges_ns[0], self.edges_ns[-1], MOST_LEVELS + 1)

        def means(levels: Floats) -> Floats:
            area = np.concatenate([[0.0], np.cumsum(levels * np.diff(self.edges_ns))])
            mean: Floats = np.diff(np.interp(edges, self.edges_ns, area)) / np.diff(edges)
            return mean

        running, finished, waiting = (
            means(levels) for levels in (self.running, self.finished, self.waiting)
        )
        return Levels(edges, running, finished, waiting, float(edges[1] - edges[0]))


def levels_of(recording: Recording) -> Levels:
    """Slots and queue over time."""
    held = Holdings.of(recording)
    due = np.minimum(recording.requests.due_ns, held.admitted)
    events = [np.sort(at) for at in (due, held.admitted, held.done, held.freed)]
    edges = np.unique(np.concatenate([[0], *events]))
    # How many came due, came in, were done and left by each edge.
    arrived, admitted, done, left = (
        np.searchsorted(at, edges[:-1], side="right").astype(np.float64) for at in events
    )
    return Levels(edges.astype(np.float64), admitted - done, done - left, arrived - admitted)


@dataclass(frozen=True, eq=False)
class Holdings:
    """When each request held its slot, in ns, ``[requests]`` each."""

    request: Ints
    slot: Ints
    admitted: Ints  # start of the first step in which it holds its slot
    first: Ints  # end of the step of its first token
    done: Ints  # end of the step of its last token
    freed: Ints  # end of the last step in which its slot is held

    @classmethod
    def of(cls, recording: Recording) -> Holdings:
        """All requests of a trial, in the order of their index."""
        r = recording.requests
        return cls(
            request=np.arange(len(r.slot)),
            slot=r.slot,
            admitted=recording.starts_of(r.admitted),
            first=recording.ends_of(r.first),
            done=recording.ends_of(r.last),
            freed=recording.ends_of(r.released - 1),
        )

    def where(self, chosen: NDArray[np.bool_]) -> Holdings:
        """Some of them."""
        return Holdings(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))
