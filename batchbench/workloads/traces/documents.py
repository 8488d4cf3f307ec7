"""Traces as JSON: ShareGPT's conversations and Mooncake's lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from batchbench.workloads.traces.rows import (
    BadRow,
    Row,
    WrongError,
    nanoseconds_of,
    read_lines,
    shown,
    tokens_of,
)

Encode = Callable[[str], Sequence[int]]

_ASKS, _ANSWERS = ("human", "user"), ("gpt", "chatgpt", "assistant")


def read_sharegpt(content: BinaryIO, encode: Encode) -> Iterator[Row | BadRow]:
    """The first question of each conversation, and the length of the first answer to it.

    The file is one JSON array; it is read as a stream, an element at a time. Rows count from 1.
    """
    import ijson

    number = 0
    elements = ijson.items(content, "item", use_float=True)
    while True:
        number += 1
        try:
            element = next(elements, None)
        except (ijson.JSONError, ValueError) as error:
            why = str(error).splitlines()[0]
            yield BadRow(number, f"is not JSON ({why}); nothing behind it can be read", "row")
            return
        if element is None:
            return
        try:
            yield _conversation(element, encode)
        except WrongError as error:
            yield BadRow(number, str(error), "row")


def _conversation(element: Any, encode: Encode) -> Row:
    turns = element.get("conversations") if isinstance(element, dict) else None
    if not isinstance(turns, list):
        raise WrongError("has no list of conversations")
    texts = iter([_turn(turn) for turn in turns])
    asked = next((text for who, text in texts if who in _ASKS), None)
    answer = next((text for who, text in texts if who in _ANSWERS), None)
    if asked is None or answer is None:
        raise WrongError("has no turn of a human with an answer of gpt behind it")
    ids, output_tokens = encode(asked), len(encode(answer))
    if not ids or not output_tokens:
        raise WrongError(f"the {'answer' if ids else 'question'} is empty")
    return Row(len(ids), output_tokens, ids=ids)


def _turn(turn: Any) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise WrongError(f"a turn is {shown(turn)}: must be an object with from and value")
    who, text = turn.get("from"), turn.get("value")
    if not isinstance(who, str) or not isinstance(text, str):
        raise WrongError("a turn lacks from or value, or they are no texts")
    return who, text


def read_mooncake(content: BinaryIO) -> Iterator[Row | BadRow]:
    """Rows of a Mooncake trace; ``hash_ids`` name the prompt's blocks of 512 tokens."""
    for number, line in read_lines(content):
        try:
            found = line if isinstance(line, BadRow) else _mooncake(parse_object(line))
        except WrongError as error:
            found = BadRow(number, str(error))
        yield found


def _mooncake(found: dict[str, Any]) -> Row:
    blocks = found.get("hash_ids", [])
    if not isinstance(blocks, list) or not all(
        type(block) is int and 0 <= block < 2**63 for block in blocks
    ):
        raise WrongError(f"hash_ids is {shown(blocks)}: must be a list of whole numbers")
    return Row(
        prompt_tokens=tokens_of("input_length", found.get("input_length")),
        output_tokens=tokens_of("output_length", found.get("output_length")),
        due_ns=nanoseconds_of("timestamp", found.get("timestamp"), 10**6),  # type: ignore[arg-type]
        blocks=blocks,
    )


def parse_object(line: bytes) -> dict[str, Any]:
    """A JSON object on a line.

    Raises:
        WrongError: it is none.
    """
    try:
        found = json.loads(line)
    except UnicodeDecodeError as error:
        raise WrongError("is not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise WrongError(f"is not JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(found, dict):
        raise WrongError(f"is {shown(found)}: must be a JSON object")
    return found
