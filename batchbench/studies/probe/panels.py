"""The streams that the pictures of a probe show: a long request with short ones, and a burst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from batchbench.studies.probe.observations import Role, Round, Stream

MOST_STREAMS = 18
"""Streams of one panel."""


@dataclass(frozen=True)
class Panel:
    """Streams on one time axis."""

    title: str
    streams: Sequence[Stream]

    @property
    def span_ns(self) -> tuple[int, int]:
        begin = min(s.sent_ns for s in self.streams)
        return begin, max((s.last_ns for s in self.streams if s.times_ns), default=begin)

    def part_ns(self, tokens: float) -> tuple[float, float]:
        """Return the beginning and the end of a part with about so many tokens in a row."""
        begin, end = self.span_ns
        longest = tokens * self._gap_ns
        if end - begin <= longest:
            return begin, end
        long = self.streams[0]
        if long.role is Role.LONG and all(s.times_ns > (long.last_ns,) for s in self.streams[1:]):
            begin = int(min(end - longest, max(begin, long.last_ns - 0.6 * longest)))
        return begin, begin + longest

    @property
    def _gap_ns(self) -> float:
        """The median time between arrivals of one stream."""
        gaps = [np.diff(s.arrivals_ns) for s in self.streams if len(s.arrivals_ns) > 1]
        return float(np.median(np.concatenate(gaps))) if gaps else float(np.inf)

    def name(self, stream: Stream) -> str:
        """Return the label of a stream's row."""
        if stream.role is Role.BURST:
            return str(list(self.streams).index(stream) + 1)
        return stream.role.value


def panels_of(rounds: Sequence[Round]) -> list[Panel]:
    """Return the panels of the rounds that show most."""
    panels = []
    joins = [r for r in rounds if r.is_joining and any(s.times_ns for s in r.streams)]
    if joins:
        best = max(joins, key=lambda r: sum(s.answered for s in r.of(Role.SHORT)))
        panels.append(_panel("Short requests while a long one is running", best.streams))
    bursts = [r for r in rounds if r.is_burst and any(s.times_ns for s in r.streams)]
    if bursts:
        last = max(bursts, key=lambda r: (not any(s.failure for s in r.streams), len(r.streams)))
        ordered = sorted(last.streams, key=lambda s: s.times_ns or (1 << 62,))
        panels.append(_panel(f"{len(ordered)} requests at once", ordered))
    return panels


def _panel(title: str, streams: Sequence[Stream]) -> Panel:
    shown = streams[:MOST_STREAMS]
    hidden = len(streams) - len(shown)
    return Panel(f"{title} (the first {len(shown)})" if hidden else title, shown)
