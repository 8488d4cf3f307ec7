"""Settings of the documentation: ``make docs`` builds it with Sphinx into ``site/``.

``generated.py`` makes the parts that come from the code. A new page needs a line in ``NAVIGATION``;
``tests/test_docs.py`` checks that.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import generated  # noqa: E402  # it stands beside this file

NAVIGATION = {
    "": {
        "Tutorial": "tutorial",
        "Try it": "interactive",
        "All questions": "how-to",
    },
    "How to measure": {
        "Which batch size?": "batch-size",
        "How many requests per second can I sustain?": "capacity",
        "How does the gain depend on my settings?": "sweeps",
        "What if requests arrive over time?": "load",
        "How close is the engine to the hardware limit?": "ladder",
        "Can a cluster run my sweep?": "clusters",
    },
    "How to test servers": {
        "Does my server batch continuously?": "probe",
        "How much does continuous batching gain on my server?": "servers",
        "How do I compare two servers or engines?": "compare-servers",
    },
    "How to use your own": {
        "Workload, trace or prompts": "workloads",
        "Trained model, chat prompts": "real-models",
        "Engine": "bring-your-own-engine",
        "Scheduling policy": "write-your-own-policy",
    },
    "How to find regressions": {
        "Is my branch slower than main?": "ci",
        "Which of two versions is faster?": "comparing",
        "Which commit made my code slower?": "trend",
    },
    "How to use results": {
        "Show a result to others": "reports",
        "Compare with another tool's result": "other-tools",
        "Use it from Python": "python",
    },
    "Reference": {
        "Commands and options": "commands",
        "Metrics": "metrics",
        "result.json": "result-file",
        "Exit codes": "exit-codes",
        "Glossary": "glossary",
        "API": "api",
    },
    "Explanations": {
        "How continuous batching works": "continuous-batching",
        "How outputs are verified": "verification",
        "How a run audits itself": "validity",
        "How the regression gate decides": "regressions",
        "How predictions are made": "prediction",
        "How fast the engine is": "performance",
        "How the code is organised": "architecture",
        "Log of experiments": "log",
    },
}
"""Captions of the navigation, and the titles and pages below each."""

project = "batchbench"
html_title = "batchbench"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["interactive/**"]
suppress_warnings = ["misc.highlighting_failure"]  # outputs are cut off with "…"

myst_heading_anchors = 4
smartquotes = False  # it would make a dash of --option
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"  # it loads nothing from other sites, and neither do the pages
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = html_show_copyright = html_show_sphinx = False
pygments_style, pygments_dark_style = "friendly", "github-dark"


def _toctrees() -> str:
    """Return the navigation as directives for the first page."""
    lines: list[str] = []
    for caption, pages in NAVIGATION.items():
        options = [":hidden:", f":caption: {caption}"] if caption else [":hidden:"]
        entries = [f"{title} <{page}>" for title, page in pages.items()]
        lines += ["", "```{toctree}", *options, "", *entries, "```"]
    return "\n".join(lines) + "\n"


def _fill(app: Any, page: str, source: list[str]) -> None:
    source[0] = generated.filled(source[0]) + (_toctrees() if page == "index" else "")


def _write_commands(app: Any) -> None:
    """Write the pages of the commands, which Sphinx reads like all others."""
    made = generated.pages()
    for file in (HERE / "commands").glob("*.md"):
        if f"commands/{file.name}" not in made:
            file.unlink()
    for path, text in made.items():
        file = HERE / path
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")


def _mark(app: Any, doctree: Any) -> None:
    """Mark words in code, which stay whole, and long cells, which are not too narrow on a phone.

    The name of a command becomes a link to its page.
    """
    from docutils import nodes
    from sphinx.addnodes import pending_xref

    for code in list(doctree.findall(nodes.literal)):
        program, _, command = code.astext().partition(" ")
        free = not isinstance(code.parent, nodes.title | nodes.reference)
        if free and program == "batchbench" and command in generated.COMMANDS:
            page = {"reftype": "doc", "refdomain": "std", "reftarget": f"/commands/{command}"}
            link = pending_xref("", refexplicit=True, refdoc=app.env.docname, **page)
            code.replace_self(link)
            link += code
        most = 32 if isinstance(code.parent.parent, nodes.entry) else 0 if command else 24
        if len(code.astext()) <= most:
            code["classes"].append("short")
    for group in doctree.findall(nodes.tgroup):
        for cell in group.findall(nodes.entry):
            if group["cols"] > 2 and len(cell.astext()) > 40:
                cell["classes"].append("long")


def _mark_examples(app: Any, kind: str, name: str, it: Any, options: Any, lines: list[str]) -> None:
    """Mark indented lines of a docstring that follow a paragraph as an example."""
    made: list[str] = []
    for line in lines:
        before = made[-2].strip() if len(made) > 1 and not made[-1].strip() else ""
        if line.startswith("    ") and before and made[-2][:1] != " ":
            made += ["::", ""]
        made.append(line)
    lines[:] = made


def _copy_interactive(app: Any, exception: Exception | None) -> None:
    folder = HERE / "interactive"
    if exception is None and folder.exists():
        shutil.copytree(folder, Path(app.outdir) / "interactive", dirs_exist_ok=True)


def setup(app: Any) -> None:
    """Register what happens before pages are read and after they are written."""
    from pygments.lexers import BashSessionLexer

    class Console(BashSessionLexer):
        """Commands follow a dollar sign; all other lines are outputs, also those with % or ()."""

        _ps1rgx = re.compile(r"^(\w*\$ )(.*\n?)")
        _venv = re.compile(r"(?!)()()")

    app.add_lexer("console", Console)
    app.connect("builder-inited", _write_commands)
    app.connect("source-read", _fill)
    app.connect("doctree-read", _mark)
    app.connect("autodoc-process-docstring", _mark_examples, priority=400)  # before napoleon
    app.connect("build-finished", _copy_interactive)
