"""Decode steps and what they read: against counting one by one, and with token times alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from support.laws import (
    STEP_NS,
    UNLIMITED,
    Config,
    configs,
    law,
    serve,
    steps_with_tokens,
    workload_of,
    workloads,
)

from batchbench.batching.recording import Header, Recording
from batchbench.reports.metrics import decode_floor, decode_steps, kv_tokens_peak, kv_tokens_read
from batchbench.workloads import Workload


@law
@given(workloads(), configs())
def test_cached_tokens_read_are_those_counted_request_by_request(
    workload: Workload, config: Config
) -> None:
    recording = serve(workload, config)
    read = np.zeros(recording.num_steps, np.int64)
    decodes = np.repeat(recording.spans.decoding > 0, recording.spans.steps)
    log = recording.requests
    for i, steps in enumerate(steps_with_tokens(recording)):
        for nth, step in enumerate(steps[1:], start=1):
            read[step] += log.prompt_tokens[i] + nth
        for step in range(log.last[i] + 1, log.released[i]):
            if decodes[step]:
                read[step] += log.prompt_tokens[i] + log.output_tokens[i] - 1
    assert kv_tokens_read(recording).tolist() == read.tolist()
    assert read.max() <= kv_tokens_peak(recording)


@law
@given(
    workloads(timed=False),
    configs(policies=("continuous",), prefills=("mixed",), rooms=(UNLIMITED,)),
)
def test_token_times_alone_show_the_same_full_steps(workload: Workload, config: Config) -> None:
    """The token times of a strategy that schedules by itself show its decode steps."""
    stepped = serve(workload, config)
    ends = stepped.step_ends_ns
    # In a step, requests get their tokens one shortly after the other.
    times = [
        [int(ends[s]) * 1000 + i for s in steps]
        for i, steps in enumerate(steps_with_tokens(stepped))
    ]
    header = Header("theirs", 0, config.slots, False, {})
    told = Recording.of_tokens(
        header, workload, [[0] * len(t) for t in times], times, [0] * len(times)
    )
    seen, known = decode_steps(told), decode_steps(stepped)
    assert seen.full_rows == known.full_rows
    if known.full_rows:
        assert abs(seen.full_ms / 1000 - known.full_ms) < 2e-8
    assert len(seen.rows) == len(known.rows)


def test_only_steps_without_prompts_count_and_the_fullest_are_told() -> None:
    recording = serve(workload_of([(3, 6, 0), (3, 2, 0), (3, 3, 0)]), Config("continuous", 2))
    found = decode_steps(recording)
    assert found.rows.tolist() == [2, 2, 2, 1, 1][: len(found.rows)]
    assert found.full_rows == 2
    assert found.full_ms == STEP_NS / 1e6


def test_a_workload_of_single_tokens_has_none() -> None:
    recording = serve(workload_of([(3, 1, 0), (2, 1, 0)]), Config("continuous", 2))
    header = Header("theirs", 0, 2, False, {})
    workload = Workload.of("w", [[1], [1]], [1, 1])
    told = Recording.of_tokens(header, workload, [[5], [5]], [[3], [4]], [0, 0])
    for found in (decode_steps(recording), decode_steps(told)):
        assert (found.full_rows, found.full_ms) == (0, None)


def about(recording: Recording, told: Mapping[str, object]) -> Recording:
    header = replace(recording.header, about={**recording.header.about, **told})
    return replace(recording, header=header)


READING = {
    "dtype": "float32",
    "weight_bytes": 900,
    "step_weight_bytes": 880,
    "kv_token_bytes": 10,
}
MEMORY = {"memory": {"bytes_per_s": 2e9, "reading": READING}}


def test_a_step_stands_beside_what_it_reads() -> None:
    # Of two requests, each of 3 prompt tokens, the n-th decode step reads 2 × (3 + n), n to 5.
    recording = serve(workload_of([(3, 6, 0), (3, 6, 0)]), Config("continuous", 2))
    found = decode_floor([about(recording, MEMORY)])
    assert found is not None
    assert (found["rows"], found["read_bytes"]) == (2, 880 + 12 * 10)
    assert found["floor_ms"] == pytest.approx(1000 / 2e9 * 1e3)
    assert found["floor_share"] == pytest.approx(found["floor_ms"] / (STEP_NS / 1e6))


def test_there_is_no_floor_without_memory_or_decode_steps() -> None:
    recording = serve(workload_of([(3, 6, 0)]), Config("continuous", 2))
    assert decode_floor([recording]) is None
    single = serve(workload_of([(3, 1, 0), (2, 1, 0)]), Config("continuous", 2))
    assert decode_floor([about(single, MEMORY)]) is None
    header = Header("theirs", 0, 1, False, MEMORY)
    workload = Workload.of("w", [[1]], [2])
    told = Recording.of_tokens(header, workload, [[5, 5]], [[3, 4]], [0])
    assert decode_floor([told]) is None
