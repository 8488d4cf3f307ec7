"""Reproduction: what agrees when a recorded experiment is run again, and what does not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.laws import law
from support.program import Call, caller, experiments
from support.results import clean, verdicts

import batchbench
from batchbench.batching.experiment import PARTS, Experiment
from batchbench.batching.models.loading import LoadedModel
from batchbench.batching.presets import PRESETS
from batchbench.batching.session import conduct
from batchbench.batching.step_cost import KnownCost, StepCost
from batchbench.batching.verification import NOT_VERIFIED, Verification
from batchbench.errors import UsageError
from batchbench.reports.result import Result, load_result, make_result
from batchbench.studies import reproduce as reproducing
from batchbench.studies.reproduce import Verdict, experiment_of, reproduce

AGREES, DIFFERS, OBSERVED = Verdict.AGREES, Verdict.DIFFERS, Verdict.OBSERVED
TIES, NOT_RUN = Verdict.TIES, Verdict.NOT_COMPARED

# An experiment from what a result keeps of it


@settings(law, max_examples=100, suppress_health_check=list(HealthCheck))
@given(experiments, st.sampled_from(sorted(PRESETS)))
def test_an_experiment_comes_back_from_its_config(asked: Experiment, preset: str) -> None:
    asked = replace(asked, preset=preset)
    kept = json.loads(json.dumps(asked.config()))
    assert Experiment.from_config(kept, simulated=asked.simulated) == asked


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_comes_back_from_its_config(preset: str) -> None:
    asked = Experiment.of(preset=preset)
    assert Experiment.from_config(json.loads(json.dumps(asked.config()))) == asked


def test_files_come_back_as_paths(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n")
    asked = Experiment.of({"prompts": tmp_path / "prompts.txt"})
    again = Experiment.from_config(json.loads(json.dumps(asked.config())))
    assert again == asked
    assert again.workload.prompts == tmp_path / "prompts.txt"


def test_a_setting_that_is_not_known_is_named_and_one_that_lacks_is_as_usual() -> None:
    config = Experiment().config()
    with pytest.raises(UsageError, match=r"^--warp: this batchbench has no such option"):
        Experiment.from_config({**config, "serving": {**config["serving"], "warp": 9}})
    del config["serving"]["max_wait"]
    assert Experiment.from_config(config) == Experiment()


@pytest.mark.parametrize("part", PARTS)
def test_a_value_of_another_kind_is_named(part: str) -> None:
    for field in fields(PARTS[part]):
        config = Experiment().config()
        config.setdefault(part, {})[field.name] = {"no": "kind"}
        option = "--" + field.name.replace("_", "-")
        with pytest.raises(UsageError, match=f"^{option} .*: must be"):
            Experiment.from_config(config)


# Weights


def test_any_weight_that_changes_changes_the_digest(make_model: Callable[..., LoadedModel]) -> None:
    model = make_model()
    before = model.weights_digest
    rng = np.random.default_rng(0)
    for parameter in model.module.parameters():
        flat = parameter.data.view(-1)
        at = int(rng.integers(len(flat)))
        kept = flat[at].clone()
        flat[at] = torch.nextafter(kept, torch.tensor(torch.inf))
        assert digest_of(model) != before
        flat[at] = kept
    assert digest_of(model) == before
    assert make_model().weights_digest == before
    assert make_model(seed=1).weights_digest != before
    assert make_model(dtype="bfloat16").weights_digest != before


def digest_of(model: LoadedModel) -> str:
    """The digest as it is now."""
    return replace(model).weights_digest


# Run again

QUICK: Mapping[str, Any] = {
    "batch_size": 3,
    "queue_size": 7,
    "long_tokens": 9,
    "short_tokens": 3,
    "prompt_tokens": "2:9",
    "trials": 3,
    "device": "cpu",
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Result:
    """A small run of the tiny checkpoint; not to be changed."""
    return make_result(conduct(Experiment.of(QUICK, {"model": str(checkpoint)})))


def with_data(result: Result, *path: str, value: Any) -> Result:
    """The result with another value in it."""
    data = deepcopy(dict(result.data))
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return Result(data, result.recordings)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": "static-oracle,static,continuous"},
        {"preset": "burst", "queue_size": 50},
        {"request_rate": 50, "max_concurrency": 20, "trials": 2},
    ],
    ids=str,
)
def test_a_simulation_is_reproduced_exactly(options: dict[str, Any]) -> None:
    reproduction = reproduce(batchbench.simulate(**options))
    assert reproduction.differences == []
    assert {c.verdict for c in reproduction.checks} == {AGREES}
    assert all(check.exact for check in reproduction.checks)
    assert reproduction.agrees


def test_a_simulation_on_fitted_costs_is_reproduced_on_the_same() -> None:
    known = KnownCost("a-run", StepCost(1000.5, 7.25, 0.5, 3.0, 2.0, 11.0), (1, 8), 56, 107)
    result = make_result(conduct(Experiment(simulated=True, cost=known)))
    assert experiment_of(result).cost == known
    assert reproduce(result).differences == []
    costless = make_result(conduct(Experiment(simulated=True)))
    assert costless.data["strategies"] != result.data["strategies"]


def test_a_run_is_reproduced(served: Result) -> None:
    reproduction = reproduce(served)
    assert reproduction.differences == []
    exact = {check.name: check.verdict for check in reproduction.checks if check.exact}
    assert exact == dict.fromkeys(
        ["workload", "weights"]
        + [f"{what}, {name}" for what in ("counters", "outputs") for name in served.names],
        AGREES,
    )
    assert {check.name for check in reproduction.checks if not check.exact} == {
        "duration, static",
        "duration, continuous",
        "speed-up, continuous",
    }
    assert reproduction.agrees
    assert reproduction.again is not None
    order = [len(trials) for trials in reproduction.again.recordings.values()]
    assert order == [3, 3]


def test_what_auto_meant_is_pinned(served: Result) -> None:
    asked = experiment_of(served)
    assert (asked.model.device, asked.model.dtype) == ("cpu", "float32")
    assert asked.model.load_format == "pretrained"
    assert asked.serving.execution == served.data["model"]["execution"]
    fewer = {name: trials[:2] for name, trials in served.recordings.items()}
    assert experiment_of(Result(served.data, fewer)).trials.trials == 2


def test_other_weights_are_told_and_nothing_is_run(
    served: Result, checkpoint: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, tmp_path / "tiny")
    weights = load_file(tmp_path / "tiny" / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.bias"][3] += 1e-6
    save_file(weights, tmp_path / "tiny" / "model.safetensors", metadata={"format": "pt"})
    changed = with_data(served, "config", "model", "model", value=str(tmp_path / "tiny"))
    reproduction = reproduce(changed)
    assert verdicts(reproduction.checks) == {"workload": AGREES, "weights": DIFFERS}
    assert reproduction.again is None
    assert reproduction.sentence == "NOT reproduced: weights differs, so nothing was run."


def test_a_record_without_weights_says_so(served: Result) -> None:
    data = deepcopy(dict(served.data))
    del data["model"]["weights_digest"]
    check = reproducing.check_weights(Result(data, served.recordings), served.data["model"])
    assert (check.recorded, check.verdict) == ("not recorded", NOT_RUN)


def test_other_counters_are_told() -> None:
    result = batchbench.simulate()
    counted = with_data(
        result, "strategies", "static", "counters", "finished_slot_steps", value=2521
    )
    reproduction = reproduce(counted)
    (check,) = [check for check in reproduction.checks if check.verdict == DIFFERS]
    assert (check.name, check.recorded, check.here) == (
        "counters, static",
        "2,521 finished slot steps",
        "2,520 finished slot steps",
    )
    assert not reproduction.agrees


def test_counters_of_timed_arrivals_are_observations_on_a_real_clock() -> None:
    data = deepcopy(dict(clean().data))
    data["workload"]["closed"] = False
    data["strategies"]["static"]["counters"]["forward_passes"] += 1
    checks = reproducing.check_counters(Result(data, clean().recordings), clean())
    assert [check.verdict for check in checks] == [OBSERVED, AGREES]


def with_tokens(result: Result, name: str, request: int, token: int) -> Result:
    """The result with another last token of a request in each trial of a strategy."""
    trials = []
    for recording in result.recordings[name]:
        assert recording.tokens is not None
        tokens = recording.tokens.copy()
        tokens[recording.token_offsets[request + 1] - 1] = token
        trials.append(replace(recording, tokens=tokens))
    changed = with_data(result, "strategies", name, "output_digest", value="0" * 64)
    return Result(changed.data, {**result.recordings, name: trials})


def test_tokens_that_the_model_would_not_say_are_told(served: Result) -> None:
    token = int(served.recordings["static"][0].tokens_of(4)[-1])
    changed = with_tokens(served, "static", 4, (token + 1) % 300)
    changed = with_data(changed, "environment", "cpu", value="another")
    reproduction = reproduce(changed)
    found = verdicts(reproduction.checks)
    assert (found["outputs, static"], found["outputs, continuous"]) == (DIFFERS, AGREES)
    (check,) = [check for check in reproduction.checks if check.name == "outputs, static"]
    assert check.here == "1 of 7 requests differ, 1 wrong"
    assert [(d.name, d.base) for d in reproduction.differences] == [("cpu", "another")]


@pytest.mark.parametrize(
    ("judged", "alike", "verdict"),
    [
        (Verification(2, 0, 2, 0, "model", 0.1), False, TIES),
        (Verification(2, 0, 2, 0, "model", 0.1), True, DIFFERS),
        (Verification(2, 0, 1, 1, "model", 0.1), False, DIFFERS),
        (NOT_VERIFIED, False, DIFFERS),
    ],
)
def test_ties_pass_in_another_environment_only(
    judged: Verification, alike: bool, verdict: str
) -> None:
    then = with_data(clean(), "strategies", "static", "output_digest", value="0" * 64)
    assert (
        reproducing.check_outputs(then, clean(), "static", judged, alike=alike).verdict == verdict
    )
    assert (
        reproducing.check_outputs(clean(), clean(), "static", judged, alike=alike).verdict == AGREES
    )


def test_what_differs_in_the_environment_is_named() -> None:
    data = {**clean().data, "batchbench_version": "0.0.9"}
    then = {"hostname": "a", "cpu": "x", "packages": {"torch": "1"}, "gpu_clock_mhz": {"sm": 1}}
    now = {"hostname": "b", "cpu": "x", "packages": {"torch": "2"}, "gpu_clock_mhz": {"sm": 2}}
    found = reproducing.differences_of({**data, "environment": then}, now, data["model"])
    assert [(d.name, d.base, d.new) for d in found] == [
        ("hostname", "a", "b"),
        ("torch", "1", "2"),
        ("batchbench", "0.0.9", batchbench.__version__),
    ]
    assert not reproducing.is_alike(found)
    assert reproducing.is_alike(found[:1])


@pytest.mark.parametrize(
    ("now", "verdict"),
    [
        ([10.1, 9.9, 10.05, 9.95], AGREES),
        ([12.1, 11.9, 12.05, 11.95], DIFFERS),
        ([10.0, 10.1], OBSERVED),
    ],
)
def test_times_agree_within_their_interval_and_never_fail(now: list[float], verdict: str) -> None:
    then = np.array([10.0, 10.1, 9.9, 10.0])
    check = reproducing._check_ratio("duration", then, np.array(now), "s", exact=False)
    assert (check.verdict, check.exact) == (verdict, False)


def test_times_that_are_far_off_are_in_the_sentence() -> None:
    then, now = np.array([1.0]), np.array([5.95])
    check = reproducing._check_ratio("duration, static", then, now, "s", exact=False)
    assert reproducing.Reproduction("", [], [check], None).sentence == (
        "reproduced: 0 of 0 exact checks agree, but times are not reproduced: duration of static "
        "is 5.95× the recorded one."
    )


@settings(law, max_examples=50)
@given(
    st.lists(st.floats(0.1, 10), min_size=3, max_size=6),
    st.lists(st.floats(0.1, 10), min_size=3, max_size=6),
    st.floats(0.1, 10),
)
def test_the_interval_of_a_ratio_scales_and_turns_round(
    a: list[float], b: list[float], by: float
) -> None:
    low, high = reproducing.interval_of_ratio(a, b)
    assume(high < 1e100)
    assert low <= high
    scaled = reproducing.interval_of_ratio(a, np.array(b) * by)
    assert np.allclose(scaled, (low * by, high * by))
    assert np.allclose(reproducing.interval_of_ratio(b, a), (1 / high, 1 / low))


# The command


@pytest.fixture
def program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    """Return a function that runs the program in an empty folder."""
    from batchbench.reports import output as folders

    monkeypatch.setattr(folders, "draw", lambda recordings, title: {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    return caller(monkeypatch, capsys)


def test_the_command_tells_and_ends_with_0(program: Callable[..., Any], tmp_path: Path) -> None:
    assert program("simulate", "--output", "mine", "--quiet")[0] == 0
    code, out, _ = program("reproduce", "mine", "--output", "again")
    assert code == 0
    assert out.startswith("Environment differences: none.\n")
    assert "reproduced: 6 of 6 exact checks agree." in out
    assert re.search(r"counters, static +│ 400 forward passes │ 400 forward passes │ agrees", out)
    assert load_result(tmp_path / "again").data["command"] == "batchbench simulate --batch-size 8"
    code, out, _ = program("reproduce", "mine/result.json", "--quiet")
    assert (code, out) == (0, "reproduced: 6 of 6 exact checks agree.\n")
    code, out, _ = program("reproduce", "mine", "--json", "--quiet")
    told = json.loads(out)
    assert (told["agrees"], told["environment"]) == (True, [])
    assert len(told["checks"]) == 6


def test_what_is_not_reproduced_ends_with_1(program: Callable[..., Any], tmp_path: Path) -> None:
    program("simulate", "--output", "mine", "--quiet")
    file = tmp_path / "mine" / "result.json"
    text = file.read_text().replace('"forward_passes": 400', '"forward_passes": 401')
    file.write_text(text)
    code, out, err = program("reproduce", "mine")
    assert code == 1
    assert "NOT reproduced: counters, static differs." in out
    assert "batchbench:" not in err


def changed(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("three other words\n")


def gone(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").unlink()


def elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "mine" / "result.json"
    data = json.loads(file.read_text())
    data["simulated"], data["model"] = False, {**data["model"], "device": "cuda:7"}
    data["model"] |= {"dtype": "float32", "load_format": "dummy"}
    file.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (
            changed,
            "cannot be run here: the workload differs, so a file that it uses (--prompts) has "
            "changed",
        ),
        (gone, "cannot be run here: --prompts prompts.txt: no such file or directory"),
        (elsewhere, "cannot be run here: --device cuda:7: not on this machine; it has cpu"),
    ],
)
def test_what_cannot_be_run_here_ends_with_2_and_one_line(
    spoil: Callable[[Path], None], error: str, program: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a prompt\nanother one\n")
    program("simulate", "--prompts", "prompts.txt", "--output", "mine", "--quiet")
    spoil(tmp_path)
    code, out, err = program("reproduce", "mine", "--quiet")
    assert (code, out) == (2, "")
    assert error in err
    assert err.count("\n") == 1


def test_nothing_is_written_where_it_cannot_be_run(
    program: Callable[..., Any], tmp_path: Path
) -> None:
    program("simulate", "--output", "mine", "--quiet")
    assert program("reproduce", "mine", "--output", "mine")[0] == 2
    elsewhere(tmp_path)
    assert program("reproduce", "mine", "--output", "again/deep")[0] == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine"]
