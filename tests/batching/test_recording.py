"""Recordings keep what happened, also through files, and refuse files that are not whole."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.laws import (
    STEP_NS,
    Config,
    Ledger,
    configs,
    ending_early,
    law,
    serve,
    steps_with_tokens,
    token,
    workload_of,
    workloads,
)
from support.replay import join_spans

from batchbench.batching import recording_file as module
from batchbench.batching.recording import Header, Recording, token_steps
from batchbench.batching.recording_file import load_recording, save_recording
from batchbench.errors import UsageError
from batchbench.workloads import Workload

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(1e-9, 1e9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=3,
)


def simulated() -> Recording:
    """Return the recording of a simulation: ends of steps as a formula, no tokens."""
    return serve(workload_of([(3, 4, 0), (2, 9, 5), (1, 1, 80)]), Config("continuous", 2))


def real() -> Recording:
    """As of a model: an end for each step, and tokens."""
    workload = workload_of([(3, 4, 0), (2, 9, 5), (1, 1, 80)])
    return serve(workload, Config("static", 2), engine=Ledger(2))


def arrays_of(recording: Recording) -> dict[str, Any]:
    """All columns by name; None where there is none."""
    logs = {
        f"{name}.{column.name}": getattr(getattr(recording, name), column.name)
        for name in ("requests", "spans", "chunks", "waits")
        for column in fields(getattr(recording, name))
    }
    return logs | {name: getattr(recording, name) for name in ("ends_ns", "step_ns", "tokens")}


def assert_same(one: Recording, other: Recording) -> None:
    """Equal to the bit, types included."""
    assert one.header == other.header
    ours, theirs = arrays_of(one), arrays_of(other)
    for name, values in ours.items():
        if values is None:
            assert theirs[name] is None
        else:
            assert values.dtype == theirs[name].dtype
            np.testing.assert_array_equal(values, theirs[name], strict=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "static-0.npz"


def refused(file: Path) -> str:
    """The line with which a file is refused; it begins with the file's name."""
    with pytest.raises(UsageError) as caught:
        load_recording(file)
    line = str(caught.value)
    assert line.startswith(f"{file}: ")
    return line


# Round trips


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recordings")


@given(
    workload=workloads(),
    config=configs(),
    explicit=st.booleans(),
    about=st.dictionaries(st.text(max_size=3), json_values, max_size=2),
)
@settings(law, max_examples=100)
def test_what_is_saved_is_loaded_again_exactly(
    folder: Path, workload: Workload, config: Config, explicit: bool, about: dict[str, Any]
) -> None:
    recording = serve(workload, config, engine=Ledger(config.slots) if explicit else None)
    recording = replace(recording, header=replace(recording.header, about=about))
    file = folder / "recording.npz"
    file.write_bytes(save_recording(recording))
    assert_same(load_recording(file), recording)


@pytest.mark.parametrize("make", [simulated, real])
def test_a_loaded_recording_gives_the_same_file(make: Callable[[], Recording], file: Path) -> None:
    file.write_bytes(save_recording(make()))
    with (
        np.load(file) as first,
        np.load(io.BytesIO(save_recording(load_recording(file)))) as second,
    ):
        assert first.files == second.files
        for name in first.files:
            assert first[name].tobytes() == second[name].tobytes()


def test_the_header_tells_what_was_served() -> None:
    workload = workload_of([(1, 1, 0)])
    header = serve(workload, Config("static", 3)).header
    assert header == Header(
        strategy="static",
        trial=0,
        slots=3,
        simulated=True,
        workload={"name": "random", "seed": 0, "digest": workload.digest},
        about={"pads_prompts": False, "wall_ns": STEP_NS, "computed_passes": None},
    )


# Files that are not whole


@pytest.mark.parametrize("make", [simulated, real])
def test_a_torn_file_is_refused_wherever_it_was_torn(
    make: Callable[[], Recording], file: Path
) -> None:
    whole = save_recording(make())
    for size in {*range(0, len(whole), 97), *range(16), *range(len(whole) - 40, len(whole))}:
        file.write_bytes(whole[:size])
        assert "not a complete recording" in refused(file)


@given(st.data())
@law
def test_a_wrong_bit_changes_no_number_that_is_loaded(folder: Path, data: st.DataObject) -> None:
    recording = real()
    content = bytearray(save_recording(recording))
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file = folder / "flipped.npz"
    file.write_bytes(content)
    try:
        loaded = load_recording(file)
    except UsageError:
        refused(file)
    else:
        # Tokens may be absent, so a file whose directory misnames them reads as one without.
        tokens = recording.tokens if loaded.tokens is None else loaded.tokens
        assert_same(replace(loaded, tokens=tokens), recording)


def test_a_file_of_another_format_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    file.write_bytes(save_recording(simulated()))
    monkeypatch.undo()
    assert "another version" in refused(file)


def test_a_file_of_version_2_is_read_as_if_requests_started_when_they_were_admitted(
    file: Path,
) -> None:
    recording = simulated()
    with np.load(io.BytesIO(save_recording(recording))) as saved:
        arrays = {name: saved[name] for name in saved.files if name != "requests.started"}
    header = json.loads(arrays["header"].tobytes()) | {"format": 2}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(file, allow_pickle=False, **arrays)
    requests = replace(recording.requests, started=recording.requests.admitted)
    assert_same(load_recording(file), replace(recording, requests=requests))


def test_a_missing_file_is_refused(file: Path) -> None:
    assert "no such recording" in refused(file)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path)


def npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def npy(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def zip_of(name: str, content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, content)
    return out.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b"not a recording\n",
        b'{"schema_version": 1}',
        "Ünïcode".encode(),
        b"PK\x05\x06" + b"\0" * 18,
        npy(np.arange(3)),
        npy(np.array([{}], dtype=object)),
        npz(),
        npz(a=np.arange(3)),
        npz(header=np.arange(3)),
        npz(header=np.frombuffer(b"[]", np.uint8)),
        npz(header=np.frombuffer(b'{"format": 2}', np.uint8)),
        npz(header=np.array([{}], dtype=object)),
        zip_of("header.npy", b"spoiled"),
        zip_of("readme.txt", b"hello"),
    ],
    ids=range(16),
)
def test_a_foreign_file_is_refused(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    assert "not a complete recording" in refused(file)


def without(recording: Recording, name: str) -> bytes:
    """The file of a recording that lacks one array."""
    with np.load(io.BytesIO(save_recording(recording))) as arrays:
        return npz(**{other: arrays[other] for other in arrays.files if other != name})


@pytest.mark.parametrize("make", [simulated, real])
def test_a_file_that_lacks_a_column_is_refused(make: Callable[[], Recording], file: Path) -> None:
    recording = make()
    for name, values in arrays_of(recording).items():
        if values is None or name == "tokens":
            continue
        file.write_bytes(without(recording, name))
        assert "not a complete recording" in refused(file)


@pytest.mark.parametrize("name", [f.name for f in fields(Header) if f.name != "about"])
def test_a_header_that_lacks_a_field_is_refused(name: str, file: Path) -> None:
    recording = simulated()
    with np.load(io.BytesIO(save_recording(recording))) as arrays:
        columns = dict(arrays)
    header = json.loads(columns["header"].tobytes())
    del header[name]
    columns["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    file.write_bytes(npz(**columns))
    assert "not a complete recording" in refused(file)


# What is derived


@given(workloads(), configs(), st.lists(st.integers(1, 12), min_size=14, max_size=14))
@law
def test_tokens_of_a_request_are_those_of_its_token_steps(
    workload: Workload, config: Config, ends: list[int]
) -> None:
    stops = dict(enumerate(ends[: len(workload)]))
    recording = serve(ending_early(workload), config, engine=Ledger(config.slots, stops))
    assert recording.tokens is not None
    assert recording.token_offsets[-1] == len(recording.tokens)
    for index, steps in enumerate(steps_with_tokens(recording)):
        assert len(steps) == recording.requests.output_tokens[index]
        assert recording.tokens_of(index).tolist() == [token(index, n) for n in range(len(steps))]


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.data())
@law
def test_a_request_gets_its_first_token_and_then_one_whenever_anybody_decodes(
    decodes: list[bool], data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, len(decodes) - 1))
    last = data.draw(st.integers(first, len(decodes) - 1))
    expected = [first] + [step for step in range(first + 1, last + 1) if decodes[step]]
    assert token_steps(np.array(decodes), first, last).tolist() == expected


spans_of_costs = st.lists(st.binary(min_size=1, max_size=6), min_size=1, max_size=6)


@given(spans_of_costs)
@law
def test_inside_a_span_a_step_begins_when_the_one_before_ends(
    spans: list[bytes],
) -> None:
    starts, ends, span_starts, now = [], [], [], 0
    for span in spans:
        now += span[0] % 3  # between spans time may pass, between steps of one it does not
        span_starts.append(now)
        for cost in span:
            starts.append(now)
            now += cost + 1
            ends.append(now)
    blank = real()
    steps = np.array([len(span) for span in spans])
    recording = replace(
        blank,
        spans=replace(blank.spans, steps=steps, start_ns=np.array(span_starts)),
        ends_ns=np.array(ends),
    )
    assert recording.step_starts_ns.tolist() == starts
    assert recording.step_ends_ns.tolist() == ends


def test_a_simulation_has_no_tokens_and_says_so() -> None:
    with pytest.raises(ValueError, match="no model ran"):
        simulated().tokens_of(0)


def test_only_a_simulation_can_be_merged() -> None:
    with pytest.raises(ValueError, match="only in a simulation"):
        join_spans(real())


def test_the_duration_is_up_to_the_last_token_of_the_last_request() -> None:
    recording = serve(workload_of([(1, 3, 0), (1, 5, 0), (1, 2, 95)]), Config("static", 4))
    assert recording.duration_ns == 95 + 2 * STEP_NS
