"""The report of a probe: a sentence, what each test saw, rows of characters, and the JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench.files import write_whole
from batchbench.json_file import envelope, json_text
from batchbench.reports.figures import figure_bytes
from batchbench.reports.text import joined, number, percent, plural, spell_time
from batchbench.studies.probe.ask import Findings
from batchbench.studies.probe.figure import draw_streams
from batchbench.studies.probe.judge import CHANCE, WINDOW, Burst, Kind, Verdict
from batchbench.studies.probe.observations import Role, Round, Stream
from batchbench.studies.probe.pictured import Panel, panels_of

SCHEMA_VERSION = 1

_MS = 1e6


def headline(verdict: Verdict) -> str:
    """Return the answer in a few words."""
    slots = verdict.slots or 0
    count = (
        f"at least {plural(slots, 'slot')}"
        if verdict.slots_is_lower_bound
        else plural(slots, "slot")
    )
    match verdict.kind:
        case Kind.CONTINUOUS:
            return f"continuous batching with {count}"
        case Kind.STATIC:
            return f"static batching with {count}"
        case Kind.SERIAL:
            return "serial: one request at a time"
        case Kind.UNKNOWN:
            return "cannot tell"


def sentence(findings: Findings) -> str:
    """Return the answer in one sentence."""
    verdict = findings.verdict
    return f"{findings.target}: {headline(verdict)}: {verdict.reason}."


# Tests


def tests_of(findings: Findings) -> list[tuple[str, str]]:
    """Return the name of each test and what it saw, in plain English."""
    verdict = findings.verdict
    rows = [("One alone", _alone(verdict)), ("Joining", _joining(verdict))]
    rows += [("Shared steps", _shared(verdict)), ("Slots", _slots(verdict))]
    rows += [("Server says", _server(findings)), ("Others", _others(verdict))]
    if findings.failures:
        first = findings.failures[0]
        rows.append(("Failed", f"{plural(_failed(findings), 'request')}; the first: {first}"))
    return [(name, text) for name, text in rows if text]


def _failed(findings: Findings) -> int:
    streams = [s for r in findings.observations.rounds for s in r.streams]
    return sum(bool(s.failure) for s in streams)


def _alone(verdict: Verdict) -> str:
    pace = verdict.pace
    if pace is None:
        return ""
    if pace.buffered:
        return (
            f"A request takes {number(pace.e2e_ns(10) / _MS)} ms for 10 tokens, about "
            f"{number(pace.gap_ns / _MS)} ms a token. The server sends them all at the end."
        )
    chunks = f", {pace.chunk} together" if pace.chunk > 1 else ""
    return (
        f"The first token comes after {number(pace.ttft_ns / _MS)} ms, then one every "
        f"{number(pace.gap_ns / _MS)} ms{chunks}."
    )


def _joining(verdict: Verdict) -> str:
    seen = verdict.joining
    if seen is None:
        return ""
    clear = seen.joined + seen.waited
    if not clear and not seen.refused:
        return "No short request could be compared with a long one."
    parts = []
    if seen.joined:
        share = float(np.median([wait for wait in seen.waits if wait < 1] or [0.0]))
        parts.append(
            f"{seen.joined} of {plural(clear, 'short request')} got the first token while a long "
            f"request was running, after {percent(share)} of the time that it still took"
        )
    if seen.waited:
        parts.append(
            f"{seen.waited} of {plural(clear, 'short request')} waited until the long request had "
            "ended"
        )
    if seen.refused:
        parts.append(f"{plural(seen.refused, 'short request')} were refused meanwhile")
    return f"{'; '.join(parts)}."


def _shared(verdict: Verdict) -> str:
    seen, pace = verdict.shared, verdict.pace
    if seen is None or pace is None or not seen.compared:
        return ""
    by_chance = number(round(2 * WINDOW * seen.compared, 1))
    if pace.buffered:
        text = (
            f"{seen.together} of {plural(seen.compared, 'pair')} ended in the same step, although "
            "the second request was sent later; "
        )
    else:
        text = (
            f"{seen.together} of {plural(seen.compared, 'request')} got their tokens together "
            f"with the long one's, within {percent(WINDOW)} of a step (median "
            f"{percent(float(np.median(seen.offsets)), 1)}); "
        )
    return f"{text}about {by_chance} would by chance."


def _slots(verdict: Verdict) -> str:
    if not verdict.bursts:
        return ""
    return " ".join(_burst(burst) for burst in verdict.bursts[-2:])


def _burst(burst: Burst) -> str:
    text = f"{burst.sent} at once: {burst.most} ran at the same time"
    if burst.refused:
        text += f", {burst.refused} were refused"
    elif burst.exact and burst.midway:
        text += ", and each of the others began when one had ended"
    elif burst.exact and burst.most > 1:
        groups = joined([str(size) for size in burst.groups[:8]])
        text += f", in groups of {groups}, one after another"
    elif burst.exact:
        text += ", one after another"
    elif burst.most == burst.sent:
        text += ", so there may be more slots"
    return f"{text}. They got {number(burst.gain)} times the tokens per second of one alone."


def _server(findings: Findings) -> str:
    dialect, server = findings.dialect, findings.observations.server
    name = f"{dialect.name} {dialect.version or ''}".strip()
    parts = [name if dialect.name != "openai" else "no name"]
    if server.slots is not None:
        parts.append(plural(server.slots, "slot"))
    if server.passes and server.tokens:
        parts.append(
            f"{plural(server.passes, 'forward pass', 'forward passes')} for "
            f"{plural(server.tokens, 'token')}"
        )
    return f"{', '.join(parts)}."


def _others(verdict: Verdict) -> str:
    return f"{'; '.join(verdict.busy)}." if verdict.busy else ""


# The terminal


def render(findings: Findings, width: int) -> RenderableType:
    """Return the report for a terminal of so many columns."""
    verdict = findings.verdict
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in tests_of(findings):
        grid.add_row(Text(name, "bold"), text)
    parts: list[RenderableType] = [Text(sentence(findings), "bold"), "", grid]
    for panel in panels_of(findings.observations.rounds):
        parts += ["", Text(panel.title, "bold"), Text("\n".join(rows_of(panel, width)))]
    parts += ["", Text(f"· waiting   █ token   ─ between tokens   Took {_took(findings)}.")]
    if verdict.kind is Kind.UNKNOWN and verdict.shared and not verdict.shared.shown:
        parts.append(Text("More time may help: --max-time 180."))
    return Group(*parts)


def _took(findings: Findings) -> str:
    return spell_time(findings.took_s)


def rows_of(panel: Panel, width: int) -> list[str]:
    """Return a row of characters for each stream, all on one time axis, and the axis."""
    names = [panel.name(stream) for stream in panel.streams]
    left = max(map(len, names)) + 1
    columns = max(10, width - left - 1)
    begin, end = panel.span_ns
    scale = (columns - 1) / max(end - begin, 1)
    rows = [
        f"{name:<{left}}{_row(stream, begin, scale)}".rstrip()
        for name, stream in zip(names, panel.streams, strict=True)
    ]
    last = f"{number((end - begin) / 1e9)} s"
    return [*rows, " " * left + "0 s" + last.rjust(columns - 3)]


def _row(stream: Stream, begin: int, scale: float) -> str:
    def column(time: int) -> int:
        return round((time - begin) * scale)

    sent = column(stream.sent_ns)
    if not stream.times_ns:
        return " " * sent + ("refused" if stream.refused else "failed")
    first, last = column(stream.first_ns), column(stream.last_ns)
    cells = [" "] * sent + ["·"] * (first - sent) + ["─"] * (last - first + 1)
    for time in stream.times_ns:
        cells[column(time)] = "█"
    return "".join(cells)


# Files


def data_of(findings: Findings, command: str) -> dict[str, Any]:
    """Return the data of ``probe.json``; a value without meaning is null."""
    verdict = findings.verdict
    return {
        **envelope(SCHEMA_VERSION, command),
        "target": findings.target,
        "server": {
            "name": findings.dialect.name,
            "version": findings.dialect.version,
            "model": findings.model,
            "slots": findings.observations.server.slots,
            "passes": findings.observations.server.passes,
        },
        "verdict": verdict.kind.value,
        "slots": verdict.slots,
        "slots_is_lower_bound": verdict.slots_is_lower_bound,
        "evidence": _evidence(findings),
    }


def _evidence(findings: Findings) -> dict[str, Any]:
    verdict = findings.verdict
    pace, seen, shared = verdict.pace, verdict.joining, verdict.shared
    begin = min((s.sent_ns for r in findings.observations.rounds for s in r.streams), default=0)
    return {
        "reason": verdict.reason,
        "alone": pace
        and {
            "ttft_ms": pace.ttft_ns / _MS,
            "gap_ms": pace.gap_ns / _MS,
            "tokens_per_chunk": pace.chunk,
            "buffered": pace.buffered,
        },
        "joining": seen
        and {
            "joined": seen.joined,
            "waited": seen.waited,
            "refused": seen.refused,
            "unclear": seen.unclear,
            "wait_shares": list(seen.waits),
        },
        "shared_steps": shared
        and {
            "compared": shared.compared,
            "together": shared.together,
            "window": WINDOW,
            "assumed_chance": CHANCE * WINDOW,
            "probability": shared.chance,
            "offsets": list(shared.offsets),
        },
        "bursts": [_burst_data(burst) for burst in verdict.bursts],
        "others": list(verdict.busy),
        "failures": list(findings.failures),
        "client_lag_ms": findings.observations.lag_ns / _MS,
        "duration": findings.took_s,
        "tests": {name: text for name, text in tests_of(findings)},
        "rounds": [_round(round, begin) for round in findings.observations.rounds],
    }


def _burst_data(burst: Burst) -> dict[str, Any]:
    return {
        "sent": burst.sent,
        "refused": burst.refused,
        "most_at_once": burst.most,
        "full": burst.exact,
        "began_midway": burst.midway,
        "groups": list(burst.groups),
        "throughput_gain": burst.gain,
    }


def _round(round: Round, begin: int) -> list[Mapping[str, Any]]:
    """Return the requests of a round with their times in ms since the first one was sent."""
    return [
        {
            "role": s.role.value,
            "asked": s.asked,
            "sent_ms": (s.sent_ns - begin) / _MS,
            "token_ms": [(time - begin) / _MS for time in s.times_ns],
            "failure": "refused" if s.refused else s.failure or None,
        }
        for s in round.streams
    ]


def to_json(data: Mapping[str, Any]) -> str:
    return json_text(data)


def write_probe(folder: Path, findings: Findings, data: Mapping[str, Any]) -> list[Path]:
    """Write ``probe.json`` and the picture; return their paths."""
    title = f"{findings.target} · {_server(findings).rstrip('.')}"
    figure = draw_streams(
        panels_of(findings.observations.rounds), headline(findings.verdict), title
    )
    pictures = {f"probe.{format}": figure_bytes(figure, format) for format in ("png", "svg")}
    return write_whole(folder, {"probe.json": to_json(data), **pictures})
