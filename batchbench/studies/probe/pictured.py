"""The streams that the pictures of a probe show: a long request with short ones, and a burst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchbench.studies.probe.observations import Role, Round, Stream

MOST_STREAMS = 18
"""Streams of one panel."""


@dataclass(frozen=True)
class Panel:
    """Streams on one time axis.

    Attributes:
        hidden: streams of the round that are left out.
    """

    title: str
    streams: Sequence[Stream]
    hidden: int

    @property
    def span_ns(self) -> tuple[int, int]:
        begin = min(s.sent_ns for s in self.streams)
        return begin, max((s.last_ns for s in self.streams if s.times_ns), default=begin)

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
    return Panel(f"{title} (the first {len(shown)})" if hidden else title, shown, hidden)
