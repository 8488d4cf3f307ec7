"""Making the workload that a spec describes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from batchbench.errors import UsageError
from batchbench.workloads.arrival_times import ArrivalProcess
from batchbench.workloads.lengths import parse_lengths
from batchbench.workloads.prompts import (
    BLOCK_TOKENS,
    Encode,
    byte_tokens,
    classic_prompts,
    prompts_of_file,
    random_prompts,
)
from batchbench.workloads.request import Ints, Ragged, Workload
from batchbench.workloads.seeds import stream
from batchbench.workloads.spec import WorkloadSpec
from batchbench.workloads.traces import BadRow, Trace, read_trace


@dataclass(frozen=True, eq=False)
class Outline:
    """A workload without the ids of random prompts; columns are ``[requests]``.

    ``prompts`` are known (a text's tokens) or None: random ones, the first ``shared`` tokens of
    which are the same in all, and whose ``blocks`` of ``block_tokens`` tokens may have names.
    """

    name: str
    seed: int
    prompt_tokens: Ints
    output_tokens: Ints
    due_ns: Ints
    prompts: Ragged | None = None
    blocks: Ragged | None = None
    block_tokens: int = BLOCK_TOKENS
    shared: int = 0
    arrivals: str = "all at once"  # for people
    stop_at_eos: bool = False
    max_concurrency: int | None = None

    def __len__(self) -> int:
        return len(self.output_tokens)

    def workload(self, vocab_size: int) -> Workload:
        """The workload: ids of random prompts are drawn, known ones taken modulo the vocabulary.

        Raises:
            UsageError: its prompts do not fit in memory.
        """
        if self.prompts is not None:
            ids = self.prompts.values.astype(np.int32, copy=False)
            ids = ids % vocab_size if ids.max() >= vocab_size else ids
        else:
            ids = random_prompts(
                self.prompt_tokens,
                seed=self.seed,
                vocab_size=vocab_size,
                shared=self.shared,
                blocks=self.blocks,
                block_tokens=self.block_tokens,
            )
        return Workload(
            name=self.name,
            seed=self.seed,
            prompt_ids=ids,
            prompt_offsets=np.concatenate([[0], np.cumsum(self.prompt_tokens)]).astype(np.int64),
            output_tokens=self.output_tokens,
            due_ns=self.due_ns,
            stop_at_eos=self.stop_at_eos,
            max_concurrency=self.max_concurrency,
        )

    def beyond(self, context: int | None, model: str) -> list[str]:
        """A line where requests are longer than a model's context; none where all fit."""
        long = (
            0 if context is None else int((self.prompt_tokens + self.output_tokens > context).sum())
        )
        if not long:
            return []
        return [
            f"{long:,} of {len(self):,} requests exceed the {context:,} tokens that {model} takes; "
            "say --overlong clip, scale or skip"
        ]

    def with_lengths(self, prompt_tokens: Ints, output_tokens: Ints) -> Outline:
        """The same requests, shorter: known prompts keep their beginnings."""
        rows = np.arange(len(self))
        prompts = None if self.prompts is None else self.prompts.take(rows, prompt_tokens)
        return replace(
            self, prompt_tokens=prompt_tokens, output_tokens=output_tokens, prompts=prompts
        )

    def take(self, rows: Ints) -> Outline:
        """Some of the requests."""
        return replace(
            self,
            prompt_tokens=self.prompt_tokens[rows],
            output_tokens=self.output_tokens[rows],
            due_ns=self.due_ns[rows],
            prompts=self.prompts and self.prompts.take(rows),
            blocks=self.blocks and self.blocks.take(rows),
        )


def fit(
    outline: Outline, context: int | None, overlong: str, bound: int | None = None
) -> tuple[Outline, str | None]:
    """The outline within a model's context, and a line that says what was done, if anything.

    Args:
        context: tokens that the model takes, prompt and output together; None is no limit.
        overlong: ``clip`` cuts outputs to what the prompt leaves, and a prompt that leaves nothing
            to one token less than the context; ``scale`` multiplies all lengths by one factor;
            ``skip`` leaves such requests out; ``error`` does nothing.
        bound: tokens that no request of this kind exceeds, whatever the seed: what ``scale`` goes
            by instead of the longest request.

    Raises:
        UsageError: no request is left.
    """
    prompt, output = outline.prompt_tokens, outline.output_tokens
    total = prompt + output
    if context is None or overlong == "error":
        return outline, None
    long = int((total > context).sum())
    if overlong == "scale":
        longest = bound or int(total.max())
        if longest <= context:
            return outline, None
        # Whole-number arithmetic: the sum of both floors never exceeds the context.
        scaled = [np.maximum(1, lengths * context // longest) for lengths in (prompt, output)]
        told = f"lengths are scaled by {context / longest:.3g}"
        return outline.with_lengths(*scaled), f"{told}, so that the longest fits {context:,} tokens"
    if not long:
        return outline, None
    if overlong == "clip":
        kept = np.minimum(prompt, context - 1)
        clipped = outline.with_lengths(kept, np.minimum(output, context - kept))
        return clipped, f"requests clipped to the {context:,} tokens of the context: {long:,}"
    if long == len(outline):
        raise UsageError(
            f"--overlong skip: every request exceeds the {context} tokens of the "
            "context; take --overlong clip or scale"
        )
    told = f"requests longer than the {context:,} tokens of the context, left out: {long:,}"
    return outline.take(np.flatnonzero(total <= context)), told


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
