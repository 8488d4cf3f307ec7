"""Kinds of slots in each step, for tests that compare them step by step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchbench.batching.recording import Ints, Recording
from batchbench.reports.occupancy import SlotKinds
from batchbench.reports.statistics import Floats


@dataclass(frozen=True, eq=False)
class Occupancy:
    """The state of the slots in each step, ``[steps]`` each."""

    start_s: Floats
    end_s: Floats
    running: Ints  # slots whose request is not done
    finished: Ints  # slots held by a request that is done
    waiting: Ints


def occupancy(recording: Recording) -> Occupancy:
    """Return the state of the slots in each step."""
    kinds, spans = SlotKinds.of(recording), recording.spans
    return Occupancy(
        start_s=recording.step_starts_ns / 1e9,
        end_s=recording.step_ends_ns / 1e9,
        running=np.repeat(kinds.running, spans.steps),
        finished=np.repeat(kinds.finished, spans.steps),
        waiting=np.repeat(spans.waiting, spans.steps),
    )
