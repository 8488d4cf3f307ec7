"""A request, and a workload: lengths, prompts and arrival times.

There is one stream of random numbers for each purpose, so using one does not change another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchbench.errors import UsageError
from batchbench.workloads.sampling import Sampling

_PURPOSES = ("prompt lengths", "output lengths", "arrivals", "ids", "prefix", "blocks", "sampling")


def seed_sequence(seed: int, purpose: str, number: int = 0) -> np.random.SeedSequence:
    """Return the seed of a purpose's stream, and of a number if the purpose has several."""
    return np.random.SeedSequence(seed, spawn_key=(_PURPOSES.index(purpose), number))


def stream(seed: int, purpose: str, number: int = 0) -> np.random.Generator:
    """Return the stream of a seed for a purpose, and for a number if the purpose has several.

    Philox and its uniform numbers are fixed by their definition (Salmon et al., SC 2011), so they
    are the same on every machine.
    """
    return np.random.Generator(np.random.Philox(seed_sequence(seed, purpose, number)))


class Request(NamedTuple):
    """A request as the scheduler sees it: lengths and time, no text.

    ``index`` is the request's position in its workload; ``due_ns`` counts nanoseconds from the
    start of the trial; ``output_tokens`` is the requested number.
    """

    index: int  # type: ignore[assignment]  # overrides tuple.index
    prompt_tokens: int
    output_tokens: int
    due_ns: int


class Stream(NamedTuple):
    """The random stream of one request; nothing but these two decides its numbers."""

    sampling: Sampling
    request: int

    @property
    def words(self) -> np.ndarray:
        """Two numbers of 32 bits that identify this stream."""
        sequence = seed_sequence(self.sampling.seed, "sampling", self.request)
        return sequence.generate_state(2).view(np.int32)

    @property
    def seed(self) -> int:
        """A seed of 31 bits for this request, for engines with random numbers of their own."""
        return int(self.words[0]) & (2**31 - 1)


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests in the order of their arrival, held as columns.

    ``prompt_ids`` is the concatenation of all prompts; the prompt of request ``i`` is
    ``prompt_ids[prompt_offsets[i]:prompt_offsets[i + 1]]``. A workload is *closed* when all
    requests are there at the start and their output lengths are given; its steps and counters are
    the same on every machine. With ``max_concurrency``, a request arrives only when fewer than
    that many of the earlier ones are unfinished. Without ``sampling``, decoding is greedy.
    """

    name: str
    seed: int
    prompt_ids: NDArray[np.int32]  # [total prompt tokens]
    prompt_offsets: NDArray[np.int64]  # [requests + 1]
    output_tokens: NDArray[np.int64]  # [requests]
    due_ns: NDArray[np.int64]  # [requests], ascending
    stop_at_eos: bool = False
    max_concurrency: int | None = None
    sampling: Sampling | None = None

    @classmethod
    def of(
        cls,
        name: str,
        prompts: Sequence[Sequence[int]],
        output_tokens: Sequence[int],
        *,
        due_ns: Sequence[int] | None = None,
        seed: int = 0,
        stop_at_eos: bool = False,
        max_concurrency: int | None = None,
        sampling: Sampling | None = None,
    ) -> Workload:
        """Make a workload from lists: prompts as token ids, one output length per prompt."""
        lengths = [len(prompt) for prompt in prompts]
        due = [0] * len(prompts) if due_ns is None else due_ns
        if not len(prompts) == len(output_tokens) == len(due):
            raise UsageError(
                f"a workload needs as many lengths and times as prompts, not {len(prompts)} "
                f"prompts, {len(output_tokens)} output_tokens and {len(due)} due_ns"
            )
        rows = zip(lengths, output_tokens, due, [0, *due], strict=False)
        for i, (prompt, output, at, before) in enumerate(rows):
            if prompt < 1:
                raise UsageError(f"request {i}: its prompt is empty; give it at least 1 token")
            if output < 1:
                raise UsageError(f"request {i}: output_tokens is {output}; must be at least 1")
            if at < before:
                raise UsageError(
                    f"request {i}: due_ns is {at}, before {before}; sort requests by their times"
                )
        if max_concurrency is not None and max_concurrency < 1:
            raise UsageError(f"max_concurrency is {max_concurrency}; must be at least 1")
        return cls(
            name=name,
            seed=seed,
            prompt_ids=np.fromiter((i for p in prompts for i in p), np.int32, sum(lengths)),
            prompt_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            output_tokens=np.asarray(output_tokens, np.int64),
            due_ns=np.asarray(due, np.int64),
            stop_at_eos=stop_at_eos,
            max_concurrency=max_concurrency,
            sampling=sampling,
        )

    def __len__(self) -> int:
        return len(self.output_tokens)

    def __iter__(self) -> Iterator[Request]:
        columns = (self.prompt_tokens.tolist(), self.output_tokens.tolist(), self.due_ns.tolist())
        return map(Request, range(len(self)), *columns)

    @cached_property
    def prompt_tokens(self) -> NDArray[np.int64]:
        """Length of each prompt, ``[requests]``."""
        return np.diff(self.prompt_offsets)

    @property
    def closed(self) -> bool:
        """True if all requests are there at the start and their lengths are given."""
        timed = self.max_concurrency is not None or self.due_ns.any()
        return not self.stop_at_eos and not timed

    @property
    def max_total_tokens(self) -> int:
        """The longest prompt + output, in tokens."""
        return int((self.prompt_tokens + self.output_tokens).max())

    def prompt(self, index: int) -> NDArray[np.int32]:
        """Return the token ids of one request's prompt."""
        return self.prompt_ids[self.prompt_offsets[index] : self.prompt_offsets[index + 1]]

    def stream(self, index: int) -> Stream | None:
        """Return the random stream of a sampled request; None if decoding is greedy."""
        return None if self.sampling is None else Stream(self.sampling, index)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all requests and their times; equal workloads have equal digests."""
        content = hashlib.sha256(b"batchbench workload 1\n")
        for column in (self.prompt_ids, self.prompt_offsets, self.output_tokens, self.due_ns):
            content.update(len(column).to_bytes(8, "little") + column.astype("<i8").tobytes())
        content.update(bytes([self.stop_at_eos]))
        if self.max_concurrency is not None:
            content.update(self.max_concurrency.to_bytes(8, "little"))
        if self.sampling is not None:
            content.update(repr(astuple(self.sampling)).encode())
        return content.hexdigest()


Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Ragged:
    """Row ``i`` is ``values[offsets[i]:offsets[i + 1]]``; ``offsets`` is ``[rows + 1]``."""

    values: NDArray[Any]
    offsets: Ints

    @classmethod
    def of(cls, values: NDArray[Any], lengths: NDArray[Any]) -> Ragged:
        """Return rows of the lengths, ``[rows]``."""
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])  # in place, since there may be a million rows
        return cls(values, offsets)

    @property
    def lengths(self) -> Ints:
        """Length of each row, ``[rows]``."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> NDArray[Any]:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def take(self, rows: Ints, lengths: Ints | None = None) -> Ragged:
        """Return these rows in this order, each cut to its ``lengths``, ``[len(rows)]``."""
        lengths = self.lengths[rows] if lengths is None else lengths
        taken = Ragged.of(np.empty(int(lengths.sum()), self.values.dtype), lengths)
        # A value comes from the begin of its row plus its place in the row.
        places = np.arange(len(taken.values)) - np.repeat(taken.offsets[:-1], lengths)
        begins = np.repeat(self.offsets[:-1][rows], lengths)
        np.take(self.values, places + begins, out=taken.values)
        return taken
