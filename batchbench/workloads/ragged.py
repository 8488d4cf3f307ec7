"""Rows of different lengths, end to end in one array."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Ragged:
    """Row ``i`` is ``values[offsets[i]:offsets[i + 1]]``; ``offsets`` is ``[rows + 1]``."""

    values: NDArray[Any]
    offsets: Ints

    @classmethod
    def of(cls, values: NDArray[Any], lengths: NDArray[Any]) -> Ragged:
        """Rows of these lengths, ``[rows]``."""
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])  # in place: lengths may be those of a million rows
        return cls(values, offsets)

    @property
    def lengths(self) -> Ints:
        """Length of each row, ``[rows]``."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> NDArray[Any]:
        """One row."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def take(self, rows: Ints, lengths: Ints | None = None) -> Ragged:
        """These rows in this order, each cut to its length of ``lengths``, ``[len(rows)]``."""
        kept = self.lengths[rows] if lengths is None else lengths
        found = Ragged.of(np.empty(int(kept.sum()), self.values.dtype), kept)
        # Where each value comes from: its row's begin, and its place in the row.
        places = np.arange(len(found.values)) - np.repeat(found.offsets[:-1], kept)
        np.take(self.values, places + np.repeat(self.offsets[:-1][rows], kept), out=found.values)
        return found
