"""The ladder: options, rungs, outcome, report and files."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console
from support.models import LLAMA, MakeModel

from batchbench.batching import trials as serving
from batchbench.batching.engines.notebook import NotebookEngine
from batchbench.batching.engines.torch import hardware as measuring
from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
from batchbench.batching.models import ModelSpec
from batchbench.batching.progress import Progress, Watch
from batchbench.batching.recording import Recording
from batchbench.batching.recording_file import load_recording
from batchbench.batching.step_cost import Bandwidth, Ceiling, Reading
from batchbench.batching.verification import Remembered, Verification
from batchbench.cli.main import run_command
from batchbench.errors import UsageError
from batchbench.files import write_whole
from batchbench.reports.metrics import decode_steps
from batchbench.studies.ladder import report, run
from batchbench.studies.ladder.report import (
    STALE,
    Data,
    card_lines,
    draw_ladder,
    files_of,
    make_card,
    make_ladder,
    passed,
    render,
    sentence,
)
from batchbench.studies.ladder.run import Ladder, LadderOutcome
from batchbench.studies.ladder.rungs import RUNGS, LadderSpec, choose_rungs
from batchbench.workloads.spec import WorkloadSpec

if TYPE_CHECKING:
    from batchbench.batching.models.loading import LoadedModel

observe = serving.observe

NAMES = ["notebook-static", "notebook", "generate_batch", "slots", "mixed", "lean"]
"""Rungs in float32 on a CPU without packed weights."""


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandwidth of a cache will do here."""
    monkeypatch.setattr(measuring, "cache_bytes", lambda device: 2**18)
    monkeypatch.setattr(measuring, "_LEAST_BYTES", 2**20)


def experiment(checkpoint: Path | str, **settings: Any) -> Experiment:
    return Experiment(
        WorkloadSpec(queue_size=6, long_tokens=9, short_tokens=4),
        ModelSpec(model=str(checkpoint), device="cpu", dtype=settings.pop("dtype", "auto")),
        ServingSpec(batch_size=3),
        TrialsSpec(**settings),
    )


def made(checkpoint: Path | str, rungs: str = "all", rounds: int = 1, **settings: Any) -> Ladder:
    return Ladder(experiment(checkpoint, **settings), LadderSpec(rungs, rounds), Watch())


Run = tuple[Ladder, LadderOutcome, dict[str, Any]]


@pytest.fixture(scope="module")
def complete(checkpoint: Path) -> Iterator[Run]:
    """All rungs, two rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "cache_bytes", lambda device: 2**18)
        patch.setattr(measuring, "_LEAST_BYTES", 2**20)
        ladder = made(checkpoint, rounds=2)
        outcome = ladder.run(ladder.measure())
        yield ladder, outcome, make_ladder(outcome, "")


# Options


@pytest.mark.parametrize(
    ("rungs", "said"),
    [
        ("packd", r"--rungs packd: no such rung; choose from notebook-static, notebook, generate_"),
        ("lean,lean", r"--rungs lean,lean: name each rung once"),
        (" , ", r"--rungs , : name each rung once, such as notebook,packed"),
    ],
)
def test_rungs_that_are_not_there_are_named_with_those_that_are(rungs: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        LadderSpec(rungs)


def test_rungs_run_in_their_own_order_however_they_are_named() -> None:
    assert [r.name for r in choose_rungs("packed, notebook")] == ["notebook", "packed"]
    assert choose_rungs("all") == RUNGS
    assert len({rung.name for rung in RUNGS}) == len(RUNGS)


@pytest.mark.parametrize(
    ("rung", "said"),
    [
        ("graph", "--rungs graph: CUDA graphs need a CUDA device"),
        ("bfloat16", "--rungs bfloat16: the model is in bfloat16 already; give --dtype float32"),
    ],
)
def test_a_rung_that_this_device_lacks_is_refused_by_name(
    checkpoint: Path, rung: str, said: str
) -> None:
    dtype = "bfloat16" if rung == "bfloat16" else "auto"
    with pytest.raises(UsageError, match=said):
        made(checkpoint, rung, dtype=dtype)


def test_the_llama_family_has_the_rungs_of_gpt2(
    make_model: MakeModel, checkpoint: Path, tmp_path: Path
) -> None:
    make_model(LLAMA).module.save_pretrained(tmp_path / "llama")
    ladder, gpt2 = made(tmp_path / "llama"), made(checkpoint)
    assert [r.rung.name for r in ladder.rungs] == [r.rung.name for r in gpt2.rungs]
    assert ladder.left_out.keys() == gpt2.left_out.keys()


def test_other_models_run_the_rungs_that_they_have(make_model: MakeModel, tmp_path: Path) -> None:
    make_model(LLAMA, hidden_act="gelu").module.save_pretrained(tmp_path / "other")
    ladder = made(tmp_path / "other")
    names = [opened.rung.name for opened in ladder.rungs]
    assert names == ["notebook-static", "notebook", "generate_batch", "slots", "mixed", "bfloat16"]
    assert set(ladder.left_out) == {"lean", "compile", "graph", "packed", "kernels"}
    assert ladder.left_out["lean"] == (
        "batchbench has no forward pass of its own for this model: its activation is gelu"
    )


def test_requests_that_arrive_over_time_are_refused(checkpoint: Path) -> None:
    timed = replace(experiment(checkpoint), workload=WorkloadSpec(queue_size=4, request_rate=5.0))
    with pytest.raises(UsageError, match="all requests must be there at the start"):
        Ladder(timed, LadderSpec(), Watch())


def test_a_workload_without_decode_steps_has_no_floor(checkpoint: Path) -> None:
    single = WorkloadSpec(queue_size=4, long_tokens=1, short_tokens=1)
    asked = replace(experiment(checkpoint), workload=single)
    ladder = Ladder(asked, LadderSpec("slots"), Watch())
    with pytest.raises(UsageError, match="raise --long-tokens"):
        ladder.measure()


# Running


def test_every_rung_serves_the_same_with_the_models_own_tokens(complete: Run) -> None:
    ladder, outcome, result = complete
    rungs = [opened.rung for opened in ladder.rungs]
    assert [rung.name for rung in rungs][: len(NAMES)] == NAMES
    assert rungs[-1].dtype == "bfloat16"
    assert {rung.dtype for rung in rungs[:-1]} == {"float32"}
    outputs = {}
    for rung in rungs:
        trials = outcome.recordings[rung.name]
        assert len(trials) == 2
        for trial in trials:
            assert trial.header.strategy == rung.name
            assert trial.requests.output_tokens.tolist() == ladder.workload.output_tokens.tolist()
        verified = outcome.verifications[rung.name]
        assert (verified.requests_checked, verified.wrong) == (6, 0)
        outputs.setdefault(rung.dtype, set()).add(trials[0].tokens.tobytes())
    assert len(outputs["float32"]) == 1
    assert passed(result)


def test_each_rung_changes_one_thing(complete: Run) -> None:
    """The steps tell policy and prefill apart; the tensors the rest."""
    rungs = {rung["name"]: rung for rung in complete[2]["rungs"]}
    passes = {n: r["counters"]["forward_passes"] for n, r in rungs.items() if r["counters"]}
    assert passes["notebook-static"] > passes["notebook"] == passes["slots"] > passes["mixed"]
    assert passes["lean"] == passes["mixed"] == passes["bfloat16"]
    assert rungs["generate_batch"]["counters"] is None
    memory = {opened.rung.name: opened.memory for opened in complete[0].rungs}
    cache_bytes = [memory[name]["kv_cache_bytes"] for name in ("notebook", "generate_batch")]
    assert 0 < cache_bytes[0] < cache_bytes[1]  # whole pages, and a quarter more
    assert memory["lean"]["packed_weight_bytes"] == 0
    assert memory["bfloat16"]["weight_bytes"] * 2 == memory["lean"]["weight_bytes"]


def test_figures_of_a_rung_are_those_of_its_recordings(
    complete: Run,
) -> None:
    _, found, result = complete
    assert len(found.ceilings) == 3  # before, between and after two rounds
    for rung in result["rungs"]:
        steps = [decode_steps(trial).full_ms or 0 for trial in found.recordings[rung["name"]]]
        assert rung["decode_step_ms"] == pytest.approx(sum(steps) / 2)
        assert rung["decode_step_rows"] == 3
        alone = [measured[rung["dtype"]].products_s * 1e3 for measured in found.ceilings]
        times = [steps[i] / ((alone[i] + alone[i + 1]) / 2) for i in range(2)]
        assert rung["times_products"] == pytest.approx(sum(times) / 2)
        known = result["card"]["formats"][rung["dtype"]]
        assert rung["floor_share"] == pytest.approx(
            known["floor_ms"] / rung["decode_step_ms"], rel=2
        )
        assert 0 < rung["outside_model"] < 1
        first, last = found.recordings[rung["name"]]
        for yardstick, speedup in rung["speedup"].items():
            if yardstick == rung["name"]:
                assert speedup is None
                continue
            other = found.recordings[yardstick]
            pairs = [
                o.duration_ns / t.duration_ns for o, t in zip(other, (first, last), strict=True)
            ]
            assert min(pairs) <= speedup["median"] <= max(pairs)


def test_rungs_take_turns_in_alternating_order(checkpoint: Path) -> None:
    class Order(Watch):
        def __init__(self) -> None:
            self.begun: list[tuple[str, int]] = []
            self.told: set[str] = set()

        def trial_begins(self, strategy: str, trial: int, trials: int) -> None:
            self.begun.append((strategy, trial))

        def progressed(self, progress: Progress) -> None:
            self.told.add(progress.strategy)

    watch = Order()
    asked = experiment(checkpoint, verify="none")
    ladder = Ladder(asked, LadderSpec("slots,mixed,lean", 2), watch)
    ladder.run(ladder.measure())
    up = ["slots", "mixed", "lean"]
    assert watch.begun == [*((n, 0) for n in up), *((n, 1) for n in reversed(up))]
    assert watch.told == set(up)


def test_wrong_tokens_of_one_rung_are_told_of_that_one(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook whose positions are off by one gives wrong tokens; the slots engine does not."""
    right = NotebookEngine._compute

    def shifted(self: Any, ids: Any, mask: Any, positions: Any, past: Any, slots: Any) -> Any:
        return right(self, ids, mask, positions + 1, past, slots)

    monkeypatch.setattr(NotebookEngine, "_compute", shifted)
    ladder = made(checkpoint, "notebook,lean")
    result = make_ladder(ladder.run(ladder.measure()), "")
    wrong = {rung["name"]: rung["verification"]["wrong"] for rung in result["rungs"]}
    assert wrong["lean"] == 0
    assert wrong["notebook"] > 0
    assert not passed(result)
    assert "WRONG tokens on notebook: request" in sentence(result)
    assert result["validity"]["status"] == "suspect"


def test_ctrl_c_keeps_whole_rounds(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))

    def impatient(*args: Any, **options: Any) -> Recording:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return observe(*args, **options)

    monkeypatch.setattr(serving, "observe", impatient)
    ladder = made(checkpoint, "slots,lean", 5)
    ceilings = ladder.measure()
    outcome = ladder.run(ceilings)
    assert [len(trials) for trials in outcome.recordings.values()] == [1, 1]
    assert outcome.stopped == "interrupted after 1 of 5 rounds"
    assert not any(v.requests_checked for v in outcome.verifications.values())
    calls = iter([3])
    with pytest.raises(KeyboardInterrupt):
        ladder.run(ceilings)


def test_ctrl_c_while_verifying_keeps_all_rounds(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Verification:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "verify", interrupted)
    ladder = made(checkpoint, "lean", 2)
    outcome = ladder.run(ladder.measure())
    assert len(outcome.recordings["lean"]) == 2
    assert outcome.stopped == "interrupted after 2 of 2 rounds"


Break = Callable[[str, int, Exception], None]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Break:
    """Lets the notebook engine fail: when it is made, or from its n-th prefill on."""

    def breaks(stage: str, after: int, error: Exception) -> None:
        calls = iter(range(after))

        def fails(*given: Any) -> Any:
            if stage == "opening" or next(calls, None) is None:
                raise error
            return right(*given)

        right = NotebookEngine._prefill
        name = "__init__" if stage == "opening" else "_prefill"
        monkeypatch.setattr(NotebookEngine, name, fails)

    return breaks


STAGES = {"opening": 0, "warming up": 1, "serving": 3}
"""Number of prefills before the one that fails: two rounds of warming up, then trials."""

ERRORS = [
    (RuntimeError("out of memory"), "out of memory"),
    (ImportError("no flash"), "ImportError: no flash"),
    (AttributeError("no such\n   module"), "AttributeError: no such module"),
    (UsageError("--batch-size 3: does not fit"), "--batch-size 3: does not fit"),
    (RuntimeError("C++ stack:\n" + 400 * "frame at 0x0000\n"), "C++ stack: frame at 0x0000 "),
]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("error", "why"), ERRORS, ids=["torch", "import", "bug", "ours", "long"])
def test_a_rung_that_fails_is_left_out_and_the_others_go_on(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: Break,
    stage: str,
    error: Exception,
    why: str,
) -> None:
    failing(stage, STAGES[stage], error)
    some = [rung for rung in RUNGS if rung.name in ("notebook", "lean")]
    monkeypatch.setattr(run, "choose_rungs", lambda text: some)
    ladder = made(checkpoint, rounds=2)
    outcome = ladder.run(ladder.measure())
    assert (outcome.stopped, outcome.failed) == (None, None)
    result = make_ladder(outcome, "")
    assert [rung["name"] for rung in result["rungs"]] == ["lean"]
    assert list(result["left_out"]) == ["notebook"]
    said = result["left_out"]["notebook"]
    assert said.startswith(why)
    assert len(said) <= 200
    assert len(outcome.recordings["lean"]) == 2


@pytest.mark.parametrize("stage", ["opening", "warming up"])
def test_a_named_rung_that_fails_before_it_serves_is_an_error(
    checkpoint: Path, failing: Break, stage: str
) -> None:
    failing(stage, STAGES[stage], RuntimeError("out of\nmemory"))

    def attempt() -> None:
        ladder = made(checkpoint, "notebook,lean")
        ladder.run(ladder.measure())

    with pytest.raises(UsageError, match=r"^--rungs notebook: out of memory; remove it$"):
        attempt()


@pytest.mark.parametrize(
    ("after", "kept"),
    [(7, {"notebook", "lean"}), (3, {"lean"})],
    ids=["in the second round", "in the first round"],
)
def test_a_named_rung_that_fails_takes_nothing_finished_with_it(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: Break,
    after: int,
    kept: set[str],
) -> None:
    """Six requests in three slots need four prefills a trial, and a warm-up one."""
    order = ["lean", "notebook"] if after == 3 else ["notebook", "lean"]
    some = sorted(
        (rung for rung in RUNGS if rung.name in order), key=lambda rung: order.index(rung.name)
    )
    monkeypatch.setattr(run, "choose_rungs", lambda text: some)
    failing("serving", after, RuntimeError("device lost"))
    ladder = made(checkpoint, "notebook,lean", 2)
    outcome = ladder.run(ladder.measure())
    assert str(outcome.failed) == "--rungs notebook: device lost; remove it"
    finished = {name: len(trials) for name, trials in outcome.recordings.items()}
    assert finished == dict.fromkeys(kept, 1)
    result = make_ladder(outcome, "")
    assert result["validity"]["reasons"][0] == "--rungs notebook: device lost; remove it"
    assert {rung["name"] for rung in result["rungs"]} == kept
    assert not any(rung["verification"]["requests_checked"] for rung in result["rungs"])


def test_a_device_that_is_lost_takes_nothing_finished_with_it(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rungs fail in the second round: their first round is kept."""
    calls = iter(range(2))

    def lost(*args: Any, **options: Any) -> Recording:
        if next(calls, None) is None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with")
        return observe(*args, **options)

    monkeypatch.setattr(serving, "observe", lost)
    some = [rung for rung in RUNGS if rung.name in ("mixed", "lean", "graph")]
    monkeypatch.setattr(run, "choose_rungs", lambda text: some)
    ladder = made(checkpoint, rounds=3)
    outcome = ladder.run(ladder.measure())
    assert {name: len(trials) for name, trials in outcome.recordings.items()} == {
        "mixed": 1,
        "lean": 1,
    }
    assert list(ladder.left_out) == ["graph"]
    assert "no rung is left; lean: CUDA error: an illegal memory access" in str(outcome.failed)
    make_ladder(outcome, "")


@pytest.mark.parametrize("what", ["measure", "_verify"])
def test_an_error_beside_the_rungs_takes_nothing_finished_with_it(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    ladder = made(checkpoint, "lean", 2)
    before = ladder.measure()

    def fails(*_: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(ladder, what, fails)
    outcome = ladder.run(before)
    assert str(outcome.failed) == "CUDA out of memory"
    assert len(outcome.recordings["lean"]) == (1 if what == "measure" else 2)
    make_ladder(outcome, "")


def test_a_reference_is_asked_once_for_all_rungs() -> None:
    import numpy as np

    class Counting:
        name, asked = "counting", 0

        def deviations(self, prompt: Any, output: Any, stream: Any = None) -> Sequence[Any]:
            self.asked += 1
            return []

    reference = Counting()
    remembered = Remembered(reference)
    assert remembered.name == "counting"
    prompt = np.array([1, 2], np.int32)
    for output in ([5], [5, 6], [5]):
        remembered.deviations(prompt, np.array(output, np.int32))
    assert reference.asked == 2


# The report


def test_the_card_stands_on_its_own() -> None:
    speed = Bandwidth(31.7e9, "sum", 2**30, 260 * 2**20, 7, 2)
    ceilings = {
        "float32": Ceiling(
            speed, Reading("float32", 497_759_232, 494_613_504, 73_728), 0.0247, 8, 300
        ),
        "bfloat16": Ceiling(
            speed, Reading("bfloat16", 248_879_616, 247_306_752, 36_864), 0.0061, 8, 300
        ),
    }
    lines = card_lines(make_card(ceilings))
    text = "\n".join(lines)
    assert "31.7 GB/s read, 2 threads; measured on a buffer of 1,024 MiB," in text
    assert "3.9 × the last-level cache (too small): sum, median of 7" in text
    assert "limit    16.3 ms per memory-bound decode step: (weights + KV) / bandwidth" in text
    assert "ceiling  324 tokens/s, limited by arithmetic" in text
    assert "ceiling  982 tokens/s, limited by memory" in text
    assert max(map(len, lines)) <= 80


def test_the_card_of_a_gpu_names_launching() -> None:
    speed = Bandwidth(3.0e12, "sum", 2**32, 50 * 2**20, 7, None)
    reading = Reading("bfloat16", 248_879_616, 247_306_752, 36_864)
    ceilings = {"bfloat16": Ceiling(speed, reading, 2.7e-4, 8, 512, 2.5e-6, 1.7e-4)}
    card = make_card(ceilings)
    lines = card_lines(card)
    text = "\n".join(lines)
    assert "products 0.27 ms for the step's matrix products alone" in text
    assert "compute  0.0025 ms for these products at the rate of a large one" in text
    assert "launch   0.17 ms for as many products of almost no work" in text
    assert "ceiling  29,630 tokens/s, limited by launching" in text
    assert max(map(len, lines)) <= 80
    found = card["formats"]["bfloat16"]
    assert found["bound"] == "launching"
    assert (found["launching_ms"], found["arithmetic_ms"]) == (pytest.approx(0.17), 0.0025)


EARLIER = Path(__file__).parents[2] / "benchmarks/results/ladder-classic-8/ladder.json"


def test_a_ladder_of_an_earlier_version_is_shown_again() -> None:
    """It knows of no launching, and of no servings."""
    result = json.loads(EARLIER.read_text())
    assert card_lines(result["card"])[-1] == ("    ceiling  703 tokens/s, limited by arithmetic")
    assert "kernels" in shown(result, 80)
    draw_ladder(result)


def shown(result: Data, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(render(result))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_and_cuts_nothing_off(complete: Run, width: int) -> None:
    text = shown(complete[2], width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    for rung in complete[2]["rungs"]:
        assert rung["name"][: width // 12] in text
    assert "Left out: graph: CUDA graphs need a CUDA device" in text.replace("\n", " ")


def altered(result: Data, name: str, **figures: Any) -> Data:
    rungs = [{**r, **figures} if r["name"] == name else r for r in result["rungs"]]
    return {**result, "rungs": rungs}


def test_what_is_not_known_is_not_made_up(complete: Run) -> None:
    unknown = altered(
        complete[2],
        "lean",
        decode_step_ms=None,
        floor_share=None,
        times_products=None,
        outside_model=None,
    )
    row = next(line for line in shown(unknown, 120).splitlines() if line.startswith("lean  "))
    assert row.count("N/A") == 4
    draw_ladder(unknown)


def test_ties_and_faults_stand_beside_their_rung(
    complete: Run,
) -> None:
    verdict = {**complete[2]["rungs"][0]["verification"]}
    tied = altered(
        complete[2], "slots", verification={**verdict, "identical": 5, "numerical_ties": 1}
    )
    lines = shown(tied, 80).splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("slots"))
    assert lines[row].rstrip().endswith("5 same")
    assert lines[row + 1].rstrip().endswith("1 tie")
    unverified = altered(complete[2], "slots", verification={**verdict, "requests_checked": 0})
    assert "tokens not verified" in sentence(unverified)


def test_the_picture_shows_every_rung_and_both_limits(
    complete: Run,
) -> None:
    figure = draw_ladder(complete[2])
    rates, steps = figure.axes
    rungs = complete[2]["rungs"]
    assert [bar.get_gid() for bar in rates.patches] == [f"rate-{i}" for i in range(len(rungs))]
    for bar, rung in zip(rates.patches, rungs, strict=True):
        assert bar.get_width() == pytest.approx(rung["summary"]["output_throughput"])
    for bar, rung in zip(steps.patches, rungs, strict=True):
        assert bar.get_width() == pytest.approx(rung["decode_step_ms"])
    limits = [line.get_xdata()[0] for line in steps.lines]
    known = [complete[2]["card"]["formats"][rung["dtype"]] for rung in rungs]
    assert limits == [k[name] for k in known for name in ("floor_ms", "products_ms")]
    assert all(bar.get_width() < steps.get_xlim()[1] for bar in steps.patches)


def test_files_are_written_whole_and_recordings_with_them(complete: Run, tmp_path: Path) -> None:
    files = write_whole(tmp_path, files_of(complete[1], complete[2]), STALE)
    assert files[0] == tmp_path / "ladder.json"
    assert {f.name for f in files[:3]} == {"ladder.json", "ladder.png", "ladder.svg"}
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "ladder.json").read_text())
    assert data == json.loads(json.dumps(complete[2]))
    again = load_recording(tmp_path / "recordings" / "2-1.npz")
    assert again.header.strategy == "generate_batch"
    assert again.header.trial == 1


def measured(result: Data, status: str = "valid", **rates: list[float]) -> Data:
    """The result with other rates of its first rungs, in tokens/s by round."""
    rungs = [
        {
            **rung,
            "name": name,
            "summary": {**rung["summary"], "output_throughput": sorted(values)[len(values) // 2]},
            "trials": [{"output_throughput": value} for value in values],
        }
        for rung, (name, values) in zip(result["rungs"], rates.items(), strict=False)
    ]
    validity = {"status": status, "reasons": [] if status == "valid" else ["a busy machine"]}
    return {**result, "rungs": rungs, "validity": validity}


def test_only_a_valid_ladder_with_a_clear_lead_names_the_fastest(complete: Run) -> None:
    clear = {"a": [10.0, 10.1, 9.9], "b": [20.0, 20.2, 19.9]}
    assert sentence(measured(complete[2], **clear)).startswith("b is the fastest of 2 rungs")
    for unclear, why in (
        (measured(complete[2], "suspect", **clear), "the run is suspect"),
        (measured(complete[2], a=[10.0, 10.1], b=[20.0, 20.2]), "intervals need 3 rounds"),
        (measured(complete[2], a=[9.0, 15.0, 10.0], b=[14.0, 11.0, 16.0]), "b and a do not differ"),
    ):
        text = sentence(unclear)
        assert text.startswith(f"No rung is named the fastest, because {why}")
        assert "its decode step" not in text
        draw_ladder(unclear)


# The command


def said(
    words: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["batchbench", "ladder", *words])
    code = run_command()
    out, err = capsys.readouterr()
    return code, out, err


SMALL = "--batch-size 3 --queue-size 5 --long-tokens 6 --short-tokens 3 --rounds 1 --device cpu"


def test_the_command_says_what_the_machine_allows_before_it_measures(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before: list[str] = []

    def listening(*args: Any, **options: Any) -> Recording:
        before.append(capsys.readouterr().out)
        return observe(*args, **options)

    monkeypatch.setattr(serving, "observe", listening)
    folder = tmp_path / "ladder"
    words = [*SMALL.split(), "--model", str(checkpoint), "--output", str(folder)]
    code, out, _ = said([*words, "--rungs", "notebook,lean"], monkeypatch, capsys)
    assert code == 0
    assert before[0].startswith("What this machine allows\n")
    assert "lean" in out
    assert "Again: batchbench ladder --batch-size 3" in out
    assert out.rstrip().endswith("with ladder.json, ladder.png")
    code, _, err = said(words, monkeypatch, capsys)
    assert (code, "holds a result" in err) == (2, True)


def test_json_stands_alone_and_quiet_is_a_sentence(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*SMALL.split(), "--model", str(checkpoint), "--rungs", "lean"]
    code, out, _ = said([*words, "--json", "--output", "a"], monkeypatch, capsys)
    assert code == 0
    assert json.loads(out)["rungs"][0]["name"] == "lean"
    code, out, err = said([*words, "--quiet", "--output", "b"], monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert out.startswith("lean serves ")
    assert len(out.splitlines()) == 1


def test_what_is_finished_is_written_before_a_failure_is_told(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failing: Break,
) -> None:
    failing("serving", 5, RuntimeError("device lost"))
    folder = tmp_path / "ladder"
    words = [*SMALL.split(), "--rounds", "3", "--model", str(checkpoint), "--output", str(folder)]
    code, out, err = said([*words, "--rungs", "notebook,lean"], monkeypatch, capsys)
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith(
        "batchbench: --rungs notebook: device lost; remove it; the results before"
    )
    assert last.endswith(str(folder))
    found = json.loads((folder / "ladder.json").read_text())
    assert found["validity"]["status"] == "suspect"
    assert {rung["name"] for rung in found["rungs"]} <= {"notebook", "lean"}
    assert "run suspect" in out


def test_wrong_tokens_are_exit_code_1(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = Verification(5, 4, 0, 1, "r", 1.0, ())
    monkeypatch.setattr(run, "verify", lambda *asked: wrong)
    monkeypatch.setattr(report, "_first_fault", lambda result: "why")
    words = [*SMALL.split(), "--model", str(checkpoint), "--rungs", "lean"]
    code, out, _ = said([*words, "--quiet", "--output", str(tmp_path / "a")], monkeypatch, capsys)
    assert code == 1
    assert "WRONG tokens on lean: why" in out
    assert (tmp_path / "a" / "ladder.json").exists()


def test_a_wrong_rung_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["--rungs", "top"], ["--model", "./absent"], ["--rounds", "0"]):
        code, out, err = said(words, monkeypatch, capsys)
        assert (code, out) == (2, "")
        assert words[0] in err
        assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_left_able_to_be_verified(tiny: LoadedModel) -> None:
    """Every rung sets the attention that it needs; the reference sets its own again."""
    from batchbench.batching.engines.torch.reference import TeacherForced

    tiny.module.set_attn_implementation("eager")
    TeacherForced(tiny)
    assert tiny.module.config._attn_implementation == "sdpa"
    assert torch.is_grad_enabled()
