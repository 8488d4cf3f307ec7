"""A gate as annotations of GitHub Actions: ``::error title=…::…``, a line each.

The rules are those of "Workflow commands for GitHub Actions" in GitHub's documentation: ``%``, CR
and LF are escaped everywhere, ``:`` and ``,`` in properties too. GitHub shows at most ten of a kind
and step, so that only a handful is given.
"""

from __future__ import annotations

from collections.abc import Iterator

from batchbench.reports.sequential import Verdict
from batchbench.studies.gate.evidence import Answer, Evidence, Gate, describe

MOST = 5
"""Lines of one gate."""


def render(gate: Gate, *, strict: bool = False) -> str:
    """Errors for what fails, warnings for what cannot be told and for losses that were not gated.

    Args:
        strict: whether *cannot tell* is an error.
    """
    found = list(_found(gate, strict=strict))
    shown, left_out = found[:MOST], len(found) - MOST
    if left_out > 0:
        kind, title, text = shown[-1]
        shown[-1] = kind, title, f"{text}\n{left_out} more: see the report"
    return "".join(command(kind, title, text) for kind, title, text in shown)


def _found(gate: Gate, *, strict: bool) -> Iterator[tuple[str, str, str]]:
    """Kind, title and text; errors first."""
    name = f"batchbench {gate.command}"
    for each in gate.failures:
        yield "error", f"{name}: {_short(each)}", describe(each)
    if gate.answer is Answer.UNKNOWN:
        yield "error" if strict else "warning", f"{name}: cannot tell", gate.sentence
    elif gate.untold:
        which = ", ".join(each.name for each in gate.untold)
        yield "warning", f"{name}: cannot tell", f"Of these nothing can be told: {which}."
    for each in gate.evidence:
        if each.verdict in (Verdict.SLOWER, Verdict.CHANGED) and not each.fails:
            why = "allowed" if each.gated else "not gated"
            yield "warning", f"{name}: {_short(each)}, {why}", describe(each)


def _short(each: Evidence) -> str:
    return f"{each.name} {'changed' if each.verdict is Verdict.CHANGED else f'is {each.verdict}'}"


def command(kind: str, title: str, text: str) -> str:
    """One workflow command, with its line end."""
    return f"::{kind} title={_property(title)}::{_data(text)}\n"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
