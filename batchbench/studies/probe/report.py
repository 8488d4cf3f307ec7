"""The report of a probe: a sentence, what each test saw, rows of characters, and the JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from batchbench.files import write_whole
from batchbench.json_file import envelope, json_text
from batchbench.reports.figures import figure_bytes
from batchbench.reports.text import percent, plural, spell_time
from batchbench.studies.probe.ask import Findings
from batchbench.studies.probe.figures import Panel, draw_streams, panels_of
from batchbench.studies.probe.judge import Kind, Verdict
from batchbench.studies.probe.observations import Round, Stream
from batchbench.studies.probe.slots import Burst

SCHEMA_VERSION = 1

TOKEN = "│"  # a token; those of one step make a vertical line
COLUMNS_A_TOKEN = 2.5  # the fewest columns from one token to the next
_MS = 1e6


def headline(verdict: Verdict) -> str:
    """Return the answer in a few words."""
    if verdict.kind is Kind.SERIAL:
        return "serial, one request at a time"
    if verdict.kind is Kind.UNKNOWN:
        return "cannot tell"
    least = "at least " * verdict.slots_is_lower_bound
    return f"{verdict.kind.value} batching with {least}{plural(verdict.slots or 0, 'slot')}"


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
    streams = findings.observations.streams
    if hidden := sum(bool(s.hidden) for s in streams):
        text = f"{plural(hidden, 'request')} showed no token, though the server counts some."
        rows.append(("Left out", text))
    if findings.failures:
        failed = plural(sum(bool(s.failure) for s in streams), "request")
        rows.append(("Failed", f"{failed}; the first: {findings.failures[0]}"))
    return [(name, text) for name, text in rows if text]


def _ms(ns: float) -> str:
    return f"{ns / _MS:.3g} ms" if ns < 1e9 else f"{ns / 1e9:.3g} s"


def _alone(verdict: Verdict) -> str:
    pace = verdict.pace
    if pace is None:
        return ""
    if pace.buffered:
        return (
            f"A request takes {_ms(pace.e2e_ns(10))} for 10 tokens, about {_ms(pace.gap_ns)} a "
            "token. The server sends them all at the end."
        )
    chunks = f", {pace.chunk} together" if pace.chunk > 1 else ""
    first = f"The first token comes after {_ms(pace.ttft_ns)}"
    return f"{first}, then one every {_ms(pace.gap_ns)}{chunks}."


def _joining(verdict: Verdict) -> str:
    seen, pace = verdict.joining, verdict.pace
    if seen is None or pace is None:
        return ""
    clear = seen.joined + seen.waited
    if not clear and not seen.refused:
        return "No short request could be compared with a long one."
    parts = []
    of_all = f"of {plural(clear, 'short request')}"
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
        parts.append(f"{plural(seen.refused, 'short request')} were refused meanwhile")
    return f"{'; '.join(parts)}."


def _shared(verdict: Verdict) -> str:
    seen, pace = verdict.shared, verdict.pace
    if seen is None or pace is None or not seen.compared:
        return ""
    within = f"within {percent(seen.window)} of a step"
    chance = f"By chance about {2 * seen.window * seen.compared:.1f} would"
    if pace.buffered:
        return (
            f"{seen.together} of {plural(seen.compared, 'pair')} ended together {within}, although "
            f"the second request was sent later. {chance}."
        )
    text = (
        f"{seen.together} of {plural(seen.compared, 'short request')} got their tokens together "
        f"with the long one, {within} (the time of one token). {chance}."
    )
    if seen.shown and seen.apart:
        text += f" {seen.apart} did not: replicas or a busy machine can cause it."
    return text


def _slots(verdict: Verdict) -> str:
    if not verdict.bursts:
        return ""
    last = verdict.bursts[-2:]
    seen = list(dict.fromkeys(_burst(burst) for burst in last))
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
        text += f", {burst.refused} were refused"
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
    tests = [*tests_of(findings), ("Time", f"The probe took {spell_time(findings.took_s)}.")]
    left = max(len(name) for name, _ in tests) + 2
    lines = [
        f"{name if not number else '':<{left}}{line}"
        for name, text in tests
        for number, line in enumerate(textwrap.wrap(text, max(20, width - left - 1)))
    ]
    answer = "\n".join(textwrap.wrap(sentence(findings), width, break_on_hyphens=False))
    parts: list[RenderableType] = [Text(answer, "bold"), "", Text("\n".join(lines))]
    panels = panels_of(findings.observations.rounds)
    for panel in panels:
        parts += ["", Text(panel.title, "bold"), Text("\n".join(rows_of(panel, width)))]
    legend = ["", Text(f"· waiting   {TOKEN} token   ─ between tokens")]
    return Group(*parts, *(legend if panels else ()))


def rows_of(panel: Panel, width: int) -> list[str]:
    """Return a row of characters for each stream, all on one time axis, and the axis.

    If tokens would not have columns of their own, it shows a part: the beginning, or the end of
    the long request if the others wait for it.
    """
    left = max(len(panel.name(stream)) for stream in panel.streams) + 1
    columns = max(10, width - left - 1)
    begin, end = panel.part_ns(columns / COLUMNS_A_TOKEN)
    scale = (columns - 1) / max(end - begin, 1)
    rows = [
        f"{panel.name(stream):<{left}}{_row(stream, begin, scale, columns)}".rstrip()
        for stream in panel.streams
        if stream.sent_ns < end
    ]
    start, stop = ((time - panel.span_ns[0]) / 1e9 for time in (begin, end))
    first, last = f"{start:.3g} s", f"{stop:.3g} s"
    return [*rows, " " * left + first + last.rjust(columns - len(first))]


def _row(stream: Stream, begin: float, scale: float, columns: int) -> str:
    def column(time: int) -> int:
        return round((time - begin) * scale)

    cells = [" "] * columns
    if not stream.times_ns:
        return " " * max(0, min(column(stream.sent_ns), columns - len(stream.lack))) + stream.lack
    first, last = column(stream.first_ns), column(stream.last_ns)
    for i in range(max(0, column(stream.sent_ns)), min(last + 1, columns)):
        cells[i] = "·" if i < first else "─"
    for i in map(column, stream.times_ns):
        if 0 <= i < columns:
            cells[i] = TOKEN
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
    pace = verdict.pace
    begin = min((s.sent_ns for s in findings.observations.streams), default=0)
    return {
        "reason": verdict.reason,
        "alone": pace
        and {
            "ttft_ms": pace.ttft_ns / _MS,
            "gap_ms": pace.gap_ns / _MS,
            "tokens_per_chunk": pace.chunk,
            "buffered": pace.buffered,
        },
        "joining": _fields(
            verdict.joining, "joined", "waited", "refused", "unclear", wait_shares="waits"
        ),
        "shared_steps": _fields(
            verdict.shared,
            *("compared", "together", "apart", "window", "offsets"),
            probability="chance",
        ),
        "bursts": [
            _fields(
                burst,
                *("sent", "refused", "groups"),
                most_at_once="most",
                full="exact",
                began_midway="midway",
                throughput_gain="gain",
            )
            for burst in verdict.bursts
        ],
        "others": list(verdict.busy),
        "failures": list(findings.failures),
        "client_lag_ms": findings.observations.lag_ns / _MS,
        "duration": findings.took_s,
        "tests": dict(tests_of(findings)),
        "rounds": [_round(round, begin) for round in findings.observations.rounds],
    }


def _fields(value: object, *same: str, **renamed: str) -> dict[str, Any] | None:
    """Return attributes under their names or other ones; None of None."""
    names = {**{name: name for name in same}, **renamed}
    return {key: getattr(value, name) for key, name in names.items()} if value else None


def _round(round: Round, begin: int) -> list[Mapping[str, Any]]:
    """Return the requests of a round with their times in ms since the first one was sent."""
    return [
        {
            "role": s.role.value,
            "asked": s.asked,
            "sent_ms": (s.sent_ns - begin) / _MS,
            "token_ms": [(time - begin) / _MS for time in s.times_ns],
            "failure": s.failure or s.lack or None,
        }
        for s in round.streams
    ]


def write_probe(folder: Path, findings: Findings, data: Mapping[str, Any]) -> list[Path]:
    """Write ``probe.json`` and the picture; return their paths."""
    title = f"{findings.target} · {_server(findings).rstrip('.')}"
    figure = draw_streams(
        panels_of(findings.observations.rounds), headline(findings.verdict), title
    )
    pictures = {f"probe.{format}": figure_bytes(figure, format) for format in ("png", "svg")}
    return write_whole(folder, {"probe.json": json_text(data), **pictures})
