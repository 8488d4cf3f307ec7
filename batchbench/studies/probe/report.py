"""The report of a probe: a sentence, what each test saw, the streams, and the JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.text import Text

from batchbench.files import write_whole
from batchbench.json_file import envelope, json_text
from batchbench.reports.figures import figure_bytes
from batchbench.reports.figures.card import (
    FAINT,
    INK,
    LOOKS,
    WIDE,
    house_style,
    make_card,
    strip_axes,
)
from batchbench.reports.text import clean_text, percent, plural, spell_time
from batchbench.studies.probe.ask import Findings
from batchbench.studies.probe.judge import Burst, Joining, Kind, SharedSteps, Verdict
from batchbench.studies.probe.observations import Pace, Role, Round, Stream

SCHEMA_VERSION = 1

TOKEN = "│"  # a token; those of one step make a vertical line
COLUMNS_A_TOKEN = 2.5  # the fewest columns from one token to the next
MOST_STREAMS = 18  # streams of one panel
_MS = 1e6


def headline(verdict: Verdict) -> str:
    """Return the answer in a few words."""
    if verdict.kind is Kind.SERIAL:
        return "serial, one request at a time"
    if verdict.slots is None:
        return verdict.kind.value
    least = "at least " * verdict.slots_is_lower_bound
    return f"{verdict.kind.value} batching with {least}{plural(verdict.slots, 'slot')}"


def sentence(findings: Findings) -> str:
    """Return the answer in one sentence."""
    verdict = findings.verdict
    return f"{findings.target}: {headline(verdict)}: {verdict.reason}."


# Tests


def tests_of(findings: Findings) -> dict[str, str]:
    """Return what each test saw, by its name and in plain English."""
    verdict, rows = findings.verdict, dict[str, str]()
    if verdict.pace and verdict.joining and verdict.shared:
        rows["One alone"] = _alone(verdict.pace)
        rows["Joining"] = _joining(verdict.joining, verdict.pace)
        if verdict.shared.compared:
            rows["Shared steps"] = _shared(verdict.shared)
    if verdict.bursts:
        rows["Slots"] = _slots(verdict.bursts[-2:])
    rows["Server says"] = _server(findings)
    if verdict.busy:
        rows["Others"] = f"{'; '.join(verdict.busy)}."
    streams = findings.observations.streams
    if hidden := sum(bool(s.hidden) for s in streams):
        text = f"{plural(hidden, 'request')} showed no token, though the server counts some."
        rows["Left out"] = text
    if findings.failures:
        failed = plural(sum(bool(s.failure) for s in streams), "request")
        rows["Failed"] = f"{failed}; the first: {findings.failures[0]}"
    return rows


def _ms(ns: float) -> str:
    return f"{ns / _MS:.3g} ms" if ns < 1e9 else f"{ns / 1e9:.3g} s"


def _alone(pace: Pace) -> str:
    if pace.buffered:
        return (
            f"A request takes {_ms(pace.e2e_ns(10))} for 10 tokens, about {_ms(pace.gap_ns)} a "
            "token. The server sends them all at the end."
        )
    chunks = f", {pace.chunk} together" if pace.chunk > 1 else ""
    first = f"The first token comes after {_ms(pace.ttft_ns)}"
    return f"{first}, then one every {_ms(pace.gap_ns)}{chunks}."


def _joining(seen: Joining, pace: Pace) -> str:
    parts = []
    of_all = f"of {plural(seen.joined + seen.waited, 'short request')}"
    if seen.joined:
        share = percent(float(np.median([wait for wait in seen.waits if wait < 1] or [0.0])))
        begun = "ended" if pace.buffered else "got the first token"
        parts.append(
            f"{seen.joined} {of_all} {begun} while a long one was running; they waited for about "
            f"{share} of the time that it had left"
        )
    if seen.waited:
        parts.append(f"{seen.waited} {of_all} waited until the long one had ended")
    if seen.refused:
        parts.append(f"the server refused {plural(seen.refused, 'short request')} meanwhile")
    return f"{'; '.join(parts) or 'No short request could be compared with a long one'}."


def _shared(seen: SharedSteps) -> str:
    within = f"within {percent(seen.window)} of a step"
    text = (
        f"{seen.together} of {plural(seen.compared, 'short request')} got their tokens together "
        f"with the long one, {within} (the time of one token)"
    )
    if seen.buffered:
        pairs = plural(seen.compared, "pair")
        text = f"{seen.together} of {pairs} ended together {within}, although the second request "
        text += "was sent later"
    text += f". By chance about {2 * seen.window * seen.compared:.1f} would."
    if seen.shown and seen.apart and not seen.buffered:
        text += f" {seen.apart} did not: replicas or a busy machine can cause it."
    return text


def _slots(last: Sequence[Burst]) -> str:
    seen = list(dict.fromkeys(map(_burst, last)))
    twice = " The same happened a second time." if len(last) > len(seen) else ""
    gain = float(np.median([burst.gain for burst in last]))
    return (
        f"{' '.join(seen)}{twice} Together they got {gain:.1f} times the tokens per second of one "
        "alone."
    )


def _burst(burst: Burst) -> str:
    if burst.sequential:
        return f"{burst.sent} requests sent at once ran one after another."
    text = f"Of {burst.sent} requests sent at once, {burst.most} ran at the same time"
    if burst.refused:
        text += f", and the server refused {burst.refused}"
    elif burst.exact and burst.midway:
        text += ", and each of the others began when one had ended"
    elif burst.exact:
        text += f", in {len(burst.groups)} groups one after another"
    elif burst.most == burst.sent:
        text += ", so there may be more slots"
    return f"{text}."


def _server(findings: Findings) -> str:
    dialect, server = findings.dialect, findings.observations.server
    name = f"{dialect.name} {dialect.version or ''}".strip()
    parts = [name if dialect.name != "openai" else "nothing about itself"]
    if server.slots is not None:
        parts.append(plural(server.slots, "slot"))
    if server.passes and server.tokens:
        passes = plural(server.passes, "forward pass", "forward passes")
        parts.append(f"{passes} for {plural(server.tokens, 'token')}")
    return f"{', '.join(parts)}."


# Streams


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
        """Return the beginning and the end of a part with about so many tokens in a row.

        It is the beginning, or the end of a long request if the others wait for it.
        """
        begin, end = self.span_ns
        gaps = [np.diff(s.arrivals_ns) for s in self.streams if len(s.arrivals_ns) > 1]
        longest = tokens * float(np.median(np.concatenate(gaps))) if gaps else np.inf
        if end - begin <= longest:
            return begin, end
        long = self.streams[0]
        if long.role is Role.LONG and all(s.times_ns > (long.last_ns,) for s in self.streams[1:]):
            begin = int(min(end - longest, max(begin, long.last_ns - 0.6 * longest)))
        return begin, begin + longest

    @property
    def names(self) -> list[str]:
        """The label of each stream's row."""
        return [
            str(number) if stream.role is Role.BURST else stream.role.value
            for number, stream in enumerate(self.streams, 1)
        ]


def panels_of(rounds: Sequence[Round]) -> list[Panel]:
    """Return the panels of the rounds that show most."""
    seen = [r for r in rounds if any(s.times_ns for s in r.streams)]
    panels: dict[str, Sequence[Stream]] = {}
    if joins := [r for r in seen if r.of(Role.LONG)]:
        best = max(joins, key=lambda r: sum(s.answered for s in r.of(Role.SHORT)))
        panels["Short requests while a long one is running"] = best.streams
    if bursts := [r for r in seen if r.of(Role.BURST)]:
        last = max(bursts, key=lambda r: (not any(s.failure for s in r.streams), len(r.streams)))
        ordered = sorted(last.streams, key=lambda s: s.times_ns or (1 << 62,))
        panels[f"{len(ordered)} requests at once"] = ordered
    part = f" (the first {MOST_STREAMS})"
    return [
        Panel(title + part * (len(streams) > MOST_STREAMS), streams[:MOST_STREAMS])
        for title, streams in panels.items()
    ]


# The terminal


def render(findings: Findings, width: int) -> RenderableType:
    """Return the report for a terminal of so many columns."""
    tests = {**tests_of(findings), "Time": f"The probe took {spell_time(findings.took_s)}."}
    left = max(map(len, tests)) + 2
    lines = [
        textwrap.fill(
            text,
            max(20 + left, width - 1),
            initial_indent=f"{name:<{left}}",
            subsequent_indent=" " * left,
        )
        for name, text in tests.items()
    ]
    answer = textwrap.fill(sentence(findings), width, break_on_hyphens=False)
    parts: list[RenderableType] = [Text(answer, "bold"), "", Text("\n".join(lines))]
    panels = panels_of(findings.observations.rounds)
    for panel in panels:
        parts += ["", Text(panel.title, "bold"), Text("\n".join(rows_of(panel, width)))]
    if panels:
        parts += ["", Text(f"· waiting   {TOKEN} token   ─ between tokens")]
    return Group(*parts)


def rows_of(panel: Panel, width: int) -> list[str]:
    """Return a row of characters for each stream, all on one time axis, and the axis.

    It shows a part if tokens would not have columns of their own.
    """
    left = max(map(len, panel.names)) + 1
    columns = max(10, width - left - 1)
    begin, end = panel.part_ns(columns / COLUMNS_A_TOKEN)
    scale = (columns - 1) / max(end - begin, 1)
    rows = [
        f"{name:<{left}}{_row(stream, begin, scale, columns)}".rstrip()
        for name, stream in zip(panel.names, panel.streams, strict=True)
        if stream.sent_ns < end
    ]
    first, last = (f"{(time - panel.span_ns[0]) / 1e9:.3g} s" for time in (begin, end))
    return [*rows, " " * left + first + last.rjust(columns - len(first))]


def _row(stream: Stream, begin: float, scale: float, columns: int) -> str:
    sent, *tokens = (round((time - begin) * scale) for time in (stream.sent_ns, *stream.times_ns))
    if not tokens:
        return " " * max(0, min(sent, columns - len(stream.lack))) + stream.lack
    cells = [" "] * columns
    for i in range(max(0, sent), min(tokens[-1] + 1, columns)):
        cells[i] = "·" if i < tokens[0] else "─"
    for i in tokens:
        if 0 <= i < columns:
            cells[i] = TOKEN
    return "".join(cells)


# The picture

_LEFT, _ROW, _BETWEEN = 0.55, 0.17, 0.8  # inches

_NOTES = (
    "A row is one request: dotted while it waits for its first token, then a mark for each token. "
    "Marks in one column are tokens of one step."
)


def draw_streams(panels: Sequence[Panel], headline: str, title: str) -> Figure:
    """Draw each panel with its own time axis."""
    with house_style():
        heights = [max(0.5, _ROW * len(panel.streams)) for panel in panels]
        body = sum(heights) + _BETWEEN * len(panels) - 0.1
        answer = headline[:1].upper() + headline[1:]
        card = make_card(answer, clean_text(title), body, _NOTES if panels else "")
        top = 0.28
        for panel, height in zip(panels, heights, strict=True):
            card.write(0, top - 0.26, panel.title, size=10.5, weight="bold")
            _draw(card.axes(_LEFT, top, WIDE - _LEFT, height), panel)
            top += height + _BETWEEN
    return card.figure


def _draw(axes: Axes, panel: Panel) -> None:
    begin, end = panel.span_ns
    long, short = LOOKS["continuous"][0], LOOKS["static"][0]
    for row, stream in enumerate(panel.streams):
        colour = short if stream.role is Role.SHORT else long
        sent, *times = ((time - begin) / 1e9 for time in (stream.sent_ns, *stream.times_ns))
        if not times:
            axes.text(sent, row, stream.lack, va="center", size=8, color=INK)
            continue
        axes.plot([sent, times[0]], [row, row], color=colour, lw=1, ls=":")
        axes.plot([times[0], times[-1]], [row, row], color=FAINT, lw=1, zorder=0)
        axes.plot(times, [row] * len(times), ls="", marker="|", ms=8, mew=1.1, color=colour)
    axes.set(ylim=(len(panel.streams) - 0.4, -0.6), xlim=(0, (end - begin) / 1e9 * 1.005 or 1))
    strip_axes(axes, "bottom")  # which formats ticks, so before they get names
    axes.set_yticks(range(len(panel.streams)), panel.names)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.set_xlabel("seconds", size=8.5)


# Files


def data_of(findings: Findings, command: str) -> dict[str, Any]:
    """Return the data of ``probe.json``; a value without meaning is null."""
    verdict, seen = findings.verdict, findings.observations
    pace = verdict.pace
    begin = min((s.sent_ns for s in seen.streams), default=0)
    return {
        **envelope(SCHEMA_VERSION, command),
        "target": findings.target,
        "server": {
            "name": findings.dialect.name,
            "version": findings.dialect.version,
            "model": findings.model,
            "slots": seen.server.slots,
            "passes": seen.server.passes,
        },
        "verdict": verdict.kind.value,
        "slots": verdict.slots,
        "slots_is_lower_bound": verdict.slots_is_lower_bound,
        "evidence": {
            "reason": verdict.reason,
            "alone": pace
            and {
                "ttft_ms": pace.ttft_ns / _MS,
                "gap_ms": pace.gap_ns / _MS,
                "tokens_per_chunk": pace.chunk,
                "buffered": pace.buffered,
            },
            "joining": _fields(verdict.joining, _JOINING),
            "shared_steps": _fields(verdict.shared, _SHARED),
            "bursts": [_fields(burst, _BURST) for burst in verdict.bursts],
            "others": list(verdict.busy),
            "failures": list(findings.failures),
            "client_lag_ms": seen.lag_ns / _MS,
            "duration": findings.took_s,
            "tests": tests_of(findings),
            # Times in ms since the first request was sent.
            "rounds": [[_stream(s, begin) for s in round.streams] for round in seen.rounds],
        },
    }


_JOINING = "joined waited refused unclear wait_shares=waits"
_SHARED = "compared together apart window offsets probability=chance"
_BURST = "sent refused groups most_at_once=most full=exact began_midway=midway throughput_gain=gain"


def _fields(value: object, names: str) -> dict[str, Any] | None:
    """Return attributes, each under its name or as ``name=attribute``; None for no value."""
    pairs = [name.partition("=") for name in names.split()]
    return {key: getattr(value, name or key) for key, _, name in pairs} if value else None


def _stream(stream: Stream, begin: int) -> Mapping[str, Any]:
    return {
        "role": stream.role.value,
        "asked": stream.asked,
        "sent_ms": (stream.sent_ns - begin) / _MS,
        "token_ms": [(time - begin) / _MS for time in stream.times_ns],
        "failure": stream.failure or stream.lack or None,
    }


def write_probe(folder: Path, findings: Findings, data: Mapping[str, Any]) -> list[Path]:
    """Write ``probe.json`` and the picture; return their paths."""
    title = f"{findings.target} · {_server(findings).rstrip('.')}"
    figure = draw_streams(
        panels_of(findings.observations.rounds), headline(findings.verdict), title
    )
    pictures = {f"probe.{format}": figure_bytes(figure, format) for format in ("png", "svg")}
    return write_whole(folder, {"probe.json": json_text(data), **pictures})
