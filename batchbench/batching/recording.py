"""The Recording: the log of one trial, from which everything that people read is derived.

A record a request holds step numbers; a span is a run of steps that compute the same slots. Times,
latencies, occupancy, timeline and counters are functions of these (``reports.metrics``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchbench.batching.recording_file import (
    NotWholeError,
    check_laws,
    read_columns,
    write_columns,
)
from batchbench.errors import UsageError
from batchbench.workloads import Workload

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class GrowthLog:
    """How the steps of a simulated span differ, ``[spans]`` each, in picoseconds.

    Step i of a span costs ``1000 × step_ns + rest + i × growth``, and its first begins ``beyond``
    after ``start_ns``. In integers, since floats added one by one and at once differ.
    """

    beyond_ps: Ints
    rest_ps: Ints
    growth_ps: Ints

    def of(self, spans: Ints) -> GrowthLog:
        """A row for each of these spans."""
        return GrowthLog(self.beyond_ps[spans], self.rest_ps[spans], self.growth_ps[spans])

    @property
    def is_none(self) -> NDArray[np.bool_]:
        """Return True for each span whose steps take the same whole number of nanoseconds."""
        none: NDArray[np.bool_] = (self.rest_ps == 0) & (self.growth_ps == 0)
        return none

    def after(self, steps: Ints) -> Ints:
        """Picoseconds beyond the whole nanoseconds of so many steps, ``[spans]``."""
        grown: Ints = self.growth_ps * (steps * (steps - 1) // 2)
        return self.beyond_ps + steps * self.rest_ps + grown


def goes_on(steps: Ints, step_ns: Ints, growth: GrowthLog | None) -> NDArray[np.bool_]:
    """Whether each span's steps cost what they would as the last span's, ``[spans - 1]``."""
    if growth is None:
        same: NDArray[np.bool_] = step_ns[1:] == step_ns[:-1]
        return same
    first = 1000 * step_ns + growth.rest_ps
    on: NDArray[np.bool_] = first[1:] == (first + steps * growth.growth_ps)[:-1]
    on &= growth.growth_ps[1:] == growth.growth_ps[:-1]
    on &= growth.beyond_ps[1:] == growth.after(steps)[:-1] % 1000
    return on


FORMAT = 3
"""Version of the file format that :meth:`Recording.save` writes.

Version 2, which is read as well, has the same step for the admission and the start of a request.
"""


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
    admitted: Ints  # first step in which it holds its slot
    started: Ints  # first step that computes it: later where a token budget makes it stall
    first: Ints  # step that yields its first token
    last: Ints  # step that yields its last token
    released: Ints  # first step in which its slot is free again


@dataclass(frozen=True, eq=False)
class SpanLog:
    """A row a run of steps that compute the same slots, ``[spans]`` each."""

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
class StepTimes:
    """Durations of steps, ``[rows]`` each. Successive equal steps of one span share a row."""

    span: Ints
    step: Ints  # number of the row's first step
    count: Ints  # steps, from that one on
    ns: Ints  # start to end of each of them


BLOCK = 1 << 18
"""Steps in each block that :meth:`Recording.step_times` yields."""


@dataclass(frozen=True, eq=False)
class Recording:
    """One trial.

    Times are nanoseconds since the start of the trial. The end of each step is either measured
    (``ends_ns``, ``[steps]``) or, in simulation, a formula (``step_ns``, ``[spans]``: what each
    step of a span costs, or the first of them where ``growth`` tells how the others differ).
    No other class reads these: use ``ends_of``, ``starts_of``, ``step_times``, ``step_at`` and
    ``free_from``.
    ``tokens`` is ``[sum of output_tokens]``, request after request; None where no model ran. A
    strategy that shows no steps has no spans, and tells instead when each token was there,
    ``token_ends_ns``, ``[sum of output_tokens]``, and when it began with each request,
    ``begun_ns``, ``[requests]``.
    """

    header: Header
    requests: RequestLog
    spans: SpanLog
    chunks: ChunkLog
    waits: WaitLog
    ends_ns: Ints | None
    step_ns: Ints | None
    tokens: NDArray[np.int32] | None
    growth: GrowthLog | None = None
    token_ends_ns: Ints | None = None
    begun_ns: Ints | None = None

    @property
    def in_steps(self) -> bool:
        """Whether time is only counted: of a simulation in which every step costs one unit."""
        return self.header.simulated and "cost" not in self.header.about

    @property
    def measured(self) -> bool:
        """True where the end of each step was measured; in simulation it is a formula."""
        return self.ends_ns is not None

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
        return self.ends_of(np.arange(self.num_steps)) if self.ends_ns is None else self.ends_ns

    @cached_property
    def step_starts_ns(self) -> Ints:
        """Start of each step, ``[steps]``: a span's own start, then the end of the step before."""
        return self.starts_of(np.arange(self.num_steps))

    def ends_of(self, steps: Ints) -> Ints:
        """End of each of these steps, given by number: without a list of all steps."""
        return self._ends_in(self.spans_of(steps) if self.ends_ns is None else steps, steps)

    def _ends_in(self, span: Ints, steps: Ints) -> Ints:
        """Return the end of each of these steps, each in one of these spans."""
        if self.ends_ns is not None:
            return self.ends_ns[steps]
        return self._after(span, steps - self.first_steps[span] + 1)

    def starts_of(self, steps: Ints) -> Ints:
        """Start of each of these steps, given by number: without a list of all steps."""
        span = self.spans_of(steps)
        nth = steps - self.first_steps[span]
        if self.ends_ns is not None:
            return np.where(nth > 0, self.ends_ns[steps - 1], self.spans.start_ns[span])
        return self._after(span, nth)

    def _after(self, span: Ints, steps: Ints) -> Ints:
        """When so many steps of each of these spans are over, in simulation."""
        assert self.step_ns is not None
        ends: Ints = self.spans.start_ns[span] + steps * self.step_ns[span]
        return ends if self.growth is None else ends + self.growth.of(span).after(steps) // 1000

    def spans_of(self, steps: Ints) -> Ints:
        """Number of the span in which each of these steps lies."""
        return np.searchsorted(self.first_steps, steps, side="right") - 1

    def step_at(self, times: Ints) -> Ints:
        """Return the number of steps that are over at each of these times (ns).

        This is also the number of the step that is running or comes next.
        """
        if self.ends_ns is not None:
            return np.searchsorted(self.ends_ns, times, side="right").astype(np.int64)
        span = np.searchsorted(self.span_ends_ns, times, side="right")
        span = np.minimum(span, len(self.spans.steps) - 1)
        low, high = np.zeros(len(times), np.int64), self.spans.steps[span]
        while (low < high).any():  # bisect the span's steps, all times together
            middle = (low + high + 1) // 2
            over = self._after(span, middle) <= times
            low, high = np.where(over, middle, low), np.where(over, high, middle - 1)
        return self.first_steps[span] + low

    def free_from(self, times: Ints) -> Ints:
        """Return the time at which the engine is next free, for each of these times (ns).

        It is the end of the step that is running then, or the time itself if none is.
        """
        step = np.minimum(self.step_at(times), self.num_steps - 1)
        ends = self.ends_of(step)
        return np.where((self.starts_of(step) < times) & (times < ends), ends, times)

    def step_times(self, spans: Ints | None = None, skip: int = 0) -> Iterator[StepTimes]:
        """Yield the durations of steps in blocks, so that memory stays bounded.

        Args:
            spans: numbers of the spans to read, ascending; None for all.
            skip: number of steps to leave out at the beginning of each span.
        """
        chosen = np.arange(len(self.spans.steps)) if spans is None else spans
        chosen = chosen[self.spans.steps[chosen] > skip]
        equal = self._are_equal(chosen)
        alike = chosen[equal]
        first = self.first_steps[alike] + skip
        ns = self._ends_in(alike, first) - self.starts_of(first)
        yield StepTimes(alike, first, self.spans.steps[alike] - skip, ns)
        yield from self._each_step(chosen[~equal], skip)

    def _are_equal(self, spans: Ints) -> NDArray[np.bool_]:
        """Return True for each of these spans whose steps all take the same time in ns."""
        equal: NDArray[np.bool_] = self.spans.steps[spans] == 1
        if self.ends_ns is None:
            equal |= True if self.growth is None else self.growth.of(spans).is_none
        return equal

    def _each_step(self, spans: Ints, skip: int) -> Iterator[StepTimes]:
        """Yield a row for each step of these spans, without the first ``skip`` of each span."""
        steps = self.spans.steps[spans] - skip
        upto = np.cumsum(steps)
        total = int(steps.sum())
        for begin in range(0, total, BLOCK):
            stop = min(begin + BLOCK, total)
            low, high = np.searchsorted(upto, [begin, stop - 1], side="right")
            part = np.arange(low, high + 1)
            before = np.maximum((upto - steps)[part], begin)
            count = np.minimum(upto[part], stop) - before
            span = np.repeat(spans[part], count)
            first = self.first_steps[spans[part]] + skip + before - (upto - steps)[part]
            heads = before - begin
            step = np.repeat(first - heads, count) + np.arange(stop - begin)
            ends = self._ends_in(span, step)
            starts = np.concatenate([ends[:1], ends[:-1]])  # within a span no time lies between
            starts[heads] = self.starts_of(first)
            yield StepTimes(span, step, np.ones_like(step), ends - starts)

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
        """Start of the first step in which each request holds its slot, ``[requests]``."""
        return self.starts_of(self.requests.admitted) if self.begun_ns is None else self.begun_ns

    @cached_property
    def started_ns(self) -> Ints:
        """Start of the first step that computes each request, ``[requests]``."""
        return self.starts_of(self.requests.started) if self.begun_ns is None else self.begun_ns

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
        """The same trial, spans joined that go on alike: how often the loop decided is gone."""
        if self.step_ns is None:
            raise ValueError("only a simulation tells which steps go on alike")
        s, cost, growth = self.spans, self.step_ns, self.growth
        if not len(s.steps):
            return self
        equal = (s.decoding[1:] == s.decoding[:-1]) & (s.waiting[1:] == s.waiting[:-1])
        equal &= (s.chunks[1:] == 0) & (s.chunks[:-1] == 0)
        equal &= s.start_ns[1:] == self.span_ends_ns[:-1]
        equal &= goes_on(s.steps, cost, growth)
        begins = np.flatnonzero(np.concatenate([[True], ~equal]))
        spans = SpanLog(
            steps=np.add.reduceat(s.steps, begins),
            start_ns=s.start_ns[begins],
            decoding=s.decoding[begins],
            waiting=s.waiting[begins],
            chunks=s.chunks[begins],
        )
        kept = None if growth is None else growth.of(begins)
        return replace(self, spans=spans, step_ns=cost[begins], growth=kept)

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
            **dict.fromkeys(("slot", "admitted", "started", "first", "last", "released"), unknown),
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
        columns: dict[str, NDArray[Any]] = {}
        for name in _LOGS:
            if (log := getattr(self, name)) is not None:
                columns |= {f"{name}.{c.name}": getattr(log, c.name) for c in fields(log)}
        for name in _ROWS:
            if getattr(self, name) is not None:
                columns[name] = getattr(self, name)
        return write_columns({"format": FORMAT, **header}, columns)

    @classmethod
    def load(cls, file: Path) -> Recording:
        """Read what :meth:`save` wrote.

        Raises:
            UsageError: the file is missing, torn, of another format, or breaks a law of the log.
        """
        try:
            header, columns = read_columns(file, _DTYPES)
            if (version := header.pop("format", None)) not in (2, FORMAT):
                raise UsageError(f"{file}: written by another version; record it again")
            if version == 2 and "requests.admitted" in columns:
                columns["requests.started"] = columns["requests.admitted"]
            recording = _made_of(header, columns)
            check_laws(recording)
        except NotWholeError as error:
            raise UsageError(f"{file}: is not a whole recording: {error}") from error
        return recording


def _made_of(header: Mapping[str, Any], columns: Mapping[str, NDArray[Any]]) -> Recording:
    """Return the recording that these columns of a file make."""
    if fault := header.keys() ^ {f.name for f in fields(Header)}:
        raise NotWholeError(f"its header lacks {min(fault)}, or should not have it")
    logs: dict[str, Any] = {}
    for name, kind in _LOGS.items():
        names = {c.name: f"{name}.{c.name}" for c in fields(kind)}
        if name == "growth" and not columns.keys() & names.values():
            continue
        if missing := names.values() - columns.keys():
            raise NotWholeError(f"{min(missing)} is missing")
        logs[name] = kind(**{own: columns[told] for own, told in names.items()})
    rows: dict[str, Any] = {name: columns.get(name) for name in _ROWS}
    return Recording(header=Header(**header), **logs, **rows)


_LOGS: dict[str, Any] = {
    "requests": RequestLog,
    "spans": SpanLog,
    "chunks": ChunkLog,
    "waits": WaitLog,
    "growth": GrowthLog,
}

_ROWS = ("ends_ns", "step_ns", "tokens", "token_ends_ns", "begun_ns")
"""The columns that belong to no log."""

_DTYPES: dict[str, np.dtype[Any]] = {
    **{f"{log}.{c.name}": np.dtype(np.int64) for log, kind in _LOGS.items() for c in fields(kind)},
    **dict.fromkeys(_ROWS, np.dtype(np.int64)),
    "tokens": np.dtype(np.int32),
}
"""The columns that a file may have, and the type of their values."""
