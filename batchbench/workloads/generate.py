"""Make the workload that a spec describes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import psutil
from numpy.typing import NDArray

from batchbench.errors import UsageError
from batchbench.workloads.arrivals import ArrivalProcess
from batchbench.workloads.lengths import parse_lengths
from batchbench.workloads.prompts import BLOCK_TOKENS, Encode, byte_tokens, known_prompts
from batchbench.workloads.request import Ints, Ragged, Workload, stream
from batchbench.workloads.sampling import Sampling
from batchbench.workloads.spec import WorkloadSpec
from batchbench.workloads.traces import BadRow, Trace, read_trace

QUEUE_SIZE = 32
"""Number of requests without ``--queue-size`` and ``--trace``."""

_NAMED = 3  # invalid rows of a kind that are named; more are only counted

Note = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Outline:
    """A workload without the ids of random prompts; columns are ``[requests]``.

    ``prompts`` are known (a text's tokens) or None. None means random prompts: their first
    ``shared`` tokens are the same in all, and their ``blocks`` of ``block_tokens`` tokens may have
    names.
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
    arrivals: str = "all at once"  # in words
    stop_at_eos: bool = False
    max_concurrency: int | None = None
    sampling: Sampling | None = None

    def __len__(self) -> int:
        return len(self.output_tokens)

    def workload(self, vocab_size: int) -> Workload:
        """Return the workload; draw random ids, and take known ones modulo the vocabulary."""
        ids = self._random_ids(vocab_size) if self.prompts is None else self.prompts.values
        ids = ids.astype(np.int32, copy=False)
        ids = ids % vocab_size if ids.max() >= vocab_size else ids
        return Workload(
            name=self.name,
            seed=self.seed,
            prompt_ids=ids,
            prompt_offsets=np.concatenate([[0], np.cumsum(self.prompt_tokens)]).astype(np.int64),
            output_tokens=self.output_tokens,
            due_ns=self.due_ns,
            stop_at_eos=self.stop_at_eos,
            max_concurrency=self.max_concurrency,
            sampling=self.sampling,
        )

    def _random_ids(self, vocab_size: int) -> NDArray[np.int32]:
        """Return the ids of random prompts, end to end."""
        lengths, total = self.prompt_tokens, int(self.prompt_tokens.sum())
        if total * 8 > (room := psutil.virtual_memory().available):
            raise UsageError(
                f"--queue-size {len(lengths)}: the prompts have {total:,} tokens, too many for "
                f"{room / 2**30:.1f} GiB of memory; lower it"
            )
        ids = stream(self.seed, "ids").integers(0, vocab_size, total, np.int32)
        if self.blocks is None and not self.shared:
            return ids
        prompts = np.split(ids, np.cumsum(lengths)[:-1])  # views of the ids
        if self.blocks is not None:
            size = self.block_tokens
            for i in np.flatnonzero(self.blocks.lengths).tolist():
                for nth, name in enumerate(self.blocks.row(i).tolist()):
                    place = prompts[i][nth * size : (nth + 1) * size]
                    if len(place):  # a shortened prompt has fewer blocks than names
                        drawn = stream(self.seed, "blocks", name).integers
                        place[:] = drawn(0, vocab_size, size, np.int32)[: len(place)]
        if self.shared:
            most = min(self.shared, int(lengths.max()))
            beginning = stream(self.seed, "prefix").integers(0, vocab_size, most, np.int32)
            for prompt in prompts:
                prompt[:most] = beginning[: len(prompt)]
        return ids

    def with_lengths(self, prompt_tokens: Ints, output_tokens: Ints) -> Outline:
        """Return the requests with shorter lengths; known prompts are cut at their ends."""
        rows = np.arange(len(self))
        prompts = None if self.prompts is None else self.prompts.take(rows, prompt_tokens)
        return replace(
            self, prompt_tokens=prompt_tokens, output_tokens=output_tokens, prompts=prompts
        )

    def take(self, rows: Ints) -> Outline:
        return replace(
            self,
            prompt_tokens=self.prompt_tokens[rows],
            output_tokens=self.output_tokens[rows],
            due_ns=self.due_ns[rows],
            prompts=self.prompts and self.prompts.take(rows),
            blocks=self.blocks and self.blocks.take(rows),
        )


def make_workload(
    spec: WorkloadSpec,
    *,
    batch_size: int,
    vocab_size: int,
    encode: Encode | None,
    context: int | None = None,
    note: Note | None = None,
) -> Workload:
    """Make the workload that ``spec`` describes.

    Args:
        batch_size: default of ``long_every``, as in the notebook that the classic workload is from.
        vocab_size: prompts hold ids below it.
        encode: text to token ids; without it the classic prompt's GPT-2 ids are used (modulo the
            vocabulary), and texts of files are written in GPT-2's byte tokens.
        context: tokens that the model takes; ``spec.overlong`` decides about longer requests.
        note: called with each line that a user should read.
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
    """Make the outline of the workload that ``spec`` describes; arguments as above."""
    note = note or (lambda line: None)
    bound = None
    if spec.trace is not None:
        outline, process = _read(spec, encode or byte_tokens, note)
    else:
        outline, process = _draw(spec, batch_size, encode, note), spec.process
        bound = _bound(spec, batch_size, outline)
    if encode is None and (spec.prompts is not None or outline.name.startswith("sharegpt")):
        note("no tokenizer is available: prompts are written in GPT-2's byte tokens")
    if context is not None and spec.overlong != "error":
        outline = _fit(outline, context, spec.overlong, bound, note)
    if process.kind != "trace":
        due = process.due_ns(stream(spec.seed, "arrivals"), len(outline))
        outline = replace(outline, due_ns=due)
    return replace(outline, arrivals=f"{process}{_speed(spec)}")


def _fit(outline: Outline, context: int, overlong: str, bound: int | None, note: Note) -> Outline:
    """Shorten or skip requests that exceed the context, prompt and output together.

    ``clip`` cuts outputs to what the prompt leaves, and a prompt that leaves nothing to one token
    less than the context; ``scale`` multiplies all lengths by one factor; ``skip`` leaves such
    requests out. ``bound`` is the length that no request of the spec exceeds, whatever the seed;
    ``scale`` uses it so that the factor does not depend on the seed.
    """
    prompt, output = outline.prompt_tokens, outline.output_tokens
    total = prompt + output
    longest = bound if overlong == "scale" and bound else int(total.max())
    if longest <= context:
        return outline
    long = int((total > context).sum())
    if overlong == "scale":
        # Whole-number arithmetic: the sum of both floors never exceeds the context.
        outline = outline.with_lengths(
            *(np.maximum(1, lengths * context // longest) for lengths in (prompt, output))
        )
        factor, possible = f"{context / longest:.3g}", " possible" if bound else ""
        note(
            f"all lengths are multiplied by {factor}: the longest{possible} request has "
            f"{longest:,} tokens, the context {context:,}"
        )
        change = f"lengths × {factor}"
    elif overlong == "clip":
        left = np.minimum(prompt, context - 1)
        outline = outline.with_lengths(left, np.minimum(output, context - left))
        note(f"requests clipped to the {context:,} tokens of the context: {long:,}")
        change = f"{long:,} clipped to {context:,} tokens"
    else:
        if long == len(outline):
            raise UsageError(
                f"--overlong skip: every request exceeds the {context} tokens of the "
                "context; take --overlong clip or scale"
            )
        outline = outline.take(np.flatnonzero(total <= context))
        note(f"requests longer than the {context:,} tokens of the context, skipped: {long:,}")
        change = f"{long:,} longer than {context:,} tokens skipped"
    return replace(outline, name=f"{outline.name}; {change}")


def _draw(spec: WorkloadSpec, batch_size: int, encode: Encode | None, note: Note) -> Outline:
    count = spec.queue_size or QUEUE_SIZE
    outputs, prompts = spec.output_lengths(batch_size), None
    if spec.prompt_tokens is not None:
        lengths = parse_lengths(spec.prompt_tokens, "--prompt-tokens")
        prompt_tokens = lengths.draw(stream(spec.seed, "prompt lengths"), count)
    else:
        prompts, distinct = known_prompts(spec.prompts, count, encode)
        if spec.prompts is not None and distinct < count:
            note(
                f"{spec.prompts}: {distinct:,} of its prompts are repeated to fill {count:,} "
                "requests (--queue-size)"
            )
    return Outline(
        name=_name(spec, batch_size, count),
        seed=spec.seed,
        prompt_tokens=prompt_tokens if prompts is None else prompts.lengths,
        output_tokens=outputs.draw(stream(spec.seed, "output lengths"), count),
        due_ns=np.zeros(count, np.int64),
        prompts=prompts,
        shared=spec.shared_prefix_tokens,
        stop_at_eos=spec.stop_at_eos,
        max_concurrency=spec.max_concurrency,
        sampling=spec.sampling,
    )


def _name(spec: WorkloadSpec, batch_size: int, count: int) -> str:
    prompts = f"prompts of {spec.prompt_tokens} tokens" if spec.prompt_tokens else "one prompt"
    if spec.prompts is not None:
        wrapped = " in the chat template" if spec.chat_template else ""
        prompts = f"prompts from {spec.prompts.name}{wrapped}"
    if spec.shared_prefix_tokens:
        prompts += f", the first {spec.shared_prefix_tokens} shared"
    if spec.output_tokens is not None:
        text = f"{count} requests; outputs of {spec.output_tokens} tokens; {prompts}"
    else:
        every = f"{spec.long_every}" if spec.long_every else f"{batch_size} (the batch size)"
        text = (
            f"classic: {count} requests, {spec.long_tokens or 100} tokens every {every}, "
            f"else {spec.short_tokens or 10}; {prompts}"
        )
    return text + _conditions(spec, spec.sampling)


def _conditions(spec: WorkloadSpec, sampling: Sampling | None) -> str:
    """Return words for the arrivals and the sampling, to follow a name."""
    text = "" if spec.process.kind in ("at-once", "trace") else f"; {spec.process}"
    if spec.max_concurrency is not None:
        text += f"; at most {spec.max_concurrency} in the system"
    return f"{text}; {sampling}" if sampling else text


def _speed(spec: WorkloadSpec) -> str:
    return f", {spec.speed:g} times faster" if spec.speed != 1.0 else ""


def _bound(spec: WorkloadSpec, batch_size: int, outline: Outline) -> int | None:
    """Return the tokens that no request of the spec exceeds, whatever the seed; None if any may."""
    prompt: int | None = int(outline.prompt_tokens.max())
    if spec.prompt_tokens is not None:
        prompt = parse_lengths(spec.prompt_tokens, "--prompt-tokens").longest
    output = spec.output_lengths(batch_size).longest
    return None if prompt is None or output is None else prompt + output


# Traces


def _read(spec: WorkloadSpec, encode: Encode, note: Note) -> tuple[Outline, ArrivalProcess]:
    assert spec.trace is not None
    counts: Counter[str] = Counter()
    first: defaultdict[str, list[str]] = defaultdict(list)

    def skip(row: BadRow) -> None:
        if not row.harmless:  # the trace has remarks about harmless ones
            counts[row.kind] += 1
            if counts[row.kind] <= _NAMED:
                first[row.kind].append(str(row))

    trace = read_trace(
        spec.trace,
        encode,
        format=spec.trace_format,
        limit=spec.queue_size,
        on_bad_row=skip if spec.on_bad_row == "skip" else None,
        block_tokens=spec.trace_block_size,
        time_unit=spec.trace_time_unit,
    )
    size = len(trace.output_tokens)
    requests = "1 request" if size == 1 else f"{size:,} requests"
    told = [f"{trace.format}, {requests}", *trace.remarks]
    for kind, count in counts.items():
        told += [f"{kind} skipped: {count:,}, {'; '.join(first[kind])}"]
        told += [f"and {count - _NAMED:,} more"] * (count > _NAMED)
    note(f"{spec.trace}: {'; '.join(told)}")
    if size < (spec.queue_size or 0):
        note(f"{spec.trace}: has {size:,} requests, fewer than --queue-size {spec.queue_size}")
    process = spec.process
    if process.kind == "trace" and trace.due_ns is None:
        if spec.arrivals is not None or spec.speed != 1.0:
            raise UsageError(
                f"--trace {spec.trace}: has no times; give --request-rate, and drop --speed and "
                "--arrivals trace"
            )
        process = ArrivalProcess("at-once")
    return _outline_of(spec, trace, requests), process


def _outline_of(spec: WorkloadSpec, trace: Trace, requests: str) -> Outline:
    assert spec.trace is not None
    due = np.zeros(len(trace.output_tokens), np.int64) if trace.due_ns is None else trace.due_ns
    name = f"{trace.format} trace {spec.trace.name}: {requests.replace(',', '')}"
    if trace.blocks is not None and trace.block_tokens != BLOCK_TOKENS:
        name += f", blocks of {trace.block_tokens} tokens"
    about, sampling = trace.about, trace.about.get("sampling")
    name = about.get("name", name + _speed(spec)).removesuffix(f"; {sampling}")
    saved = Outline(
        name=name,
        seed=spec.seed,
        prompt_tokens=trace.prompt_tokens,
        output_tokens=trace.output_tokens,
        due_ns=due,
        prompts=trace.prompts,
        blocks=trace.blocks,
        block_tokens=trace.block_tokens,
        shared=spec.shared_prefix_tokens,
        stop_at_eos=about.get("stop_at_eos", False),
        max_concurrency=about.get("max_concurrency"),
        sampling=sampling,
    )
    digest = about.get("digest")
    is_whole = trace.whole and trace.prompts is not None and trace.due_ns is not None
    if digest is not None and is_whole and saved.workload(2**31).digest != digest:
        raise UsageError(
            f"--trace {spec.trace}: was changed or cut off after it was saved, since its digest "
            "differs; delete the digest in its first line to use it as it is"
        )
    sampling = sampling if spec.temperature is None else spec.sampling
    return replace(
        saved,
        name=name + _conditions(spec, sampling),
        due_ns=due if spec.speed == 1.0 else np.rint(due / spec.speed).astype(np.int64),
        stop_at_eos=spec.stop_at_eos or saved.stop_at_eos,
        max_concurrency=spec.max_concurrency or saved.max_concurrency,
        sampling=sampling,
    )
