"""How the steps of a simulated span differ: each may cost a little more than the one before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class GrowthLog:
    """How the steps of a simulated span differ, ``[spans]`` each, in picoseconds.

    Step i of a span costs ``1000 × step_ns + rest + i × growth``, and its first begins ``beyond``
    after ``start_ns``. In integers, since floats added one by one and at once differ.
    """

    beyond_ps: Ints
    rest_ps: Ints
    growth_ps: Ints

    def of(self, spans: Ints) -> GrowthLog:
        """A row for each of these spans."""
        return GrowthLog(self.beyond_ps[spans], self.rest_ps[spans], self.growth_ps[spans])

    @property
    def is_none(self) -> NDArray[np.bool_]:
        """Return True for each span whose steps take the same whole number of nanoseconds."""
        none: NDArray[np.bool_] = (self.rest_ps == 0) & (self.growth_ps == 0)
        return none

    def after(self, steps: Ints) -> Ints:
        """Picoseconds beyond the whole nanoseconds of so many steps, ``[spans]``."""
        grown: Ints = self.growth_ps * (steps * (steps - 1) // 2)
        return self.beyond_ps + steps * self.rest_ps + grown


def goes_on(steps: Ints, step_ns: Ints, growth: GrowthLog | None) -> NDArray[np.bool_]:
    """Whether each span's steps cost what they would as the last span's, ``[spans - 1]``."""
    if growth is None:
        same: NDArray[np.bool_] = step_ns[1:] == step_ns[:-1]
        return same
    first = 1000 * step_ns + growth.rest_ps
    on: NDArray[np.bool_] = first[1:] == (first + steps * growth.growth_ps)[:-1]
    on &= growth.growth_ps[1:] == growth.growth_ps[:-1]
    on &= growth.beyond_ps[1:] == growth.after(steps)[:-1] % 1000
    return on
