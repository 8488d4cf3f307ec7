"""The documentation: its pages, links, anchors and commands, checked without Sphinx."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from support.documents import ROOT, comparable, fenced, matches

from batchbench.cli.main import COMMANDS, GROUPS, load_command, run_command
from batchbench.cli.options import ALIASES

DOCS = ROOT / "docs"
CONF = SimpleNamespace(**runpy.run_path(str(DOCS / "conf.py")))
PAGES = {f"{file.stem}.md": file.read_text(encoding="utf-8") for file in DOCS.glob("*.md")}
ALL = {name: CONF.generated.filled(text) for name, text in PAGES.items()} | CONF.generated.pages()
"""The pages as Sphinx reads them, by their paths."""

LINK = re.compile(r"\]\(([^)\s]+)\)|(?:href|src)=\"([^\"]+)\"")
SKIPPED = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
"""Blocks and spans of code, in which a bracket is no link."""


def links(text: str) -> Iterator[str]:
    """Yield the targets of links, pictures and frames of a page that are not other sites."""
    for found in LINK.finditer(SKIPPED.sub("", text)):
        target = found[1] or found[2]
        if "://" not in target:
            yield target


@cache
def anchors(name: str) -> frozenset[str]:
    """The anchors of a page: headings as GitHub and MyST name them, and ids."""
    text = re.sub(r"^```.*?^```", "", ALL[name], flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = (re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles)
    return frozenset([*slugs, *re.findall(r"id=\"([^\"]+)\"", text)])


def test_every_page_is_in_the_navigation_once() -> None:
    told = [f"{page}.md" for part in CONF.NAVIGATION.values() for page in part.values()]
    assert sorted([*told, "index.md"]) == sorted(PAGES)


def test_every_command_has_a_page() -> None:
    assert sorted(CONF.generated.pages()) == sorted(f"commands/{name}.md" for name in COMMANDS)


@pytest.mark.parametrize("name", ALL)
def test_links_lead_to_a_page_and_a_heading(name: str) -> None:
    folder = Path(name).parent
    for link in links(ALL[name]):
        path, _, anchor = link.partition("#")
        target = str(folder / path) if path else name
        if target.endswith(".md") and not target.startswith(".."):
            assert target in ALL, f"{name}: {link}"
            assert not anchor or anchor in anchors(target), f"{name}: {link}"
        else:
            assert (DOCS / target).exists(), f"{name}: {link}"


def test_the_check_of_links_finds_what_is_wrong() -> None:
    assert list(links('[a](b.md#c) `[x](y)` ![d](e.png) [f](https://g) <a href="h">')) == [
        "b.md#c",
        "e.png",
        "h",
    ]
    assert "a-title-with-code" in {
        re.sub(r"[^\w\- ]", "", "A title, with `code`".lower()).replace(" ", "-")
    }
    assert "when-a-run-is-suspect" in anchors("servers.md")


@pytest.mark.parametrize("name", PAGES)
def test_every_generated_part_has_a_text(name: str) -> None:
    assert "<!-- generated:" not in ALL[name]


def test_every_key_of_a_result_has_a_meaning() -> None:
    rows = re.findall(r"^\| `(.+)` \| .+ \| (.*) \|$", ALL["result-file.md"], re.MULTILINE)
    assert len(rows) > 200
    untold = [key for key, told in rows if not told]
    assert not untold, "describe them in result.schema.json or docs/result-keys.toml"


def test_every_meaning_belongs_to_a_key() -> None:
    page = ALL["result-file.md"]
    for path in CONF.generated.MEANINGS:
        last = re.split(r"[.\]]", path)[-1]
        assert re.search(rf"^\| `[^`]*\b{last}` ", page, re.MULTILINE), path


# Commands


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words after ``batchbench`` of the commands in blocks and spans of code."""
    blocks = re.findall(r"^```\w*\n.*?^```|^    [^\n]+$", text, re.MULTILINE | re.DOTALL)
    for block in blocks:
        joined = re.sub(r"\\\n\s+", " ", block)
        for line in re.findall(r"^(?:\S*\$|\s*- run:)? *batchbench (.*)$", joined, re.MULTILINE):
            yield from _split(line)
    for span in re.findall(r"`batchbench ([^`]+)`", text):
        yield from _split(" ".join(span.split()))


def _split(line: str) -> Iterator[list[str]]:
    """Yield the words of a command, up to a pipe, a redirection or a following command."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|>&;")
    lexer.whitespace_split = True
    words = list(lexer)
    stops = [index for index, word in enumerate(words) if set(word) <= set("|>&;")]
    words = words[: min(stops, default=len(words))]
    if words and re.match(r"[-a-zA-Z]", words[0]):
        yield words


def options_of(words: list[str]) -> dict[str, Any]:
    """The options of a command, with its aliases."""
    command = load_command(words[0])
    if words[0] in GROUPS and len(words) > 1 and words[1] in command.commands:
        command = command.commands[words[1]]
    own = {name: p for p in command.params for name in (*p.opts, *p.secondary_opts)}
    return own | {alias: own[name] for alias, name in ALIASES.items() if name in own}


def fault(words: list[str]) -> str | None:
    """Return the command or the option of a command line that does not exist."""
    if words[0].startswith("-"):
        return None if words[0] in ("--help", "--version", "--install-completion") else words[0]
    if words[0] not in COMMANDS:
        return None if words[0].isupper() else words[0]
    known = {*options_of(words), "--help", "-h"}
    given = (word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word))
    return next((option for option in given if option not in known), None)


@pytest.mark.parametrize("file", ["README.md", *(f"docs/{name}" for name in PAGES)])
def test_commands_in_the_documents_exist_with_their_options(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    for words in commands(text):
        assert fault(words) is None, f"{file}: batchbench {' '.join(words)}"


def test_the_check_of_commands_finds_what_is_wrong() -> None:
    assert fault(["run", "--batch-size", "8", "--num-prompts=3"]) is None
    assert fault(["run", "--batchsize", "8"]) == "--batchsize"
    assert fault(["runs"]) == "runs"
    assert fault(["workload", "list", "--preset", "chat"]) == "--preset"
    text = "```console\n$ batchbench run -b 8 # x\n```\n`batchbench probe URL`"
    assert list(commands(text)) == [["run", "-b", "8"], ["probe", "URL"]]


def test_the_page_of_a_command_has_every_option() -> None:
    for name in COMMANDS:
        page = ALL[f"commands/{name}.md"]
        command = load_command(name)
        for part in command.commands.values() if name in GROUPS else [command]:
            for param in part.params:
                if param.param_type_name == "option" and param.name != "help_all":
                    assert f"<code>{param.opts[0]}" in page, f"{name} {param.opts[0]}"


def test_an_option_has_its_bounds_default_and_other_names() -> None:
    (entry,) = re.findall(r'<dt id="batch-size">.*\n.*', ALL["commands/run.md"])
    assert "<code>--batch-size N</code>, <code>-b</code>" in entry
    assert "whole number · 1 to 1,048,576 · default: <code>8</code>" in entry
    assert "also <code>--max-num-seqs</code>" in entry


# Code


def simulated_examples() -> Iterator[tuple[str, list[str], str]]:
    """Yield the commands with ``--simulated`` whose output a page shows; test_house has others."""
    for name in PAGES:
        for block in fenced(DOCS / name, "console"):
            for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                line, _, output = part.partition("\n")
                if "--simulated" in line.split() and output.strip():
                    yield name, line.split()[1:], output


@pytest.mark.parametrize(
    ("words", "output"),
    [pytest.param(words, output, id=name) for name, words, output in simulated_examples()],
)
def test_simulated_outputs_are_the_programs_own(
    words: list[str],
    output: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(words) == 0
    shown, said = comparable(output), comparable(capsys.readouterr().out)
    assert shown == said or matches(shown, said)


@pytest.mark.parametrize("name", ["tutorial.md"])
def test_the_code_of_a_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in fenced(DOCS / name, "python"):
        exec(compile(block, name, "exec"), {})
    assert "forward_passes" in capsys.readouterr().out


def test_exit_codes_are_those_of_the_errors() -> None:
    from batchbench import errors

    told = {
        int(code)
        for codes in re.findall(r"^\| ([\d, ]+) \|", PAGES["exit-codes.md"], re.MULTILINE)
        for code in codes.split(",")
    }
    known = [kind for kind in vars(errors).values() if hasattr(kind, "exit_code")]
    assert {kind.exit_code for kind in known} <= told


def test_the_workflow_is_valid_and_builds_what_it_publishes() -> None:
    file = ROOT / ".github" / "workflows" / "docs.yml"
    words = ["check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(file)]
    subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True)
    steps = yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"]["build"]["steps"]
    assert any(step.get("run") == "make docs" for step in steps)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    folder = steps[-1]["with"]["path"]
    assert re.search(rf"^\t.*-m sphinx -W .* docs {folder}$", makefile, re.MULTILINE)
