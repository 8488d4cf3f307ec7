"""Conversations as JSON, in the dialects of ShareGPT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from batchbench.workloads.prompts import Encode
from batchbench.workloads.traces.objects import read_rows
from batchbench.workloads.traces.rows import BadRow, Dialect, Row, WrongError, shown

TURNS = ("conversations", "conversation", "messages", "items")
"""Keys of a conversation's turns."""

_ASKS = ("human", "user")
_ANSWERS = ("gpt", "chatgpt", "assistant", "model", "bing", "bard")

_LONGEST_TEXT = 2**22
"""Most characters of a question or an answer."""


def read_sharegpt(
    content: BinaryIO, head: bytes, encode: Encode, dialect: Dialect
) -> Iterator[Row | BadRow]:
    """Yield the first question of each conversation, and the length of the first answer to it."""
    return read_rows(content, head, lambda _, found: _conversation(found, encode, dialect))


def _conversation(found: dict[str, Any], encode: Encode, dialect: Dialect) -> Row:
    turns = next((found[key] for key in TURNS if key in found), None)
    if not isinstance(turns, list):
        raise WrongError("has no list of conversations")
    asked: list[str] = []
    answer, others = None, 0
    for turn in turns:
        who = _who(turn)
        if who in _ASKS:
            asked.append(_text(turn))
        elif who in _ANSWERS and asked:
            answer = _text(turn)
            break
        else:
            others += 1
    if answer is None:
        raise WrongError("has no turn of a human with an answer of gpt behind it")
    ids, output_ids = ids_of("the question", "\n".join(asked), encode), None
    if ids:
        output_ids = ids_of("the answer", answer, encode)
    if not ids or not output_ids:
        raise WrongError(f"the {'answer' if ids else 'question'} is empty", "empty texts")
    if others:
        dialect.counts["prompts without their system and other turns"] += 1
    return Row(len(ids), len(output_ids), ids=ids)


def _who(turn: object) -> str:
    """Return the speaker of a turn."""
    if not isinstance(turn, dict):
        raise WrongError(f"a turn is {shown(turn)}: must be an object with from and value")
    who = turn.get("from", turn.get("role"))
    if not isinstance(who, str):
        raise WrongError("a turn lacks from or value, or they are not texts")
    return who.lower()


def _text(turn: dict[str, Any]) -> str:
    """Return the text of a turn; it may be in parts, as in OpenAI's messages."""
    text = turn.get("value", turn.get("content"))
    if isinstance(text, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in text]
        texts = [part for part in parts if isinstance(part, str)]
        text = "\n".join(texts) if len(texts) == len(parts) else None
    if not isinstance(text, str):
        raise WrongError("a turn lacks from or value, or they are not texts")
    return text


def ids_of(what: str, text: object, encode: Encode) -> Sequence[int]:
    """Return the tokens of a text.

    Raises:
        WrongError: it is not a text, or is too long.
    """
    if not isinstance(text, str):
        raise WrongError(f"{what} is {shown(text)}: must be a text")
    if len(text) > _LONGEST_TEXT:
        raise WrongError(f"{what} is longer than {_LONGEST_TEXT:,} characters")
    if not text.isascii():
        # Half of a surrogate pair, as in "\ud83d", is not a character that a tokenizer takes.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return encode(text)
