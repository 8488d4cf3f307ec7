"""Write docs/api.md from the docstrings: ``python docs/make_api.py``."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import batchbench
from batchbench import settings
from batchbench.api import Plots
from batchbench.reports.figures import PICTURES

PAGE = Path(__file__).with_name("api.md")

CHAPTERS = {
    "Run and read": ("run", "simulate", "load", "Result"),
    "Pictures": (),
    "Options": ("Experiment", "WorkloadSpec", "ModelSpec", "ServingSpec", "TrialsSpec"),
    "Lower level": ("conduct", "Outcome", "Recording", "Watch", "Workload", "Request"),
    "Policies": ("Policy", "View"),
    "Errors": ("BatchbenchError", "UsageError"),
}


def page() -> str:
    """The whole page."""
    lines = [
        "# API",
        "",
        "Made from the docstrings by `python docs/make_api.py`. [From Python](python.md) shows",
        "how to use it.",
    ]
    for title, names in CHAPTERS.items():
        lines += ["", f"## {title}"]
        if title == "Pictures":
            lines += _pictures()
        for name in names:
            lines += _entry(name, getattr(batchbench, name))
    return "\n".join(lines) + "\n"


def _entry(name: str, thing: Any) -> Iterator[str]:
    """A function, or a class with its settings or its methods."""
    is_spec = dataclasses.is_dataclass(thing) and all(
        "batchbench" in field.metadata for field in dataclasses.fields(thing)
    )
    shown = "" if inspect.isclass(thing) else _signature(thing)
    yield from ("", f"### `{name}{shown}`", "", *_text(thing))
    if is_spec:
        yield from ("", "| option | default | |", "|---|---|---|")
        for field in dataclasses.fields(thing):
            known = settings.about(field)
            default = known.default_text or f"`{field.default!r}`"
            help = known.help.replace("|", "\\|")
            yield f"| `{field.name}` | {default} | {help} |"
    elif inspect.isclass(thing):
        yield from _members(thing)


def _members(thing: type) -> Iterator[str]:
    """Public fields, methods and properties that the class itself defines."""
    fields = getattr(thing, "__dataclass_fields__", {})
    told = [f"`{name}: {field.type}`" for name, field in fields.items()]
    told = told or [f"`{name}`" for name in getattr(thing, "_fields", ())]
    if told:
        yield from ("", f"Fields: {', '.join(told)}.")
    for name, member in vars(thing).items():
        found = member.__func__ if isinstance(member, classmethod) else member
        called = inspect.isfunction(found)
        if name.startswith("_") or not (called or hasattr(found, "__doc__")) or name in fields:
            continue
        if called or isinstance(found, property) or type(found).__name__ == "cached_property":
            shown = _signature(found) if called else ""
            first, *rest = _text(found) or [""]
            if first:
                yield from ("", f"- **`{name}{shown}`** {first}")
                yield from (f"  {line}".rstrip() for line in rest)


def _pictures() -> Iterator[str]:
    """The methods of ``result.plot``."""
    yield from ("", *_text(Plots))
    for name, picture in PICTURES.items():
        yield from ("", f"- **`result.plot.{name}()`** {' '.join(_text(picture))}")


def _signature(thing: Any) -> str:
    text = str(inspect.signature(thing)).replace("'", "")
    return re.sub(r"\((self|cls)(, )?", "(", text)


def _text(thing: Any) -> list[str]:
    """A docstring as Markdown."""
    text = inspect.cleandoc(thing.__doc__ or "")
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).replace("``", "`")
    text = re.sub(r"^(Args|Raises):$", r"*\1:*\n", text, flags=re.MULTILINE)
    # The entries of such a section are a list; a line that is indented further goes on.
    text = re.sub(r"^ {4}(\w+): ", r"- `\1`: ", text, flags=re.MULTILINE)
    return re.sub(r"^ {8}(?=\S)", "  ", text, flags=re.MULTILINE).splitlines()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
