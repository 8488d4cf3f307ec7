"""Commands and outputs in Markdown pages, and their comparison with what the program prints."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).parents[2]


def fenced(file: Path, language: str) -> list[str]:
    """Return the blocks of a language in a Markdown file."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def comparable(text: str) -> list[str]:
    """Return lines without the parts that differ from run to run."""
    text = re.sub(r"\d{8}-\d{6}", "<time>", text)
    return [line.rstrip() for line in text.strip().splitlines()]


def matches(shown: list[str], said: list[str]) -> bool:
    """Return True if the lines are the same; a line ``…`` matches any number of lines."""
    pattern = "\n".join("*" if line.strip() == "…" else _escaped(line) for line in shown)
    return fnmatchcase("\n".join(said), pattern)


def _escaped(line: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", line)
