"""The pictures of a result by name, for notebooks and scripts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchbench.reports.result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Plots:
    """Pictures of a result, each a method: ``plots.timeline()`` is a matplotlib ``Figure``.

    ``dir(plots)`` lists them: throughput, latency, occupancy, timeline …, the same that a run
    writes. ``figure.savefig("timeline.svg")`` keeps one.
    """

    result: Result

    def __getattr__(self, name: str) -> Callable[[], Figure]:
        # Not before it is asked for: matplotlib takes half a second.
        from batchbench.reports.figures import PICTURES, draw_one

        if name not in PICTURES:
            raise AttributeError(f"there is no picture {name}; there are {', '.join(PICTURES)}")

        def picture() -> Figure:
            return draw_one(name, self.result.recordings, self.result.title)

        picture.__name__, picture.__doc__ = name, PICTURES[name].__doc__
        return picture

    def __dir__(self) -> list[str]:
        from batchbench.reports.figures import PICTURES

        return [*super().__dir__(), *PICTURES]
