"""The table of faults through the program: exit code, line, and what is kept of finished pairs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.faults import FAULTS, Fault, at_time, playing
from support.program import Call, caller

RUN = [
    *("run", "--queue-size", "4", "--batch-size", "1", "--long-tokens", "5", "--short-tokens", "3"),
    *("--trials", "3", "--prompt-tokens", "6", "--quiet"),
]
"""One request at a time, so that the server sees them in order; the warm-up serves the first."""

SAME_FROM_THE_FIRST = [fault for fault in FAULTS if not fault.name.startswith("closes-")]
"""All but some that differ from ``closes-first`` in how far a response got."""

IN_A_TRIAL = [
    fault
    for fault in FAULTS
    if fault.name in ("hangs-later", "reset-later", "429", "error-in-stream", "cut")
]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(monkeypatch, capsys)


@pytest.mark.parametrize("fault", SAME_FROM_THE_FIRST, ids=lambda fault: fault.name)
def test_a_server_that_fails_from_the_first_ends_in_its_code_and_line(
    fault: Fault, call: Call, tmp_path: Path
) -> None:
    folder = tmp_path / "result"
    with playing(fault) as url:
        words = ["--target", url, "--timeout", str(fault.timeout_s), "--output", str(folder)]
        code, out, err = call(*RUN, *words)
    assert (code, out) == (fault.exit_code, "")
    line = err.splitlines()[-1]
    assert line.startswith("batchbench: ")
    assert "Traceback" not in err
    if fault.name == "401":  # seen before any request of the workload
        assert "--api-key" in line
    else:
        assert re.search(fault.line, line), line
    assert not folder.exists()


@pytest.mark.parametrize("fault", IN_A_TRIAL, ids=lambda fault: fault.name)
def test_a_request_that_fails_in_a_trial_loses_its_pair_and_no_other(
    fault: Fault, call: Call, tmp_path: Path
) -> None:
    """The third request fails when it is served for the third time: in the second pair."""
    folder = tmp_path / "result"
    with playing(fault, when=at_time(2, 3)) as url:
        words = ["--target", url, "--timeout", "1", "--output", str(folder)]
        code, out, err = call(*RUN, *words)
    assert code == 1, err
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    (failed,) = result["failures"]
    assert (failed["strategy"], failed["trial"], failed["requests"]) == ("continuous", 1, 4)
    (request,) = failed["failed"]
    assert (request["request"], request["kind"]) == (2, fault.kind.value)
    assert re.search(fault.line, request["text"]), request["text"]
    for strategy in result["strategies"].values():
        assert strategy["summary"]["completed"] == 4
        assert len(strategy["trials"]) == 2
    assert result["validity"]["status"] == "suspect"
    assert "1 of 4 requests failed" in " ".join(out.split())


@pytest.mark.parametrize(
    "fault", [f for f in FAULTS if f.name in ("reset-later", "400")], ids=lambda f: f.name
)
def test_nothing_is_written_if_every_pair_fails(fault: Fault, call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "result"
    always = at_time(2, None)
    with playing(fault, when=always) as url:
        code, out, err = call(*RUN, "--target", url, "--output", str(folder))
    assert (code, out) == (fault.exit_code, "")
    assert re.search(fault.line, err.splitlines()[-1])
    assert "request 2" in err.splitlines()[-1]
    assert not folder.exists()
