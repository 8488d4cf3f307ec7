"""Slots over time: the request in each slot, and the activity of each slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchbench.batching.recording import Ints, Recording
from batchbench.reports.statistics import Floats

MOST_LEVELS = 1_000
"""Levels of a drawn line: more are narrower than a pixel."""


class Holdings(NamedTuple):
    """Times at which each request took and left its slot, in ns, ``[requests]`` each."""

    request: Ints
    slot: Ints
    admitted: Ints  # start of the first step in which it holds its slot
    first: Ints  # end of the step of its first token
    done: Ints  # end of the step of its last token
    freed: Ints  # end of the last step in which its slot is held

    @classmethod
    def of(cls, recording: Recording) -> Holdings:
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
        return Holdings(*(column[chosen] for column in self))


class SlotKinds(NamedTuple):
    """Number of slots of each kind in each span, ``[spans]`` each; they add up to all slots."""

    useful: Ints  # decode a token that was asked for
    finished: Ints  # held by a request that is done
    empty: Ints
    prompts: Ints  # have a piece of their prompt computed
    stalled: Ints  # hold a request that is not done, and nothing is computed for it

    @classmethod
    def of(cls, recording: Recording) -> SlotKinds:
        """Count at the first step of each span: within a span nothing changes."""
        r, s, step = recording.requests, recording.spans, recording.first_steps
        released = np.searchsorted(np.sort(r.released), step, side="right")
        held = np.searchsorted(np.sort(r.admitted), step, side="right") - released
        finished = np.searchsorted(np.sort(r.last), step) - released
        useful = np.where(s.decoding > 0, s.decoding - finished, 0)
        empty = recording.header.slots - held
        return cls(useful, finished, empty, s.chunks, held - finished - useful - s.chunks)

    @property
    def running(self) -> Ints:
        """Slots whose request is not done."""
        return self.useful + self.prompts + self.stalled


def prompt_tokens_of_spans(recording: Recording) -> tuple[Ints, Ints]:
    """Return the prompt tokens of each span, and those of prompts as long as its longest."""
    chunks, size = recording.spans.chunks, recording.chunks.stop - recording.chunks.start
    reads, (tokens, longest) = chunks > 0, np.zeros((2, len(chunks)), np.int64)
    begins = (np.cumsum(chunks) - chunks)[reads]
    tokens[reads], longest[reads] = (total.reduceat(size, begins) for total in (np.add, np.maximum))
    return tokens, longest * chunks


@dataclass(frozen=True, eq=False)
class Levels:
    """Slots and queue, constant between edges: ``edges_ns`` is ``[levels + 1]``."""

    edges_ns: Floats
    running: Floats  # slots whose request is not done
    finished: Floats  # slots held by a request that is done
    waiting: Floats  # requests that are due and not admitted
    mean_over_ns: float = 0.0  # 0 if nothing was averaged

    def thinned(self) -> Levels:
        """Return at most as many levels as can be seen: means over equal times, so areas stay."""
        if len(self.running) <= MOST_LEVELS:
            return self
        edges = np.linspace(self.edges_ns[0], self.edges_ns[-1], MOST_LEVELS + 1)
        widths = np.diff(self.edges_ns)
        running, finished, waiting = (
            np.diff(np.interp(edges, self.edges_ns, [0.0, *np.cumsum(levels * widths)]))
            / np.diff(edges)
            for levels in (self.running, self.finished, self.waiting)
        )
        return Levels(edges, running, finished, waiting, float(edges[1] - edges[0]))


def levels_of(recording: Recording) -> Levels:
    held = Holdings.of(recording)
    due = np.minimum(recording.requests.due_ns, held.admitted)
    events = [np.sort(at) for at in (due, held.admitted, held.done, held.freed)]
    edges = np.unique(np.concatenate([[0], *events]))
    # Requests that have arrived, been admitted, been completed and left by each edge.
    arrived, admitted, done, left = (
        np.searchsorted(at, edges[:-1], side="right").astype(np.float64) for at in events
    )
    return Levels(edges.astype(np.float64), admitted - done, done - left, arrived - admitted)
