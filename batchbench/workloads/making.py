"""Making the workload that a spec describes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from batchbench.errors import UsageError
from batchbench.workloads.lengths import parse_lengths
from batchbench.workloads.request import Workload
from batchbench.workloads.spec import WorkloadSpec, read_prompts

CLASSIC_PROMPT = "The quick brown fox jumped over the"
CLASSIC_PROMPT_IDS = (464, 2068, 7586, 21831, 11687, 625, 262)
"""``CLASSIC_PROMPT`` in GPT-2's tokens."""

Encode = Callable[[str], Sequence[int]]


def make_workload(
    spec: WorkloadSpec, *, batch_size: int, vocab_size: int, encode: Encode | None
) -> Workload:
    """The workload that ``spec`` describes.

    Args:
        batch_size: default of ``long_every``, as in the notebook that the classic workload is from.
        vocab_size: prompts hold ids below it.
        encode: text to token ids; without it the classic prompt's GPT-2 ids are used (modulo the
            vocabulary), and prompts from a file are spelled in GPT-2's byte tokens.
    """
    long_every = spec.long_every or batch_size
    position = np.arange(spec.queue_size)
    output_tokens = np.where(position % long_every == 0, spec.long_tokens, spec.short_tokens)
    ids, offsets = _prompts(spec, vocab_size, encode)
    prompts = f"prompts of {spec.prompt_tokens} tokens" if spec.prompt_tokens else "one prompt"
    if spec.prompts is not None:
        prompts = f"prompts from {spec.prompts.name}"
    return Workload(
        name=f"classic: {spec.queue_size} requests, {spec.long_tokens} tokens every {long_every}, "
        f"else {spec.short_tokens}; {prompts}",
        seed=spec.seed,
        prompt_ids=ids,
        prompt_offsets=offsets,
        output_tokens=output_tokens.astype(np.int64),
        due_ns=np.zeros(spec.queue_size, np.int64),
        stop_at_eos=spec.stop_at_eos,
    )


def _prompts(
    spec: WorkloadSpec, vocab_size: int, encode: Encode | None
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Ids of all prompts end to end, and where each begins."""
    count = spec.queue_size
    if spec.prompt_tokens is not None:
        rng = np.random.Generator(np.random.Philox(spec.seed))
        lengths = parse_lengths(spec.prompt_tokens, "--prompt-tokens").draw(rng, count)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return rng.integers(0, vocab_size, offsets[-1], dtype=np.int32), offsets
    if spec.prompts is not None:
        texts = read_prompts(spec.prompts)[:count]
        distinct = [list((encode or byte_tokens)(text)) for text in texts]
        for text, ids in zip(texts, distinct, strict=True):
            if not ids:
                raise UsageError(f"--prompts {spec.prompts}: {text!r} has no tokens")
    elif encode is not None:
        distinct = [list(encode(CLASSIC_PROMPT))]
    else:
        distinct = [list(CLASSIC_PROMPT_IDS)]
    arrays = [np.asarray(ids, np.int32) % vocab_size for ids in distinct]
    turns = np.arange(count) % len(arrays)
    lengths = np.asarray([len(a) for a in arrays])[turns]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.concatenate([arrays[turn] for turn in turns]), offsets


def byte_tokens(text: str) -> list[int]:
    """A text spelled in GPT-2's 256 byte tokens: what can be done without its tokenizer.

    GPT-2's vocabulary begins with the bytes that print (``!`` to ``~``, ``¡`` to ``¬``, ``®`` to
    ``ÿ``), then come the others in order.
    """
    return [_BYTE_TOKENS[byte] for byte in text.encode("utf-8")]


_PRINTING = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_TOKENS = {
    byte: token for token, byte in enumerate(_PRINTING + sorted({*range(256)} - {*_PRINTING}))
}
