"""The Recording: the log of one trial, from which everything that people read is derived.

A record a request holds step numbers; a span is a run of equal steps with the end time of each.
Times, latencies, occupancy, timeline and counters are functions of these (``reports.metrics``).
"""

from __future__ import annotations

import io
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchbench.batching.plan import Plan
from batchbench.errors import UsageError
from batchbench.workloads import Request, Workload

Ints = NDArray[np.int64]

FORMAT = 2
"""Version of the file format that :meth:`Recording.save` writes."""


@dataclass(frozen=True)
class Header:
    """What one trial was: specs, resolved model and device, environment, observations."""

    strategy: str
    trial: int
    slots: int
    simulated: bool
    workload: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)
    """Model, device and engine as resolved, and what was observed beside the steps."""


@dataclass(frozen=True, eq=False)
class RequestLog:
    """A row a request, ``[requests]`` each; step numbers count forward passes from 0.

    Slot and steps are -1 where a strategy that schedules for itself does not show them.
    """

    due_ns: Ints  # when it truly was due: in a closed loop not before there was room
    prompt_tokens: Ints
    output_tokens: Ints  # produced
    slot: Ints
    admitted: Ints  # first step that computes it
    first: Ints  # step that yields its first token
    last: Ints  # step that yields its last token
    released: Ints  # first step in which its slot is free again


@dataclass(frozen=True, eq=False)
class SpanLog:
    """A row a run of equal steps, ``[spans]`` each."""

    steps: Ints
    start_ns: Ints  # start of the span's first step
    decoding: Ints  # slots computed as decode, finished ones that are held included
    waiting: Ints  # requests that are due and not in a slot
    chunks: Ints  # pieces of prompts computed (only in spans of one step)


@dataclass(frozen=True, eq=False)
class ChunkLog:
    """A row a piece of a prompt, ``[chunks]`` each, in the order of the spans."""

    request: Ints
    start: Ints
    stop: Ints


@dataclass(frozen=True, eq=False)
class WaitLog:
    """A row a wait, ``[waits]`` each: nothing could be computed before some time.

    It tells the time in which there was nothing to do from the time that the loop itself took.
    """

    step: Ints  # steps launched before it
    start_ns: Ints
    until_ns: Ints  # what was waited for: a request, or a time at which to ask the policy again
    end_ns: Ints
    waiting: Ints  # requests that are due and not in a slot


@dataclass(frozen=True, eq=False)
class Recording:
    """One trial.

    Times are nanoseconds since the start of the trial. The end of each step is either measured
    (``ends_ns``, ``[steps]``) or, in simulation, a formula (``step_ns``, ``[spans]``: what each
    step of a span costs). ``tokens`` is ``[sum of output_tokens]``, request after request; None
    where no model ran. A strategy that shows no steps has no spans, and tells instead when each
    token was there, ``token_ends_ns``, ``[sum of output_tokens]``, and when it began with each
    request, ``begun_ns``, ``[requests]``.
    """

    header: Header
    requests: RequestLog
    spans: SpanLog
    chunks: ChunkLog
    waits: WaitLog
    ends_ns: Ints | None
    step_ns: Ints | None
    tokens: NDArray[np.int32] | None
    token_ends_ns: Ints | None = None
    begun_ns: Ints | None = None

    @property
    def has_steps(self) -> bool:
        """Whether steps are known; without them there are no counters and no timeline."""
        return self.token_ends_ns is None

    @property
    def num_steps(self) -> int:
        """Forward passes."""
        return int(self.spans.steps.sum())

    @cached_property
    def first_steps(self) -> Ints:
        """Number of each span's first step, ``[spans]``."""
        return np.cumsum(self.spans.steps) - self.spans.steps

    @cached_property
    def step_ends_ns(self) -> Ints:
        """End of each step, ``[steps]``."""
        if self.ends_ns is not None:
            return self.ends_ns
        if not self.has_steps:
            return np.zeros(0, np.int64)
        assert self.step_ns is not None
        return self.step_starts_ns + np.repeat(self.step_ns, self.spans.steps)

    @cached_property
    def step_starts_ns(self) -> Ints:
        """Start of each step, ``[steps]``: a span's own start, then the end of the step before."""
        starts = np.repeat(self.spans.start_ns, self.spans.steps)
        if not self.has_steps:
            return starts
        if self.ends_ns is not None:
            inner = np.ones(len(starts), bool)
            inner[self.first_steps] = False
            starts[inner] = self.ends_ns[np.flatnonzero(inner) - 1]
        else:
            assert self.step_ns is not None
            nth = np.arange(len(starts)) - np.repeat(self.first_steps, self.spans.steps)
            starts = starts + nth * np.repeat(self.step_ns, self.spans.steps)
        return starts

    def ends_of(self, steps: Ints) -> Ints:
        """End of each of these steps, given by number: without a list of all steps."""
        if self.ends_ns is not None:
            return self.ends_ns[steps]
        assert self.step_ns is not None
        span = self.spans_of(steps)
        nth = steps - self.first_steps[span]
        ends: Ints = self.spans.start_ns[span] + (nth + 1) * self.step_ns[span]
        return ends

    def starts_of(self, steps: Ints) -> Ints:
        """Start of each of these steps, given by number: without a list of all steps."""
        span = self.spans_of(steps)
        nth = steps - self.first_steps[span]
        starts = self.spans.start_ns[span]
        if self.ends_ns is not None:
            return np.where(nth > 0, self.ends_ns[steps - 1], starts)
        assert self.step_ns is not None
        return starts + nth * self.step_ns[span]

    def spans_of(self, steps: Ints) -> Ints:
        """Number of the span in which each of these steps lies."""
        return np.searchsorted(self.first_steps, steps, side="right") - 1

    @cached_property
    def span_ends_ns(self) -> Ints:
        """End of each span's last step, ``[spans]``."""
        if not self.has_steps:
            return np.zeros(0, np.int64)
        return self.ends_of(self.first_steps + self.spans.steps - 1)

    @property
    def duration_ns(self) -> int:
        """Start of the trial to the last token of the last request."""
        return int(self.last_token_ns.max())

    @cached_property
    def admitted_ns(self) -> Ints:
        """Start of the first step that computes each request, ``[requests]``."""
        return self.starts_of(self.requests.admitted) if self.begun_ns is None else self.begun_ns

    @cached_property
    def first_token_ns(self) -> Ints:
        """When each request had its first token, ``[requests]``."""
        if self.token_ends_ns is not None:
            return self.token_ends_ns[self.token_offsets[:-1]]
        return self.ends_of(self.requests.first)

    @cached_property
    def last_token_ns(self) -> Ints:
        """When each request had its last token, ``[requests]``."""
        if self.token_ends_ns is not None:
            return self.token_ends_ns[self.token_offsets[1:] - 1]
        return self.ends_of(self.requests.last)

    @cached_property
    def token_offsets(self) -> Ints:
        """Where each request's tokens begin in ``tokens``, ``[requests + 1]``."""
        return np.concatenate([[0], np.cumsum(self.requests.output_tokens)])

    def tokens_of(self, request: int) -> NDArray[np.int32]:
        """Output tokens of one request."""
        if self.tokens is None:
            raise ValueError("no model ran: the recording holds no tokens")
        return self.tokens[self.token_offsets[request] : self.token_offsets[request + 1]]

    def merged(self) -> Recording:
        """The same trial with neighbouring equal spans joined, of a simulation.

        How often the loop came back to decide does not show in it.
        """
        if self.step_ns is None:
            raise ValueError("only a simulation has steps of equal cost to merge")
        s, cost = self.spans, self.step_ns
        if not len(s.steps):
            return self
        equal = (s.decoding[1:] == s.decoding[:-1]) & (s.waiting[1:] == s.waiting[:-1])
        equal &= (s.chunks[1:] == 0) & (s.chunks[:-1] == 0) & (cost[1:] == cost[:-1])
        equal &= s.start_ns[1:] == (s.start_ns + s.steps * cost)[:-1]
        begins = np.flatnonzero(np.concatenate([[True], ~equal]))
        spans = SpanLog(
            steps=np.add.reduceat(s.steps, begins),
            start_ns=s.start_ns[begins],
            decoding=s.decoding[begins],
            waiting=s.waiting[begins],
            chunks=s.chunks[begins],
        )
        return replace(self, spans=spans, step_ns=cost[begins])

    @classmethod
    def of_tokens(
        cls,
        header: Header,
        workload: Workload,
        tokens: Sequence[Sequence[int]],
        ends_ns: Sequence[Sequence[int]],
        begun_ns: Sequence[int],
        due_ns: Ints | None = None,
    ) -> Recording:
        """Of a strategy that shows no steps: each request's tokens, and when each was there.

        Args:
            ends_ns: a list a request, as long as its tokens; nanoseconds since the trial's start.
            begun_ns: when computing each request began.
            due_ns: when each request truly was due; None where that is as the workload says.
        """
        counts = np.array([len(of_request) for of_request in tokens], np.int64)
        if not counts.all() or [len(of_request) for of_request in ends_ns] != counts.tolist():
            raise ValueError("each request needs at least one token, and a time for each")
        unknown, none = np.full(len(workload), -1, np.int64), np.zeros(0, np.int64)
        requests = RequestLog(
            due_ns=workload.due_ns if due_ns is None else due_ns,
            prompt_tokens=workload.prompt_tokens,
            output_tokens=counts,
            **dict.fromkeys(("slot", "admitted", "first", "last", "released"), unknown),
        )
        return cls(
            header=header,
            requests=requests,
            spans=SpanLog(none, none, none, none, none),
            chunks=ChunkLog(none, none, none),
            waits=WaitLog(none, none, none, none, none),
            ends_ns=None,
            step_ns=None,
            tokens=np.fromiter(chain.from_iterable(tokens), np.int32, counts.sum()),
            token_ends_ns=np.fromiter(chain.from_iterable(ends_ns), np.int64, counts.sum()),
            begun_ns=np.asarray(begun_ns, np.int64),
        )

    # Files

    def save(self) -> bytes:
        """The recording as a NumPy ``.npz`` archive: its header as JSON and its columns."""
        header = {f.name: getattr(self.header, f.name) for f in fields(Header)}
        arrays: dict[str, NDArray[Any]] = {
            "header": np.frombuffer(
                json.dumps({"format": FORMAT, **header}, allow_nan=False).encode(), np.uint8
            )
        }
        for log in ("requests", "spans", "chunks", "waits"):
            for column in fields(getattr(self, log)):
                arrays[f"{log}.{column.name}"] = getattr(getattr(self, log), column.name)
        for name in ("ends_ns", "step_ns", "tokens", "token_ends_ns", "begun_ns"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        out = io.BytesIO()
        np.savez_compressed(out, allow_pickle=False, **arrays)
        return out.getvalue()

    @classmethod
    def load(cls, file: Path) -> Recording:
        """Read what :meth:`save` wrote.

        Raises:
            UsageError: the file is missing, torn, or of another format.
        """
        try:
            with file.open("rb") as content, np.load(content, allow_pickle=False) as arrays:
                header = json.loads(arrays["header"].tobytes())
                if header.pop("format") != FORMAT:
                    raise UsageError(f"{file}: written by another version; record it again")
                logs: dict[str, Any] = {
                    name: kind(**{c.name: arrays[f"{name}.{c.name}"] for c in fields(kind)})
                    for name, kind in (
                        ("requests", RequestLog),
                        ("spans", SpanLog),
                        ("chunks", ChunkLog),
                        ("waits", WaitLog),
                    )
                }
                times = ("ends_ns", "step_ns", "token_ends_ns")
                rest = {n: arrays.get(n) for n in (*times, "tokens", "begun_ns")}
                if sum(rest[name] is not None for name in times) != 1 or (
                    (rest["begun_ns"] is None) is not (rest["token_ends_ns"] is None)
                ):
                    raise KeyError("times of steps or tokens")
                return cls(header=Header(**header), **logs, **rest)
        except UsageError:
            raise
        except FileNotFoundError as error:
            raise UsageError(f"{file}: no such recording") from error
        except Exception as error:  # zip, JSON, missing arrays: however a file can be spoiled
            raise UsageError(
                f"{file}: is not a whole recording ({type(error).__name__})"
            ) from error


@dataclass(frozen=True, eq=False)
class Steps:
    """What an engine tells of the steps that it ran since it was last asked.

    ``start_ns`` is one a call of ``run``; ``ends_ns`` one a step (or ``step_ns`` one a call, in
    simulation); ``tokens`` is ``[steps, slots]``, defined where a slot was computed.
    """

    start_ns: Ints
    ends_ns: Ints | None = None
    step_ns: Ints | None = None
    tokens: NDArray[np.int32] | None = None


class Recorder:
    """Writes the log of one trial from plans alone."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        # Arrays of machine integers: a million requests leave millions of rows.
        self._due, self._slot, self._admitted, self._first, self._last, self._released = (
            array("q", [-1]) * len(workload) for _ in range(6)
        )
        self._occupant: dict[int, int] = {}  # slot -> index of the request
        self._spans, self._chunks, self._waits = (array("q") for _ in range(3))
        self.steps = 0
        self.waited_ns = 0

    def launched(self, plan: Plan, steps: int, waiting: int) -> None:
        """``steps`` passes of ``plan`` were launched while ``waiting`` requests waited."""
        for slot in plan.released:
            self._released[self._occupant.pop(slot)] = self.steps
        for request, slot, start, stop in plan.chunks:
            index = request.index
            if start == 0:
                self._due[index] = request.due_ns
                self._slot[index], self._admitted[index] = slot, self.steps
                self._occupant[slot] = index
            if stop == request.prompt_tokens:
                self._first[index] = self.steps
            self._chunks.extend((index, start, stop))
        self._spans.extend((steps, len(plan.slots), waiting, len(plan.chunks)))
        self.steps += steps

    def waited(self, start_ns: int, until_ns: int, end_ns: int, waiting: int) -> None:
        """Nothing was computed from ``start_ns`` to ``end_ns``, while ``waiting`` waited."""
        self.waited_ns += end_ns - start_ns
        self._waits.extend((self.steps, start_ns, until_ns, end_ns, waiting))

    def finished(self, request: Request) -> None:
        """``request`` got its last token in the last step launched."""
        self._last[request.index] = self.steps - 1

    def recording(self, header: Header, ran: Steps) -> Recording:
        """The log, with the times and tokens that the engine tells."""
        for index in self._occupant.values():
            self._released[index] = self.steps
        spans, chunks, waits = (
            np.array(log, np.int64).reshape(-1, width)
            for log, width in ((self._spans, 4), (self._chunks, 3), (self._waits, 5))
        )
        span_log = SpanLog(*np.insert(spans, 1, ran.start_ns, axis=1).T.copy())
        produced, tokens = self._workload.output_tokens, None
        if ran.tokens is not None:
            produced, tokens = self._tokens(span_log, ran.tokens)
        requests = RequestLog(
            due_ns=np.array(self._due),
            prompt_tokens=self._workload.prompt_tokens,
            output_tokens=produced,
            slot=np.array(self._slot),
            admitted=np.array(self._admitted),
            first=np.array(self._first),
            last=np.array(self._last),
            released=np.array(self._released),
        )
        return Recording(
            header,
            requests,
            span_log,
            ChunkLog(*chunks.T.copy()),
            WaitLog(*waits.T.copy()),
            ran.ends_ns,
            ran.step_ns,
            tokens,
        )

    def _tokens(self, spans: SpanLog, by_step: NDArray[np.int32]) -> tuple[Ints, NDArray[np.int32]]:
        """Number and values of each request's tokens, picked out of ``[steps, slots]``."""
        decodes = np.repeat(spans.decoding > 0, spans.steps)
        picked = [
            by_step[token_steps(decodes, first, last), slot]
            for first, last, slot in zip(self._first, self._last, self._slot, strict=True)
        ]
        counts = np.array([len(tokens) for tokens in picked], np.int64)
        return counts, np.concatenate(picked)


def token_steps(decodes: NDArray[np.bool_], first: int, last: int) -> Ints:
    """Steps in which a request got its tokens.

    Its first, and from then on every step in which anybody decodes (``decodes``, ``[steps]``):
    running requests are computed together or, in a prefill of others, not at all.
    """
    later = np.flatnonzero(decodes[first + 1 : last + 1]) + first + 1
    return np.concatenate([[first], later])
