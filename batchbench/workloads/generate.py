"""Making the workload that a spec describes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from batchbench.errors import UsageError
from batchbench.workloads.arrival_times import ArrivalProcess
from batchbench.workloads.lengths import parse_lengths
from batchbench.workloads.outline import Outline, fit
from batchbench.workloads.prompts import (
    BLOCK_TOKENS,
    Encode,
    byte_tokens,
    classic_prompts,
    prompts_of_file,
)
from batchbench.workloads.ragged import Ints
from batchbench.workloads.request import Workload
from batchbench.workloads.seeds import stream
from batchbench.workloads.spec import WorkloadSpec
from batchbench.workloads.traces import Trace, read_trace
from batchbench.workloads.traces.rows import BadRow

QUEUE_SIZE = 32
"""Requests where neither a number nor a trace is given."""

_NAMED = 3  # wrong rows that are named; of more only the number is told

Note = Callable[[str], None]


def make_workload(
    spec: WorkloadSpec,
    *,
    batch_size: int,
    vocab_size: int,
    encode: Encode | None,
    context: int | None = None,
    note: Note | None = None,
) -> Workload:
    """The workload that ``spec`` describes.

    Args:
        batch_size: default of ``long_every``, as in the notebook that the classic workload is from.
        vocab_size: prompts hold ids below it.
        encode: text to token ids; without it the classic prompt's GPT-2 ids are used (modulo the
            vocabulary), and texts of files are spelled in GPT-2's byte tokens.
        context: tokens that the model takes; ``spec.overlong`` says what becomes of longer ones.
        note: is told what a user should know, in lines.

    Raises:
        UsageError: a file that the spec names cannot be read or is wrong, or the prompts do not
            fit in memory.
    """
    outline = make_outline(spec, batch_size=batch_size, encode=encode, context=context, note=note)
    return outline.workload(vocab_size)


def make_outline(
    spec: WorkloadSpec,
    *,
    batch_size: int,
    encode: Encode | None,
    context: int | None = None,
    note: Note | None = None,
) -> Outline:
    """Lengths and times of the workload that ``spec`` describes; arguments as above."""
    note = note or (lambda line: None)
    if spec.trace is not None:
        outline, process = _of_trace(spec, encode or byte_tokens, note)
        bound = None
    else:
        outline, process = _drawn(spec, batch_size, encode), spec.process
        bound = _bound(spec, batch_size, outline)
    if encode is None and (spec.prompts is not None or outline.name.startswith("sharegpt")):
        note("no tokenizer at hand: prompts are spelled in GPT-2's byte tokens")
    outline, told = fit(outline, context, spec.overlong, bound)
    if told:
        note(told)
        outline = replace(outline, name=f"{outline.name}; {told}")
    if process.kind != "trace":
        due = process.due_ns(stream(spec.seed, "arrivals"), len(outline))
        outline = replace(outline, due_ns=due)
    told = f"{process}" + (f", {spec.speed:g} times faster" if spec.speed != 1.0 else "")
    return replace(outline, arrivals=told)


def _drawn(spec: WorkloadSpec, batch_size: int, encode: Encode | None) -> Outline:
    count = spec.queue_size or QUEUE_SIZE
    outputs = spec.output_lengths(batch_size)
    output_tokens = outputs.draw(stream(spec.seed, "output lengths"), count)
    prompts = None
    if spec.prompt_tokens is not None:
        lengths = parse_lengths(spec.prompt_tokens, "--prompt-tokens")
        prompt_tokens = lengths.draw(stream(spec.seed, "prompt lengths"), count)
    else:
        prompts = (
            prompts_of_file(spec.prompts, count, encode)
            if spec.prompts is not None
            else classic_prompts(count, encode)
        )
        prompt_tokens = prompts.lengths
    return Outline(
        name=_name(spec, batch_size, count),
        seed=spec.seed,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        due_ns=np.zeros(count, np.int64),
        prompts=prompts,
        shared=spec.shared_prefix_tokens,
        stop_at_eos=spec.stop_at_eos,
        max_concurrency=spec.max_concurrency,
    )


def _name(spec: WorkloadSpec, batch_size: int, count: int) -> str:
    prompts = f"prompts of {spec.prompt_tokens} tokens" if spec.prompt_tokens else "one prompt"
    if spec.prompts is not None:
        prompts = f"prompts from {spec.prompts.name}"
    if spec.shared_prefix_tokens:
        prompts += f", the first {spec.shared_prefix_tokens} shared"
    if spec.output_tokens is not None:
        text = f"{count} requests; outputs of {spec.output_tokens} tokens; {prompts}"
    else:
        long_every = spec.long_every or batch_size
        text = (
            f"classic: {count} requests, {spec.long_tokens or 100} tokens every {long_every}, "
            f"else {spec.short_tokens or 10}; {prompts}"
        )
    return text + _name_of_arrivals(spec)


def _name_of_arrivals(spec: WorkloadSpec) -> str:
    text = "" if spec.process.kind in ("at-once", "trace") else f"; {spec.process}"
    if spec.max_concurrency is not None:
        text += f"; at most {spec.max_concurrency} in the system"
    return text


def _bound(spec: WorkloadSpec, batch_size: int, outline: Outline) -> int | None:
    """Tokens that no request of the spec exceeds, whatever the seed; None where there is none."""
    prompt: int | None = int(outline.prompt_tokens.max())
    if spec.prompt_tokens is not None:
        prompt = parse_lengths(spec.prompt_tokens, "--prompt-tokens").longest
    output = spec.output_lengths(batch_size).longest
    return None if prompt is None or output is None else prompt + output


# Traces


class _LeftOut:
    """The rows that were left out as wrong: their numbers, and the first of each kind."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, list[BadRow]] = {}

    def __call__(self, row: BadRow) -> None:
        if not row.harmless:  # the remarks of the trace have those
            self._counts[row.kind] += 1
            if self._counts[row.kind] <= _NAMED:
                self._first.setdefault(row.kind, []).append(row)

    @property
    def told(self) -> list[str]:
        """Return a part of a sentence for each kind."""
        parts = []
        for kind, count in self._counts.items():
            first = self._first[kind]
            more = f"; and {count - len(first):,} more" if count > len(first) else ""
            parts.append(f"{kind} left out: {count:,}, {'; '.join(map(str, first))}{more}")
        return parts


def _of_trace(spec: WorkloadSpec, encode: Encode, note: Note) -> tuple[Outline, ArrivalProcess]:
    assert spec.trace is not None
    left_out = _LeftOut()
    trace = read_trace(
        spec.trace,
        encode,
        format=spec.trace_format,
        limit=spec.queue_size,
        on_bad_row=left_out if spec.on_bad_row == "skip" else None,
        block_tokens=spec.trace_block_size,
        time_unit=spec.trace_time_unit,
    )
    count = len(trace.output_tokens)
    kept = f"{trace.format}, {count:,} request{'s' * (count != 1)}"
    note(f"{spec.trace}: {'; '.join([kept, *trace.remarks, *left_out.told])}")
    if spec.queue_size is not None and count < spec.queue_size:
        note(f"{spec.trace}: holds {count:,} requests, fewer than --queue-size {spec.queue_size}")
    _check_digest(spec, trace)
    process = spec.process
    if process.kind == "trace" and trace.due_ns is None:
        if spec.arrivals is not None or spec.speed != 1.0:
            raise UsageError(
                f"--trace {spec.trace}: tells no times; give --request-rate, and drop --speed and "
                "--arrivals trace"
            )
        process = ArrivalProcess("at-once")
    due = np.zeros(count, np.int64) if trace.due_ns is None else _sped(trace.due_ns, spec.speed)
    return _outline_of(spec, trace, due), process


def _outline_of(spec: WorkloadSpec, trace: Trace, due_ns: Ints) -> Outline:
    assert spec.trace is not None
    most = spec.max_concurrency
    requests = f"{len(due_ns)} request{'s' * (len(due_ns) != 1)}"
    name = f"{trace.format} trace {os.path.basename(spec.trace)}: {requests}"
    if trace.blocks is not None and trace.block_tokens != BLOCK_TOKENS:
        name += f", blocks of {trace.block_tokens} tokens"
    if spec.speed != 1.0:
        name += f", {spec.speed:g} times faster"
    return Outline(
        name=trace.about.get("name", name) + _name_of_arrivals(spec),
        seed=spec.seed,
        prompt_tokens=trace.prompt_tokens,
        output_tokens=trace.output_tokens,
        due_ns=due_ns,
        prompts=trace.prompts,
        blocks=trace.blocks,
        block_tokens=trace.block_tokens,
        shared=spec.shared_prefix_tokens,
        stop_at_eos=spec.stop_at_eos or trace.about.get("stop_at_eos", False),
        max_concurrency=trace.about.get("max_concurrency") if most is None else most,
    )


def _sped(due_ns: Ints, speed: float) -> Ints:
    return due_ns if speed == 1.0 else np.rint(due_ns / speed).astype(np.int64)


def _check_digest(spec: WorkloadSpec, trace: Trace) -> None:
    """Raise UsageError where a workload that was saved has been changed since."""
    digest = trace.about.get("digest")
    if digest is None or not trace.whole or trace.prompts is None or trace.due_ns is None:
        return
    saved = Workload(
        name="",
        seed=0,
        prompt_ids=trace.prompts.values,
        prompt_offsets=trace.prompts.offsets,
        output_tokens=trace.output_tokens,
        due_ns=trace.due_ns,
        stop_at_eos=trace.about.get("stop_at_eos", False),
        max_concurrency=trace.about.get("max_concurrency"),
    )
    if saved.digest != digest:
        raise UsageError(
            f"--trace {spec.trace}: was changed or cut off since it was saved: its digest is "
            "another; take digest out of its first line to use it as it is"
        )
