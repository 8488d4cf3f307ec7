"""Parts of the documentation that are made from the code.

A page has ``<!-- generated: NAME -->`` where the text of ``PARTS[NAME]`` goes, and ``pages``
returns the pages of the commands. ``conf.py`` puts them in. This file does not need Sphinx, so that
tests can check links without it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import batchbench
from batchbench import settings
from batchbench.cli.main import COMMANDS, GROUPS, load_command
from batchbench.cli.options import ALIASES
from batchbench.reports.result_file import SCHEMA_FILE

# Commands and options


def pages() -> dict[str, str]:
    """Return the pages of the commands, by their paths in the documentation."""
    return {f"commands/{name}.md": "\n".join(_page(name)) for name in COMMANDS}


def command_list() -> Iterator[str]:
    """Yield a table of all commands."""
    yield from ("| Command | Purpose |", "|---|---|")
    for name, purpose in COMMANDS.items():
        yield f"| [`{name}`](commands/{name}.md) | {_cell(purpose)} |"
    names = [f"{name} <commands/{name}>" for name in COMMANDS]
    yield from ("", "```{toctree}", ":hidden:", "", *names, "```")


def _page(name: str) -> Iterator[str]:
    command = load_command(name)
    yield f"# batchbench {name}"
    if name in GROUPS:
        yield from ("", COMMANDS[name])
        for part, own in command.commands.items():
            yield from ("", f"## batchbench {name} {part}", *_told(f"{name} {part}", own, "###"))
    else:
        yield from _told(name, command, "##")


def _told(words: str, command: Any, level: str) -> Iterator[str]:
    """Yield the purpose, usage, arguments and options of a command."""
    text, *examples = re.split(r"^Example: ", command.help or "", flags=re.MULTILINE)
    yield from ("", *re.split(r"(?<=\n)\n", text.strip()))
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    usage = " ".join(["batchbench", words, "[OPTIONS]", *map(_argument, arguments)])
    yield from ("", "```text", usage, "```")
    if examples:
        yield from ("", "Example:" if len(examples) == 1 else "Examples:", "", "```console")
        yield from (f"$ {' '.join(example.split())}" for example in examples)
        yield "```"
    panels: dict[str, list[str]] = {}
    if arguments:
        panels["Arguments"] = [_entry(words, param, None) for param in arguments]
    fields = {field.name: (spec, field) for spec, field in getattr(command.callback, "fields", ())}
    for param in command.params:
        if param.param_type_name == "option" and param.name != "help_all":
            panel = param.rich_help_panel or "Options"
            told = _entry(words, param, fields.get(param.name))
            panels.setdefault(panel, []).append(told)
    for panel, entries in panels.items():
        yield from ("", f"{level} {panel}", "", '<dl class="options">', *entries, "</dl>")


def _argument(param: Any) -> str:
    name = param.metavar or param.name.upper()
    name = f"{name}..." if param.nargs == -1 and not name.endswith("…") else name
    return name if param.required else f"[{name}]"


def _entry(words: str, param: Any, known: tuple[type, Any] | None) -> str:
    """Return an option or an argument as an entry of a list of definitions."""
    if param.param_type_name == "argument":
        names = [_argument(param).strip("[]")]
    else:
        names = [*param.opts, *param.secondary_opts]
        metavar = (param.metavar or param.name.upper()).strip() if not param.is_flag else ""
        names[0] = f"{names[0]} {metavar}".strip()
    anchor = "-".join([*words.split()[1:], param.name]).replace("_", "-")
    codes = ", ".join(f"<code>{escape(name)}</code>" for name in names)
    facts = " · ".join(_facts(param, known))
    small = f"<br><small>{facts}</small>" if facts else ""
    return f'<dt id="{anchor}">{codes}</dt>\n<dd>{_meaning(param.help or "")}{small}</dd>'


def _facts(param: Any, known: tuple[type, Any] | None) -> Iterator[str]:
    """Yield the kind of value, its bounds, the default and other names of an option."""
    if param.param_type_name == "argument":
        yield "required" if param.required else "optional"
        return
    flag = param.is_flag
    if known is not None and not flag:
        yield from _limits(*known)
    if param.multiple:
        yield "may be repeated"
    default = param.default() if callable(param.default) else param.default
    if isinstance(param.show_default, str):
        yield f"default: {escape(param.show_default)}"
    elif not flag and default not in (None, [], ()) and param.show_default is not False:
        value = ", ".join(default) if isinstance(default, list | tuple) else default
        yield f"default: <code>{escape(str(value))}</code>"
    others = [f"<code>{alias}</code>" for alias, name in ALIASES.items() if name in param.opts]
    others = [alias for alias in others if not alias.startswith("<code>-o")]
    if others:
        yield f"also {', '.join(others)}"


_KINDS = {int: "whole number", float: "number", Path: "path", str: "", tuple: "", bool: ""}


def _limits(spec: type, field: dataclasses.Field[Any]) -> Iterator[str]:
    about = settings.about(field)
    kind = _KINDS[settings.kind_of(settings.hints_of(spec)[field.name])]
    if about.unit:
        kind = about.unit
    if kind:
        yield escape(kind)
    low, high = (None if bound is None else _number(bound) for bound in (about.min, about.max))
    if low is not None and high is not None:
        yield f"{low} to {high}"
    elif low is not None or high is not None:
        yield f"at least {low}" if low is not None else f"at most {high}"
    if about.choices:
        yield "one of " + ", ".join(f"<code>{escape(choice)}</code>" for choice in about.choices)
    for other in about.excludes:
        yield f"not with <code>{settings.option_name(other)}</code>"
    if about.variable:
        yield f"environment variable <code>{about.variable}</code>"


_APART = re.compile(r"; (?![^(]*\))")
"""A semicolon that is not in parentheses."""


def _meaning(help: str) -> str:
    """Return a help text; values that it explains one by one, as in ``a: …; b: …``, are a list."""
    first, _, rest = help.rstrip(".").partition(". ")
    values = [part.partition(": ") for part in _APART.split(rest)]
    if sum(bool(colon) and " " not in name for name, colon, _ in values) < 2:
        return _html(help)
    items = (
        f"<li><code>{escape(name)}</code>{': ' if text else ''}{_html(text)}</li>"
        if " " not in name
        else f"<li>{_html(name + colon + text)}</li>"
        for name, colon, text in values
    )
    return f"{_html(first)}:<ul>{''.join(items)}</ul>"


def _number(bound: float) -> str:
    return f"{bound:,.0f}" if bound == int(bound) else f"{bound:g}"


def _html(text: str) -> str:
    """Return a help text with the options in it as code."""
    return re.sub(r"(?<![\w-])(--[a-z][a-z-]*[a-z])", r"<code>\1</code>", escape(text, quote=False))


def _coded(text: str) -> str:
    """Return a text for a cell, with the options in it as code."""
    return re.sub(r"(?<![`\w-])(--[a-z][a-z-]*[a-z])", r"`\1`", _cell(text))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# result.json


MEANINGS: Mapping[str, str] = tomllib.loads(
    Path(__file__).with_name("result-keys.toml").read_text(encoding="utf-8")
)
"""Meanings of keys that the schema does not describe, by path or by the last part of the path."""


def result_keys() -> Iterator[str]:
    """Yield the keys of ``result.json``, then a section for each key that has others below it."""
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    top = {name: _plain(part, schema) for name, part in schema["properties"].items()}
    yield from ("| Key | Type | Meaning |", "|---|---|---|")
    yield from (
        f"| `{name}` | {_kind(part)} | {meaning(name, part)} |" for name, part in top.items()
    )
    for name, part in top.items():
        if rows := list(_rows(name, part, schema)):
            text = meaning(name, part).rstrip(".")
            yield from ("", f"## `{name}`", "", f"{text}.")
            yield from ("", "| Key | Type | Meaning |", "|---|---|---|", *rows)


def meaning(path: str, part: Mapping[str, Any]) -> str:
    """Return the meaning of a key: the schema's, or else that of ``MEANINGS``."""
    own = MEANINGS.get(path, MEANINGS.get(re.split(r"[.\]]", path)[-1], ""))
    text = _cell(part.get("description", own))
    return text[:1].upper() + (text[1:] if ". " in text else text[1:].rstrip("."))


_STATISTIC = re.compile(r"(mean|median|std|p90|p99|p99\.9)_(ttft|tpot|itl|e2el|queue)_ms$")


def _rows(path: str, part: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[str]:
    """Yield a row of a table for each key below a path."""
    seen: set[str] = set()
    for name, child in _children(part, schema):
        child = _plain(child, schema)
        own = path + name if name == "[]" else f"{path}.{name}"
        shown = own.partition(".")[2] or own
        told = meaning(own, child)
        if found := _STATISTIC.match(name):
            if found[2] in seen:
                continue
            seen.add(found[2])
            shown = shown.replace(found[1], "…", 1)
            told = "`mean`, `median`, `std`, `p90`, `p99` and `p99.9`"
        if name not in ("*", "[]"):
            yield f"| `{shown}` | {_kind(child)} | {told} |"
        if own == "strategies.*.trials[]":
            yield f"| `{shown}` | object | the keys of `*.summary`, for one trial |"
        else:
            yield from _rows(own, child, schema)


def _children(
    part: Mapping[str, Any], schema: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from part.get("properties", {}).items()
    more = part.get("additionalProperties")
    if isinstance(more, dict) and _has_keys(_plain(more, schema)):
        yield "*", more
    items = part.get("items")
    if isinstance(items, dict) and _has_keys(_plain(items, schema)):
        yield "[]", items


def _has_keys(part: Mapping[str, Any]) -> bool:
    return "properties" in part or isinstance(part.get("additionalProperties"), dict)


def _plain(part: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part of the schema without references and without alternatives to null."""
    while "$ref" in part:
        own = {key: value for key, value in part.items() if key != "$ref"}
        part = {**schema["$defs"][part["$ref"].rpartition("/")[2]], **own}
    for word in ("anyOf", "oneOf"):
        if word in part:
            kinds = [_plain(kind, schema) for kind in part[word]]
            (first, *others) = [kind for kind in kinds if kind.get("type") != "null"] or kinds
            null = len(kinds) > 1 + len(others)
            own = {key: value for key, value in part.items() if key != word}
            kind = " or ".join(dict.fromkeys(_kind(one) for one in (first, *others)))
            return {**first, **own, "kind": f"{kind} or null" if null else kind}
    return dict(part)


def _kind(part: Mapping[str, Any]) -> str:
    if "kind" in part:
        return str(part["kind"])
    if "const" in part:
        return f"`{json.dumps(part['const'])}`"
    if "enum" in part:
        return " or ".join(f"`{json.dumps(value)}`" for value in part["enum"])
    kinds = part.get("type", "any")
    names = [kinds] if isinstance(kinds, str) else kinds
    text = " or ".join(names)
    items = part.get("items")
    if "array" in names and isinstance(items, dict) and isinstance(items.get("type"), str):
        text = text.replace("array", f"array of {items['type']}s")
    return text


# The API


def settings_of(name: str) -> Iterator[str]:
    """Yield a table of the settings of a spec."""
    yield from ("| Setting | Default | Meaning |", "|---|---|---|")
    for field in dataclasses.fields(getattr(batchbench, name)):
        known = settings.about(field)
        default = known.default_text or f"`{field.default!r}`"
        yield f"| `{field.name}` | {_coded(default)} | {_coded(known.help)} |"


def pictures() -> Iterator[str]:
    """Yield a table of the methods of ``result.plot``."""
    from batchbench.reports.figures import PICTURES

    yield from ("| Method | Picture |", "|---|---|")
    for name, picture in PICTURES.items():
        text = " ".join(inspect.cleandoc(picture.__doc__ or "").split())
        yield f"| `result.plot.{name}()` | {_cell(text.replace('``', '`'))} |"


def documented(name: str) -> Iterator[str]:
    """Yield the directive that documents a name of the package."""
    kind = "class" if inspect.isclass(getattr(batchbench, name)) else "function"
    kind = "exception" if name.endswith("Error") else kind
    yield from ("```{eval-rst}", f".. auto{kind}:: batchbench.{name}")
    if kind == "class":
        yield "   :members:"
    yield "```"


SPECS = ("WorkloadSpec", "ModelSpec", "ServingSpec", "TrialsSpec")

PARTS: Mapping[str, Callable[[], Iterator[str]]] = {
    "commands": command_list,
    "result": result_keys,
    "pictures": pictures,
    **{name: partial(settings_of, name) for name in SPECS},
    **{
        name: partial(documented, name)
        for name in batchbench.__all__
        if name not in (*SPECS, "__version__")
    },
}
"""Texts by the names that pages have for them."""

_PLACE = re.compile(r"^<!-- generated: (.+) -->$", re.MULTILINE)


def filled(text: str) -> str:
    """Return a page with its generated parts."""
    return _PLACE.sub(lambda place: "\n".join(PARTS[place[1]]()), text)
