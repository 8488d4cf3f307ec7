"""Outputs of a server, checked against the model that it runs (``--verify-model``).

The check needs token ids. A server that tells none leaves the text: it counts if the tokenizer
turns it into as many tokens as the server produced, and these back into the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from batchbench.batching.models import ModelCache, ModelSpec, Tokenizer
from batchbench.batching.models.source import read_config
from batchbench.batching.recording import Recording
from batchbench.batching.remote.agreement import Output
from batchbench.batching.verification import NOT_VERIFIED, Verification, verify
from batchbench.workloads import Workload

_DTYPES = ("float32", "bfloat16", "float16")


def with_ids(
    recording: Recording, outputs: Sequence[Output], tokenizer: Tokenizer | None
) -> tuple[Recording, set[int]]:
    """Return a recording with token ids, and the requests whose ids are not known."""
    if recording.tokens is not None:
        return recording, set()
    if tokenizer is None:
        return recording, set(range(len(outputs)))
    ids, unknown = list[Sequence[int]](), set[int]()
    for i, count in enumerate(recording.requests.output_tokens.tolist()):
        found = _ids_of(outputs[i], tokenizer)
        if found is None or len(found) != count:
            unknown.add(i)
            found = [0] * count
        ids.append(found)
    return replace(recording, tokens=np.concatenate(ids).astype(np.int32)), unknown


def _ids_of(output: Output, tokenizer: Tokenizer) -> Sequence[int] | None:
    if output.ids is not None:
        return output.ids
    found = tokenizer.encode(output.text)
    return found if tokenizer.decode(found) == output.text else None


def verify_against(
    folder: Path,
    models: ModelCache,
    workload: Workload,
    recordings: Sequence[Recording],
    limit: int | None,
    chosen: Sequence[int],
) -> Verification:
    """Check the outputs of ``chosen`` requests, or of ``limit`` of them, by the model in a folder.

    The model has the number format of its files, as it does on most servers.
    """
    if limit is not None and limit < len(chosen):
        picked = np.unique(np.linspace(0, len(chosen) - 1, limit).round().astype(int)).tolist()
        chosen = [chosen[i] for i in picked]
    if not chosen:
        return NOT_VERIFIED
    from batchbench.batching.engines.torch.reference import TeacherForced

    config = read_config(str(folder), folder)
    dtype = config.get("dtype") or config.get("torch_dtype")
    spec = ModelSpec(str(folder), "pretrained", dtype=dtype if dtype in _DTYPES else "auto")
    source = models.find(spec, weights=True)
    reference = TeacherForced(models.load(source, spec, workload.seed))
    return verify(workload, recordings, reference, source.eos_token_ids, None, chosen)
