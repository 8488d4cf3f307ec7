"""Prompts: the classic one, those in a file, and random ones."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from batchbench.errors import UsageError, shown
from batchbench.files import MIB, read_utf8
from batchbench.workloads.request import Ints, Ragged, stream

CLASSIC_PROMPT = "The quick brown fox jumped over the"
CLASSIC_PROMPT_IDS = (464, 2068, 7586, 21831, 11687, 625, 262)
"""``CLASSIC_PROMPT`` in GPT-2's tokens."""

LIMIT = 16 * MIB
"""Largest size of a file of prompts."""

BLOCK_TOKENS = 512
"""Tokens per block of a Mooncake trace, unless it has another size."""

Encode = Callable[[str], Sequence[int]]


def classic_prompts(count: int, encode: Encode | None) -> Ragged:
    """Return the same prompt for all requests."""
    ids = CLASSIC_PROMPT_IDS if encode is None else encode(CLASSIC_PROMPT)
    return _repeated([ids], count)


def prompts_of_file(file: Path, count: int, encode: Encode | None) -> tuple[Ragged, int]:
    """Return the prompts of a file with one per line, repeated to ``count``, and their number."""
    distinct: list[Sequence[int]] = []
    for text in read_prompts(file, count):
        distinct.append((encode or byte_tokens)(text))
        if not len(distinct[-1]):
            raise UsageError(f"--prompts {file}: '{shown(text)}' has no tokens")
    return _repeated(distinct, count), len(distinct)


def _repeated(distinct: Sequence[Sequence[int]], count: int) -> Ragged:
    ids = np.concatenate([np.asarray(ids, np.int32) for ids in distinct])
    lengths = np.array([len(ids) for ids in distinct])
    return Ragged.of(ids, lengths).take(np.arange(count) % len(distinct))


def read_prompts(file: Path, most: int) -> list[str]:
    where = f"--prompts {file}"
    # Not splitlines(), which also cuts prompts at form feeds, U+2028 and the like.
    lines = (line[0] for line in re.finditer(r"[^\r\n]+", read_utf8(file, where, LIMIT)))
    prompts = list(itertools.islice((line for line in lines if line.strip()), most))
    if not prompts:
        raise UsageError(f"{where}: contains no prompts; write one per line")
    return prompts


def random_prompts(
    lengths: Ints,
    *,
    seed: int,
    vocab_size: int,
    shared: int,
    blocks: Ragged | None,
    block_tokens: int = BLOCK_TOKENS,
) -> NDArray[np.int32]:
    """Return the ids of random prompts, end to end.

    Args:
        lengths: tokens of each prompt, ``[requests]``.
        shared: number of tokens at the beginning that are the same in all prompts.
        blocks: names of each prompt's blocks of ``block_tokens`` tokens; blocks with equal names
            have equal tokens.
    """
    total = int(lengths.sum())
    if total * 8 > (room := psutil.virtual_memory().available):
        raise UsageError(
            f"--queue-size {len(lengths)}: the prompts have {total:,} tokens, too many for "
            f"{room / 2**30:.1f} GiB of memory; lower it"
        )
    ids = stream(seed, "ids").integers(0, vocab_size, total, dtype=np.int32)
    begins = np.cumsum(lengths) - lengths
    if blocks is not None:
        for i in np.flatnonzero(blocks.lengths).tolist():
            prompt = ids[begins[i] : begins[i] + lengths[i]]
            for nth, name in enumerate(blocks.row(i).tolist()):
                place = prompt[nth * block_tokens : (nth + 1) * block_tokens]
                if len(place):  # a shortened prompt has fewer blocks than names
                    drawn = stream(seed, "blocks", name)
                    place[:] = drawn.integers(0, vocab_size, block_tokens, np.int32)[: len(place)]
    if shared:
        beginning = stream(seed, "prefix").integers(
            0, vocab_size, min(shared, int(lengths.max())), dtype=np.int32
        )
        for begin, length in zip(begins.tolist(), lengths.tolist(), strict=True):
            ids[begin : begin + min(shared, length)] = beginning[:length]
    return ids


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
