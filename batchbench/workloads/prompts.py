"""Prompts with known tokens: the classic one, and those in a file."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from batchbench.errors import UsageError, shown
from batchbench.files import MIB, read_utf8
from batchbench.workloads.request import Ragged

CLASSIC_PROMPT = "The quick brown fox jumped over the"
CLASSIC_PROMPT_IDS = (464, 2068, 7586, 21831, 11687, 625, 262)
"""``CLASSIC_PROMPT`` in GPT-2's tokens."""

LIMIT = 16 * MIB
"""Largest size of a file of prompts."""

BLOCK_TOKENS = 512
"""Tokens per block of a Mooncake trace, unless it has another size."""

Encode = Callable[[str], Sequence[int]]


def known_prompts(file: Path | None, count: int, encode: Encode | None) -> tuple[Ragged, int]:
    """Return prompts repeated to ``count``, and the number of different ones.

    They are the lines of a file, or the classic one.
    """
    if file is None:
        distinct = [CLASSIC_PROMPT_IDS if encode is None else encode(CLASSIC_PROMPT)]
    else:
        texts = read_prompts(file, count)
        distinct = [(encode or byte_tokens)(text) for text in texts]
        for text, prompt in zip(texts, distinct, strict=True):
            if not len(prompt):
                raise UsageError(f"--prompts {file}: '{shown(text)}' has no tokens")
    ids = np.concatenate([np.asarray(prompt, np.int32) for prompt in distinct])
    lengths = np.array([len(prompt) for prompt in distinct])
    return Ragged.of(ids, lengths).take(np.arange(count) % len(distinct)), len(distinct)


def read_prompts(file: Path, most: int) -> list[str]:
    where = f"--prompts {file}"
    # Not splitlines(), which also cuts prompts at form feeds, U+2028 and the like.
    lines = (line[0] for line in re.finditer(r"[^\r\n]+", read_utf8(file, where, LIMIT)))
    prompts = list(itertools.islice((line for line in lines if line.strip()), most))
    if not prompts:
        raise UsageError(f"{where}: contains no prompts; write one per line")
    return prompts


def byte_tokens(text: str) -> list[int]:
    """Return a text in GPT-2's 256 byte tokens, which need no tokenizer.

    GPT-2's vocabulary begins with the bytes that print (``!`` to ``~``, ``¡`` to ``¬``, ``®`` to
    ``ÿ``); the others follow in order.
    """
    return [_BYTE_TOKENS[byte] for byte in text.encode("utf-8", "surrogatepass")]


_PRINTING = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_TOKENS = {
    byte: token for token, byte in enumerate(_PRINTING + sorted({*range(256)} - {*_PRINTING}))
}
