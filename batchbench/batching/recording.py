"""The Recording: the log of one trial; and the Recorder that writes it from plans.

The record of a request holds step numbers; a span is a run of steps that compute the same slots.
Times, latencies, occupancy, timeline and counters are functions of these (``reports.metrics``).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchbench.batching.plan import Plan
from batchbench.workloads import Request, Workload

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class GrowthLog:
    """The differences between the steps of a simulated span, ``[spans]`` each, in picoseconds.

    Step i of a span takes ``1000 × step_ns + rest + i × growth``, and its first step begins
    ``beyond`` after ``start_ns``. All are integers, so that adding steps one by one and adding
    them at once give the same sum.
    """

    beyond_ps: Ints
    rest_ps: Ints
    growth_ps: Ints

    def of(self, spans: Ints) -> GrowthLog:
        return GrowthLog(self.beyond_ps[spans], self.rest_ps[spans], self.growth_ps[spans])

    def after(self, steps: Ints) -> Ints:
        """Return the picoseconds by which so many steps exceed ``steps × step_ns``, ``[spans]``."""
        grown: Ints = self.growth_ps * (steps * (steps - 1) // 2)
        return self.beyond_ps + steps * self.rest_ps + grown


@dataclass(frozen=True)
class Header:
    """The settings of one trial, and what was observed besides its steps."""

    strategy: str
    trial: int
    slots: int
    simulated: bool
    workload: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)
    """Engine, model and device as resolved, and observations: wall time, energy, load, …"""

    @classmethod
    def of(
        cls,
        strategy: str,
        trial: int,
        slots: int,
        workload: Workload,
        about: Mapping[str, Any],
        *,
        simulated: bool = False,
    ) -> Header:
        named = {"name": workload.name, "seed": workload.seed, "digest": workload.digest}
        return cls(strategy, trial, slots, simulated, named, about)


@dataclass(frozen=True, eq=False)
class RequestLog:
    """One row per request, ``[requests]`` each; step numbers count forward passes from 0.

    Slot and steps are -1 if the strategy schedules by itself and does not report them.
    """

    due_ns: Ints  # the actual arrival, which a closed loop delays until there is room
    prompt_tokens: Ints
    output_tokens: Ints  # produced
    slot: Ints
    admitted: Ints  # first step in which the request holds its slot
    started: Ints  # first step that computes the request; later if the token budget stalls it
    first: Ints  # step that yields the first token
    last: Ints  # step that yields the last token
    released: Ints  # first step in which the slot is free again


@dataclass(frozen=True, eq=False)
class SpanLog:
    """One row per run of steps that compute the same slots, ``[spans]`` each."""

    steps: Ints
    start_ns: Ints  # start of the span's first step
    decoding: Ints  # slots that decode, including held slots of finished requests
    waiting: Ints  # requests that are due and hold no slot
    chunks: Ints  # pieces of prompts computed; only spans of one step have any


@dataclass(frozen=True, eq=False)
class ChunkLog:
    """One row per piece of a prompt, ``[chunks]`` each, in the order of the spans."""

    request: Ints
    start: Ints
    stop: Ints


@dataclass(frozen=True, eq=False)
class WaitLog:
    """One row per time in which nothing could be computed, ``[waits]`` each.

    It separates the time in which there was nothing to do from the time that the loop took.
    """

    step: Ints  # steps launched before the wait
    start_ns: Ints
    until_ns: Ints  # the next arrival, or the time at which the policy wants to decide again
    end_ns: Ints
    waiting: Ints  # requests that are due and hold no slot


@dataclass(frozen=True, eq=False)
class StepTimes:
    """Durations of steps, ``[rows]`` each. Successive equal steps of one span share a row."""

    span: Ints
    step: Ints  # number of the row's first step
    count: Ints  # number of steps in the row
    ns: Ints  # duration of each of them


BLOCK = 1 << 18
"""Steps in each block that :meth:`Recording.step_times` yields."""


@dataclass(frozen=True, eq=False)
class Recording:
    """The log of one trial. Times are nanoseconds since the start of the trial.

    The end of each step is either measured (``ends_ns``, ``[steps]``) or, in simulation, computed
    from ``step_ns``, ``[spans]``: the duration of each step of a span, or of its first step if
    there is ``growth``. No other class reads these columns: use ``ends_of``, ``starts_of``,
    ``step_times``, ``step_at`` and ``free_from``.

    ``tokens`` is ``[sum of output_tokens]``, request after request; None if no model ran. A
    strategy that does not report steps has no spans. It reports the time of each token instead,
    ``token_ends_ns``, ``[sum of output_tokens]``, and the time at which it began to compute each
    request, ``begun_ns``, ``[requests]``.

    A trial may serve its workload several times. ``others`` are those servings whose tokens differ;
    they are verified too, and not saved.
    """

    header: Header
    requests: RequestLog
    spans: SpanLog
    chunks: ChunkLog
    waits: WaitLog
    ends_ns: Ints | None = None
    step_ns: Ints | None = None
    tokens: NDArray[np.int32] | None = None
    growth: GrowthLog | None = None
    token_ends_ns: Ints | None = None
    begun_ns: Ints | None = None
    others: tuple[Recording, ...] = ()

    @property
    def in_steps(self) -> bool:
        """True for a simulation without a cost, in which every step takes one unit of time."""
        return self.header.simulated and "cost" not in self.header.about

    @property
    def measured(self) -> bool:
        """True if the end of each step was measured."""
        return self.ends_ns is not None

    @property
    def has_steps(self) -> bool:
        """True if steps are known; without them there are no counters and no timeline."""
        return self.token_ends_ns is None

    @property
    def num_steps(self) -> int:
        return int(self.spans.steps.sum())

    @cached_property
    def first_steps(self) -> Ints:
        """Number of the first step of each span, ``[spans]``."""
        return np.cumsum(self.spans.steps) - self.spans.steps

    @cached_property
    def step_ends_ns(self) -> Ints:
        """End of each step, ``[steps]``."""
        return self.ends_of(np.arange(self.num_steps))

    @cached_property
    def step_starts_ns(self) -> Ints:
        """Start of each step, ``[steps]``: the end of the step before, or the span's start."""
        return self.starts_of(np.arange(self.num_steps))

    def ends_of(self, steps: Ints, span: Ints | None = None) -> Ints:
        """Return the end of each of these steps, without listing all; ``span`` may be known."""
        if self.ends_ns is not None:
            return self.ends_ns[steps]
        span = self.spans_of(steps) if span is None else span
        return self._after(span, steps - self.first_steps[span] + 1)

    def starts_of(self, steps: Ints) -> Ints:
        """Return the start of each of these steps, without listing all steps."""
        span = self.spans_of(steps)
        nth = steps - self.first_steps[span]
        if self.ends_ns is not None:
            return np.where(nth > 0, self.ends_ns[steps - 1], self.spans.start_ns[span])
        return self._after(span, nth)

    def _after(self, span: Ints, steps: Ints) -> Ints:
        """Return the time at which so many steps of each of these spans are over."""
        assert self.step_ns is not None
        ends: Ints = self.spans.start_ns[span] + steps * self.step_ns[span]
        return ends if self.growth is None else ends + self.growth.of(span).after(steps) // 1000

    def spans_of(self, steps: Ints) -> Ints:
        """Return the number of the span that holds each of these steps."""
        return np.searchsorted(self.first_steps, steps, side="right") - 1

    def step_at(self, times: Ints) -> Ints:
        """Return the number of steps over at each of these times (ns): that of the next step."""
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
        """Return the end of the step running at each of these times (ns); the time if none is."""
        step = np.minimum(self.step_at(times), self.num_steps - 1)
        ends = self.ends_of(step)
        return np.where((self.starts_of(step) < times) & (times < ends), ends, times)

    def step_times(self, spans: Ints | None = None, skip: int = 0) -> Iterator[StepTimes]:
        """Yield the durations of steps in blocks, so that memory stays bounded.

        ``spans`` are the numbers of the spans to read, ascending, or None for all; ``skip`` steps
        are left out at the beginning of each.
        """
        chosen = np.arange(len(self.spans.steps)) if spans is None else spans
        chosen = chosen[self.spans.steps[chosen] > skip]
        equal = self.spans.steps[chosen] == 1
        if self.ends_ns is None:  # they take the same whole number of nanoseconds
            growth = None if self.growth is None else self.growth.of(chosen)
            equal |= growth is None or (growth.rest_ps == 0) & (growth.growth_ps == 0)
        alike = chosen[equal]
        first = self.first_steps[alike] + skip
        ns = self.ends_of(first, alike) - self.starts_of(first)
        yield StepTimes(alike, first, self.spans.steps[alike] - skip, ns)
        yield from self._each_step(chosen[~equal], skip)

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
            ends = self.ends_of(step, span)
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
        """Time of the first token of each request, ``[requests]``."""
        if self.token_ends_ns is not None:
            return self.token_ends_ns[self.token_offsets[:-1]]
        return self.ends_of(self.requests.first)

    @cached_property
    def last_token_ns(self) -> Ints:
        """Time of the last token of each request, ``[requests]``."""
        if self.token_ends_ns is not None:
            return self.token_ends_ns[self.token_offsets[1:] - 1]
        return self.ends_of(self.requests.last)

    @cached_property
    def token_offsets(self) -> Ints:
        """Index in ``tokens`` of the first token of each request, ``[requests + 1]``."""
        return np.concatenate([[0], np.cumsum(self.requests.output_tokens)])

    def tokens_of(self, request: int) -> NDArray[np.int32]:
        if self.tokens is None:
            raise ValueError("no model ran: the recording holds no tokens")
        return self.tokens[self.token_offsets[request] : self.token_offsets[request + 1]]

    @classmethod
    def of_tokens(
        cls,
        header: Header,
        workload: Workload,
        tokens: Sequence[Sequence[int]] | None,
        ends_ns: Sequence[Sequence[int]],
        begun_ns: Sequence[int],
        due_ns: Ints | None = None,
    ) -> Recording:
        """Return the recording of a strategy that does not report steps.

        ``tokens`` are the output tokens of each request, None if their ids are not known;
        ``ends_ns`` the time of each token, ``begun_ns`` the time at which computing each request
        began, or at which it was sent to a server, and ``due_ns`` its actual arrival, if that is
        not the workload's. Times are nanoseconds since the start of the trial.
        """
        counts = np.array([*map(len, ends_ns)], np.int64)
        if not counts.all() or (tokens and [*map(len, tokens)] != counts.tolist()):
            raise ValueError("each request needs at least one token, and a time for each")
        unknown, none = np.full(len(workload), -1, np.int64), np.zeros(0, np.int64)
        requests = RequestLog(
            due_ns=workload.due_ns if due_ns is None else due_ns,
            prompt_tokens=workload.prompt_tokens,
            output_tokens=counts,
            **dict.fromkeys(("slot", "admitted", "started", "first", "last", "released"), unknown),
        )
        return cls(
            header,
            requests,
            SpanLog(*[none] * 5),
            ChunkLog(*[none] * 3),
            WaitLog(*[none] * 5),
            tokens=np.concatenate(tokens).astype(np.int32) if tokens else None,
            token_ends_ns=np.concatenate(ends_ns).astype(np.int64),
            begun_ns=np.asarray(begun_ns, np.int64),
        )


@dataclass(frozen=True, eq=False)
class Steps:
    """The report of an engine on the steps of one trial.

    ``start_ns`` has one value per call of ``run``. ``ends_ns`` has one per step; in simulation
    ``step_ns`` has one per call instead, with the ``growth`` of its steps. ``tokens`` is
    ``[steps, slots]``, defined where a slot was computed. ``computed`` is the number of forward
    passes counted in the model itself, which should be one per step.
    """

    start_ns: Ints
    ends_ns: Ints | None = None
    step_ns: Ints | None = None
    tokens: NDArray[np.int32] | None = None
    growth: GrowthLog | None = None
    computed: int | None = None


class Recorder:
    """Writes the log of one trial from plans alone."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        # Arrays of machine integers: a million requests leave millions of rows.
        names = ("due_ns", "slot", "admitted", "started", "first", "last", "released")
        self._log = {name: array("q", [-1]) * len(workload) for name in names}
        self._occupant: dict[int, int] = {}  # slot -> index of the request
        self._spans, self._chunks, self._waits = (array("q") for _ in range(3))
        self.steps = 0
        self.waited_ns = 0

    def launched(self, plan: Plan, steps: int, waiting: int) -> None:
        """Log that ``steps`` passes of ``plan`` were launched while ``waiting`` requests waited."""
        log = self._log
        for slot in plan.released:
            log["released"][self._occupant.pop(slot)] = self.steps
        for request, slot in plan.admitted:
            index = request.index
            log["due_ns"][index] = request.due_ns
            log["slot"][index] = slot
            log["admitted"][index] = self.steps
            self._occupant[slot] = index
        for request, _, start, stop in plan.chunks:
            index = request.index
            if start == 0:
                log["started"][index] = self.steps
            if stop == request.prompt_tokens:
                log["first"][index] = self.steps
            self._chunks.extend((index, start, stop))
        self._spans.extend((steps, len(plan.slots), waiting, len(plan.chunks)))
        self.steps += steps

    def waited(self, start_ns: int, until_ns: int, end_ns: int, waiting: int) -> None:
        """Log that nothing was computed from ``start_ns`` to ``end_ns``."""
        self.waited_ns += end_ns - start_ns
        self._waits.extend((self.steps, start_ns, until_ns, end_ns, waiting))

    def finished(self, request: Request) -> None:
        """Log that ``request`` got its last token in the last step launched."""
        self._log["last"][request.index] = self.steps - 1

    def recording(self, header: Header, engine: Steps) -> Recording:
        for index in self._occupant.values():
            self._log["released"][index] = self.steps
        spans, chunks, waits = (
            np.array(log, np.int64).reshape(-1, width)
            for log, width in ((self._spans, 4), (self._chunks, 3), (self._waits, 5))
        )
        span_log = SpanLog(*np.insert(spans, 1, engine.start_ns, axis=1).T.copy())
        produced, tokens = self._workload.output_tokens, None
        if engine.tokens is not None:
            produced, tokens = self._tokens(span_log, engine.tokens)
        requests = RequestLog(
            prompt_tokens=self._workload.prompt_tokens,
            output_tokens=produced,
            **{name: np.array(column) for name, column in self._log.items()},
        )
        return Recording(
            header,
            requests,
            span_log,
            ChunkLog(*chunks.T.copy()),
            WaitLog(*waits.T.copy()),
            engine.ends_ns,
            engine.step_ns,
            tokens,
            engine.growth,
        )

    def _tokens(self, spans: SpanLog, by_step: NDArray[np.int32]) -> tuple[Ints, NDArray[np.int32]]:
        decodes = np.repeat(spans.decoding > 0, spans.steps)
        log = self._log
        picked = [
            by_step[token_steps(decodes, first, last), slot]
            for first, last, slot in zip(log["first"], log["last"], log["slot"], strict=True)
        ]
        counts = np.array([len(tokens) for tokens in picked], np.int64)
        return counts, np.concatenate(picked)


def token_steps(decodes: NDArray[np.bool_], first: int, last: int) -> Ints:
    """Return the steps in which a request got its tokens.

    They are its first step, and every later step that decodes (``decodes``, ``[steps]``): running
    requests are computed together, or not at all in a separate prefill of others.
    """
    later = np.flatnonzero(decodes[first + 1 : last + 1]) + first + 1
    return np.concatenate([[first], later])
