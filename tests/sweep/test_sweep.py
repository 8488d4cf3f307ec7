"""Sweeps: grids, cells that are kept, the table, and what is drawn of it."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support.laws import law
from support.program import Call, call

from batchbench.batching.experiment import PARTS, Experiment
from batchbench.batching.models import ModelCache
from batchbench.batching.presets import Basis
from batchbench.batching.progress import Watch
from batchbench.batching.session import Outcome, Stop, StopReason, conduct
from batchbench.batching.verification import Verification
from batchbench.cli.studies import SweepSpec
from batchbench.errors import Interrupted, UsageError
from batchbench.reports import metrics
from batchbench.reports.result import make_result
from batchbench.reports.slo import GoalsSpec
from batchbench.reports.text import spell_option
from batchbench.studies.sweep import report as screen
from batchbench.studies.sweep import run as sweeps
from batchbench.studies.sweep.figures import PICTURES, beats_all, draw_sweep
from batchbench.studies.sweep.grid import Grid, digest_of, parse_numbers
from batchbench.studies.sweep.report import cells_of, read_sweep, write_sweep
from batchbench.studies.sweep.run import Pace, Store, SweepWatch, lines_of, run_cells
from batchbench.studies.sweep.table import Cells, table_of, to_csv

ROOT = Path(__file__).parents[2]

AXES: dict[str, tuple[Any, ...]] = {"batch_size": (2, 4), "long_every": (2, 3), "queue_size": (12,)}


def grid_of(**axes: Any) -> Grid:
    """A simulated grid, small unless said otherwise."""
    return Grid({**AXES, **axes}, simulated=True)


class Counting:
    """Serves as ``conduct`` does, and counts; breaks off before the ``stop``-th cell."""

    def __init__(self, stop: int | None = None, error: type[BaseException] = KeyboardInterrupt):
        self.served: list[Experiment] = []
        self._stop, self._error = stop, error

    def __call__(self, experiment: Experiment, watch: Watch, models: ModelCache) -> Outcome:
        if len(self.served) == self._stop:
            raise self._error
        self.served.append(experiment)
        return conduct(experiment, watch, models)


def swept(folder: Path, grid: Grid, serve: Callable[..., Outcome] = conduct) -> bytes:
    """The table of a sweep, run to its end."""
    store = Store(folder)
    run_cells(grid, store, serve=serve)
    return to_csv(table_of(read_sweep(grid, store, GoalsSpec()).rows))


# Numbers


@law
@given(
    st.integers(-40, 40), st.integers(-40, 40), st.sampled_from((1, 2, 3, 7, 10)), st.integers(0, 2)
)
def test_a_range_is_all_that_its_step_reaches_and_the_stop_if_hit(
    start: int, stop: int, step: int, digits: int
) -> None:
    scale = 10**digits
    up = 1 if stop >= start else -1
    text = ":".join(f"{Decimal(n).scaleb(-digits):f}" for n in (start, stop, up * step))
    expected = [float(Fraction(n, scale)) for n in range(start, stop + up, up * step)]
    assert parse_numbers(text, float, "--x") == expected


@law
@given(st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=9))
def test_a_list_is_its_numbers_in_order(numbers: list[int]) -> None:
    assert parse_numbers(",".join(map(str, numbers)), int, "--x") == numbers


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be a number"),
        ("1,,2", "must be a number"),
        ("1:2:3:4", "or start:stop:step (1:16:5 is 1, 6, 11, 16)"),
        ("1:4:0", "does not lead from 1 to 4"),
        ("4:1:1", "a step of 1 does not lead from 4 to 1"),
        ("1.5", "must be a whole number"),
        ("nan", "must be a number"),
        ("1:1e9:1", "more than 10,000 values"),
    ],
)
def test_what_is_no_number_is_named_with_its_option(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=r"^--batch-size ") as found:
        parse_numbers(text, int, "--batch-size")
    assert said in str(found.value)


def test_a_range_without_a_step_counts_by_one() -> None:
    assert parse_numbers("1:3,7", int, "--x") == [1, 2, 3, 7]


# Grids


def test_a_grid_is_every_combination_once_the_last_option_fastest() -> None:
    grid = grid_of(batch_size=(4, 1, 2), long_every=(5, 3))
    chosen = [(c.chosen["batch_size"], c.chosen["long_every"]) for c in grid.cells]
    assert chosen == [(4, 5), (4, 3), (1, 5), (1, 3), (2, 5), (2, 3)]
    assert len({cell.digest for cell in grid.cells}) == 6
    assert grid.varying == ("batch_size", "long_every")


def test_a_value_that_nothing_goes_with_is_an_error_and_a_bad_pair_a_cell() -> None:
    with pytest.raises(UsageError, match=r"^--batch-size 0: must be at least 1$"):
        grid_of(batch_size=(4, 0))
    with pytest.raises(
        UsageError, match=r"^--strategy statik: no such strategy; did you mean static\?"
    ):
        grid_of(strategy=("static", "statik,continuous"))
    # Three tokens a pass go with two slots and not with four.
    grid = grid_of(prefill=("mixed",), max_batched_tokens=(3, 64))
    faulty = [dict(cell.chosen) for cell in grid.cells if cell.fault is not None]
    assert [(c["batch_size"], c["max_batched_tokens"]) for c in faulty] == [(4, 3), (4, 3)]
    with pytest.raises(UsageError, match="must be above the batch size"):
        grid_of(prefill=("mixed",), batch_size=(4,), max_batched_tokens=(3, 4))


def test_a_grid_of_too_many_cells_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="1,000,000 cells"):
        Grid({"seed": tuple(range(1000)), "queue_size": tuple(range(1, 1001))}, simulated=True)


def test_presets_and_files_are_axes_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("queue_size = 5\n")
    grid = Grid({"preset": ("notebook", "chat"), "workload": (file,), "batch_size": (2,)})
    sizes = [
        (c.experiment.preset, c.experiment.workload.queue_size) for c in grid.cells if c.experiment
    ]
    assert sizes == [("notebook", 5), ("chat", 5)]


# Digests


def test_every_setting_changes_the_digest() -> None:
    usual = digest_of(Experiment())
    assert digest_of(Experiment()) == usual
    others = [
        Experiment.of({"batch_size": 9}),
        Experiment.of({"seed": 1}),
        Experiment.of({"dtype": "float32"}),
        Experiment.of({"verify": "none"}),
        Experiment.of({}, simulated=True),
        Experiment.of({}, preset="chat"),
    ]
    assert len({usual, *map(digest_of, others)}) == len(others) + 1


def test_files_count_with_their_content_and_policies_with_their_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    prompts, lengths, policy = (
        Path(n) for n in ("prompts.txt", "lengths.txt", "my_sweep_policy.py")
    )
    source = "from batchbench.batching.policies import Continuous\nclass Mine(Continuous): pass\n"
    for file, text in ((prompts, "one\n"), (lengths, "3\n"), (policy, source)):
        file.write_text(text)
    asked = Experiment.of(
        {
            "prompts": prompts,
            "output_tokens": "empirical:lengths.txt",
            "strategy": "my_sweep_policy:Mine",
        }
    )
    seen = {digest_of(asked)}
    for file, text in ((prompts, "two\n"), (lengths, "4\n"), (policy, source + "# other\n")):
        file.write_text(text)
        seen.add(digest_of(asked))
    assert len(seen) == 4


def test_a_model_in_a_folder_counts_with_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    asked = Experiment.of({"model": str(tmp_path)})
    before = digest_of(asked)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert digest_of(asked) != before


# What is kept


def test_a_cell_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    cell = grid_of().cells[0]
    assert cell.experiment is not None
    result = make_result(conduct(cell.experiment))
    store = Store(tmp_path)
    assert not store.holds(cell)
    store.keep_files(cell, sweeps.files_of(result))
    assert store.holds(cell)
    assert store.load(cell).data == json.loads(json.dumps(result.data))
    assert len(store) == 1
    names = sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file())
    folder = f"cells/{cell.digest}"
    assert names == [
        f"{folder}/recordings/0-0.npz",
        f"{folder}/recordings/1-0.npz",
        f"{folder}/result.json",
    ]


def test_a_cell_that_a_killed_sweep_left_half_written_is_removed(tmp_path: Path) -> None:
    half = tmp_path / "cells" / ".writing-1"
    half.mkdir(parents=True)
    (half / "result.json").write_text("{", encoding="utf-8")
    assert len(Store(tmp_path)) == 0
    Store(tmp_path).tidy()
    assert [f.name for f in tmp_path.rglob("*")] == ["cells"]


def test_a_spoiled_cell_is_named(tmp_path: Path) -> None:
    grid = grid_of()
    swept(tmp_path, grid)
    place = Store(tmp_path).place(grid.cells[1])
    (place / "result.json").write_text("{")
    with pytest.raises(UsageError, match=f"remove {place}"):
        swept(tmp_path, grid)


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UsageError, match="cannot be written: no space left on device"):
        swept(tmp_path, grid_of())


# Going on


def test_what_is_finished_is_never_served_again(tmp_path: Path) -> None:
    first, second, larger = Counting(), Counting(), Counting()
    table = swept(tmp_path, grid_of(), first)
    assert len(first.served) == 4
    assert swept(tmp_path, grid_of(), second) == table
    assert second.served == []
    swept(tmp_path, grid_of(batch_size=(2, 4, 8)), larger)
    assert [e.serving.batch_size for e in larger.served] == [8, 8]
    # Another grid's cells stay, and are in no table.
    store = Store(tmp_path)
    result = read_sweep(grid_of(), store, GoalsSpec())
    assert (len(result.rows), result.others) == (8, 2)


@pytest.mark.parametrize("stop", range(4))
def test_interrupted_anywhere_it_goes_on_where_it_was(stop: int, tmp_path: Path) -> None:
    alone = swept(tmp_path / "alone", grid_of())
    with pytest.raises(Interrupted, match=f"{stop} of 4 cells are kept") as found:
        swept(tmp_path / "broken", grid_of(), Counting(stop))
    assert found.value.exit_code == 130
    assert len(Store(tmp_path / "broken")) == stop
    again = Counting()
    assert swept(tmp_path / "broken", grid_of(), again) == alone
    assert len(again.served) == 4 - stop


def test_half_a_cell_is_not_kept(tmp_path: Path) -> None:
    """Ctrl-C within a cell keeps its finished pairs of a run; of a sweep they would be a lie."""

    def cut(experiment: Experiment, watch: Watch, models: ModelCache) -> Outcome:
        return replace(
            conduct(experiment, watch, models), stopped=Stop(StopReason.INTERRUPTED, "interrupted")
        )

    with pytest.raises(Interrupted):
        swept(tmp_path, grid_of(), cut)
    assert len(Store(tmp_path)) == 0


def test_a_sweep_killed_at_random_moments_ends_with_the_same_table() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "sweep_kill.py", "--kills", "5"],
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("same table, no cell repeated, no file torn\n")
    assert done.stdout.startswith("undisturbed: 24 cells")


# What cannot be served


def test_a_cell_that_cannot_be_served_does_not_lose_the_others(tmp_path: Path) -> None:
    grid = grid_of(long_tokens=(5, 5000))
    counting = Counting()
    swept(tmp_path, grid, counting)
    store = Store(tmp_path)
    result = read_sweep(grid, store, GoalsSpec())
    assert len(counting.served) == 8
    assert (len(result.served), len(result.failed), len(result.rows)) == (4, 4, 8)
    assert all("exceed the 1024 that gpt2 takes" in str(f.reason) for f in result.failed)
    again = Counting()
    swept(tmp_path, grid, again)
    assert again.served == []
    store = Store(tmp_path)
    for cell in grid.cells:
        store.forget_failure(cell)
    swept(tmp_path, grid, again)
    assert len(again.served) == 4


@pytest.mark.parametrize("error", [MemoryError, type("OutOfMemoryError", (RuntimeError,), {})])
def test_a_batch_that_does_not_fit_is_a_failed_cell(error: type[Exception], tmp_path: Path) -> None:
    swept(tmp_path, grid_of(), Counting(3, error))
    store = Store(tmp_path)
    (failed,) = read_sweep(grid_of(), store, GoalsSpec()).failed
    assert failed.reason == "it ran out of memory; lower --batch-size or the lengths of requests"


def test_a_fault_of_ours_is_no_failed_cell(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        swept(tmp_path, grid_of(), Counting(3, RuntimeError))
    assert len(Store(tmp_path)) == 3


# The table


def test_the_table_is_what_the_cells_give_alone(tmp_path: Path) -> None:
    grid = grid_of(strategy=("static,continuous", "continuous"))
    frame = pd.read_csv(io.BytesIO(swept(tmp_path, grid)))
    rows = iter(frame.to_dict("records"))
    for cell in grid.cells:
        assert cell.experiment is not None
        for name, (recording,) in conduct(cell.experiment).recordings.items():
            row = next(rows)
            asked = {**metrics.summary([recording]), **metrics.counters(recording)}
            assert {k: None if pd.isna(v) else v for k, v in row.items() if k in asked} == asked
            assert (row["strategy"], row["trial"]) == (name, 0)
            assert row["cell"] == cell.digest or int(row["cell"]) == int(cell.digest)
            for option, value in cell.chosen.items():
                assert row["strategies" if option == "strategy" else option] == value
    assert next(rows, None) is None


def test_columns_are_the_options_then_strategy_and_trial_then_what_was_found(
    tmp_path: Path,
) -> None:
    names = list(pd.read_csv(io.BytesIO(swept(tmp_path, grid_of()))))
    own = (spec for part, spec in PARTS.items() if part != "target")  # a target would add its own
    options = [name for spec in own for name in spec.__dataclass_fields__]
    before = names[: names.index("strategy")]
    assert set(before) == {"cell", "preset", "slo", "price_per_hour", "strategies"} | set(
        options
    ) - {"strategy"}
    assert names[names.index("strategy") + 1] == "trial"
    assert {"output_throughput", "p99_ttft_ms", "forward_passes", "validity"} <= set(
        names[names.index("trial") :]
    )


def test_defaults_that_follow_others_are_told(tmp_path: Path) -> None:
    grid = Grid({"batch_size": (2, 4)}, simulated=True)
    frame = pd.read_csv(io.BytesIO(swept(tmp_path, grid)))
    assert frame["queue_size"].unique().tolist() == [32]
    assert frame["long_every"].tolist() == [2, 2, 4, 4]
    assert frame["long_tokens"].unique().tolist() == [100]
    store = Store(tmp_path)
    cells = cells_of(read_sweep(grid, store, GoalsSpec()))
    assert cells is not None
    assert cells.share_follows


def test_goals_are_held_against_kept_cells_without_serving_them(tmp_path: Path) -> None:
    grid = grid_of(request_rate=(50.0,))
    swept(tmp_path, grid)
    store = Store(tmp_path)
    for limit in (1, 10**6):
        rows = read_sweep(grid, store, GoalsSpec(slo=(f"e2el:{limit}",))).rows
        assert {row["slo_attainment"] for row in rows} == {0.0 if limit == 1 else 1.0}


def test_whole_numbers_stay_whole_beside_nothing() -> None:
    text = to_csv(table_of([{"a": 1, "b": 2.5, "c": True}, {"a": None, "b": None, "c": False}]))
    assert text == b"a,b,c\n1,2.5,True\n,,False\n"


# One load a model


def test_a_model_is_loaded_once_and_another_number_format_is_another(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from batchbench.batching.models import loading

    loads = []
    load = loading.load_model

    def counted(source: Any, spec: Any, seed: int) -> Any:
        loads.append(spec.dtype)
        return load(source, spec, seed)

    monkeypatch.setattr(loading, "load_model", counted)
    grid = Grid(
        {
            "batch_size": (2, 3),
            "queue_size": (5,),
            "long_tokens": (4,),
            "short_tokens": (2,),
            "model": (str(checkpoint),),
            "dtype": ("float32", "bfloat16"),
            "device": ("cpu",),
            "threads": (1,),
            "trials": (1,),
        }
    )
    swept(tmp_path, grid)
    assert loads == ["float32", "bfloat16"]
    store = Store(tmp_path)
    result = read_sweep(grid, store, GoalsSpec())
    assert [f.data["verification"]["requests_checked"] for f in result.served if f.data] == [5] * 4
    assert result.wrong == 0
    assert len(result.machines) == 1


# Progress


def test_time_left_goes_by_the_work_that_is_left() -> None:
    pace = Pace({"a": 10.0, "b": 30.0, "c": 60.0})
    assert pace.left_s() is None
    pace.done("a", 5.0)
    assert pace.left_s() == pytest.approx(45)
    pace.done("b", 15.0)
    pace.done("c", 30.0)
    assert pace.left_s() == 0


def test_a_watch_hears_of_every_cell(tmp_path: Path) -> None:
    heard: list[tuple[str, int]] = []

    class Listening(SweepWatch):
        def cells_begin(self, cells: int, kept: int) -> None:
            heard.append(("of", cells - kept))

        def cell_begins(self, number: int, cells: int, cell: Any) -> None:
            heard.append(("begins", number))

        def cell_ends(self, cell: Any, reason: str | None, left_s: float | None) -> None:
            heard.append(("ends", 0 if left_s else 1))

    store = Store(tmp_path)
    store.keep_failure(grid_of().cells[0], "made up")
    run_cells(grid_of(), store, Listening())
    ends = [("begins", 2), ("ends", 0), ("begins", 3), ("ends", 0), ("begins", 4), ("ends", 1)]
    assert heard == [("of", 3), *ends]


# Pictures


def cells_for(tmp_path: Path, **axes: tuple[Any, ...]) -> Cells:
    """The table of a small simulated sweep."""
    grid = Grid({"queue_size": (24,), **axes}, simulated=True)
    swept(tmp_path, grid)
    store = Store(tmp_path)
    cells = cells_of(read_sweep(grid, store, GoalsSpec()))
    assert cells is not None
    return cells


@pytest.mark.parametrize(
    ("axes", "drawn"),
    [
        ({"batch_size": (2, 4), "long_every": (2, 4)}, {"throughput", "speedup", "frontier"}),
        ({"request_rate": (20.0, 80.0)}, {"latency", "frontier"}),
        ({"max_concurrency": (2, 6)}, {"latency", "frontier"}),
        ({"long_every": (2, 8), "strategy": ("continuous",)}, set()),
        ({"short_tokens": (2, 8)}, set()),
    ],
)
def test_only_what_the_grid_has_axes_for_is_drawn_and_the_rest_says_why(
    axes: dict[str, tuple[Any, ...]], drawn: set[str], tmp_path: Path
) -> None:
    figures, missing = draw_sweep(cells_for(tmp_path, **axes))
    assert set(figures) == drawn
    assert set(missing) == set(PICTURES) - drawn
    assert all(why.startswith("needs ") for why in missing.values())


def test_lines_are_the_tables_medians(tmp_path: Path) -> None:
    cells = cells_for(tmp_path, batch_size=(1, 2, 4), long_every=(4,))
    figures, _ = draw_sweep(cells)
    for i, name in enumerate(cells.strategies):
        (line,) = figures["throughput"].findobj(
            lambda a, i=i: a.get_gid() == f"output_throughput-{i}"
        )
        rows = cells.frame[cells.frame["strategy"] == name].sort_values("batch_size")
        assert line.get_xdata().tolist() == [1, 2, 4]
        assert line.get_ydata() == pytest.approx(rows["output_throughput"] / 1000)


@law
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=9))
def test_the_frontier_is_what_no_other_beats(points: list[tuple[int, int]]) -> None:
    rows = pd.DataFrame(points, columns=["latency", "output_throughput"], dtype=float)
    kept = beats_all(rows, "latency")
    for i, (x, y) in enumerate(points):
        beaten = any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)
        first = points.index((x, y)) == i
        assert kept[i] == (not beaten and first)


def test_flags_and_numbers_are_spelled() -> None:
    assert spell_option("stop_at_eos", True) == "stop at eos"
    assert spell_option("stop_at_eos", np.False_) == "not stop at eos"
    assert spell_option("batch_size", np.int64(2048)) == "batch size 2,048"
    assert spell_option("max_concurrency", float("nan")) == "max concurrency –"


def test_pictures_of_another_grid_do_not_stay(tmp_path: Path) -> None:
    for axes, names in (
        ({"batch_size": (2, 4)}, {"throughput", "frontier"}),
        ({"request_rate": (50.0, 90.0), "batch_size": (2,)}, {"latency", "frontier"}),
    ):
        grid = Grid({"queue_size": (12,), **axes}, simulated=True)
        swept(tmp_path, grid)
        store = Store(tmp_path)
        write_sweep(tmp_path, read_sweep(grid, store, GoalsSpec()), "batchbench sweep")
        assert {f.stem for f in tmp_path.glob("*.png")} == names
        assert {f.stem for f in tmp_path.glob("*.svg")} == names
    assert [f.name for f in tmp_path.rglob("*.csv")] == ["sweep.csv"]


# The program

program = call  # the fixture


SMALL = ("sweep", "--simulated", "--queue-size", "12", "--batch-size", "2,4")


def test_a_sweep_says_what_came_of_it_and_goes_on(program: Call, tmp_path: Path) -> None:
    code, out, err = program(*SMALL, "--long-every", "2:6:2", "--output", "s")
    assert code == 0
    assert out.startswith("in simulation, where every step costs the same, continuous batching is")
    assert "over 6" in out
    assert "sweep.csv, throughput.png, speedup.png, frontier.png" in " ".join(out.split())
    assert all(len(line) <= 80 for line in out.split("Again:")[0].splitlines())
    assert len(err.splitlines()) == 6
    assert "left" in err
    (again,) = [line for line in out.splitlines() if line.startswith("Again: ")]
    code, second, err = program(*shlex.split(again)[2:])
    assert (code, second) == (0, out)
    assert err == "6 of 6 cells are finished already; nothing to run\n"
    told = json.loads((tmp_path / "s" / "sweep.json").read_text(encoding="utf-8"))
    assert [cell["status"] for cell in told["cells"]] == ["done"] * 6
    assert told["axes"] == {
        "queue_size": [12],
        "batch_size": [2, 4],
        "long_every": [2, 4, 6],
    } or set(told["axes"]) == {"queue_size", "batch_size", "long_every"}
    assert set(told["pictures_not_drawn"]) == {"latency"}


def test_the_same_command_finds_its_own_folder(program: Call, tmp_path: Path) -> None:
    assert program(*SMALL, "--quiet")[0] == 0
    assert program(*SMALL, "--quiet")[0] == 0
    assert program(*SMALL, "--long-every", "3", "--quiet")[0] == 0
    assert len(list((tmp_path / "batchbench-results").glob("sweep-*"))) == 2


def test_json_is_all_that_is_printed(program: Call, tmp_path: Path) -> None:
    code, out, _ = program(*SMALL, "--json", "--output", "s")
    assert code == 0
    assert out == (tmp_path / "s" / "sweep.json").read_text(encoding="utf-8")


def test_failed_cells_are_shown_and_end_with_1(program: Call, tmp_path: Path) -> None:
    code, out, err = program(*SMALL, "--long-tokens", "5,5000", "--output", "s")
    assert code == 1
    assert "2 of 4 cells could not be served" in " ".join(out.split())
    assert "failed: long tokens 5,000, batch size 2: request 0: 7 prompt + 5000" in " ".join(
        out.split()
    )
    assert err.count(": failed: request 0") == 2
    assert (
        program(*SMALL, "--long-tokens", "5,5000", "--output", "s", "--retry-failed")[2].count(
            "failed:"
        )
        == 2
    )
    told = json.loads((tmp_path / "s" / "sweep.json").read_text(encoding="utf-8"))
    assert [c["status"] for c in told["cells"]].count("failed") == 2


def test_no_cell_at_all_ends_with_2(program: Call) -> None:
    code, _, err = program(*SMALL, "--long-tokens", "5000,6000", "--output", "s")
    assert code == 2
    assert err.splitlines()[-1].startswith(
        "batchbench: no cell could be served: request 0: 7 prompt"
    )


def test_wrong_outputs_end_with_1(program: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(experiment: Experiment, watch: Watch, models: ModelCache) -> Outcome:
        return replace(
            conduct(experiment, watch, models),
            verification=Verification(12, 11, 0, 1, "made up", None, ()),
        )

    monkeypatch.setattr(sweeps.run_cells, "__defaults__", (None, wrong))
    code, out, _ = program(*SMALL, "--output", "s")
    assert code == 1
    assert "2 requests got WRONG tokens" in " ".join(out.split())


def test_ctrl_c_says_how_to_go_on(program: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps.run_cells, "__defaults__", (None, Counting(1)))
    code, out, err = program(*SMALL, "--output", "s")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == (
        "batchbench: interrupted; 1 of 2 cells are kept in s: the same command continues from there"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--batch-size", "1,x"), "--batch-size 1,x: must be a number (8), a list (1,2,4)"),
        (("--batch-size", "0,2"), "--batch-size 0: must be at least 1"),
        (("--dtype", "float33"), "--dtype float33: must be one of"),
        (("--slo", "ttft"), "--slo ttft: must be one of"),
        (("--preset", "none-such"), "--preset none-such: must be one of"),
    ],
)
def test_a_bad_option_is_one_line_and_leaves_nothing(
    words: tuple[str, ...], said: str, program: Call, tmp_path: Path
) -> None:
    code, out, err = program("sweep", "--simulated", *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"batchbench: {said}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_lists_the_cells_and_their_steps(program: Call, tmp_path: Path) -> None:
    code, out, _ = program(*SMALL, "--long-tokens", "5,5000", "--strategy", "static", "--dry-run")
    assert code == 0
    first, *_, last = out.splitlines()
    assert first == "1  long tokens 5, batch size 2: static 60 forward passes"
    assert last.startswith("4 cells, 2 of them cannot be served; ")
    assert "exceed the 1024" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        "--batch-size 1,2,4 --request-rate 0.5:2:0.5 --simulated",
        "--stop-at-eos --no-stop-at-eos --dtype float32 --dtype bfloat16 --trials 2",
        "--strategy static,continuous --strategy continuous --preset chat --preset code",
    ],
)
def test_the_command_that_is_told_asks_for_the_same_grid(
    words: str, program: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids: list[Grid] = []
    monkeypatch.setattr(sweeps, "lines_of", lambda grid: grids.append(grid) or [])
    program("sweep", *words.split(), "--dry-run")
    program(*shlex.split(grids[0].command("--dry-run"))[1:])
    assert grids[0] == grids[1]
    assert grids[0].digest == grids[1].digest


def test_help_tells_every_option_of_run_once(program: Call) -> None:
    text = program("sweep", "--help-all")[1]
    for spec in (Basis, *PARTS.values(), GoalsSpec, SweepSpec):
        for name in spec.__dataclass_fields__:
            option = "--" + name.replace("_", "-")
            assert f"│ {option} " in text, option


def test_the_listing_sums_all_trials() -> None:
    lines = list(lines_of(Grid({"batch_size": (2, 4), "trials": (3,)}, simulated=True)))
    assert lines[0].endswith(" × 3 trials")
    assert lines[-1].startswith("2 cells; ")


def test_a_long_table_is_cut_and_says_so(tmp_path: Path) -> None:
    grid = Grid({"queue_size": (1,), "seed": tuple(range(41))}, simulated=True)
    swept(tmp_path, grid)
    store = Store(tmp_path)
    result = read_sweep(grid, store, GoalsSpec())
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(screen.table(cells_of(result)))  # type: ignore[arg-type]
    text = console.export_text()
    assert "the first 40 of 41 cells; sweep.csv has all" in " ".join(text.split())
    assert text.count("│") < 41 * 8


def test_a_cell_that_somebody_removed_is_named(tmp_path: Path) -> None:
    grid = Grid({"batch_size": (2, 4)}, simulated=True)
    swept(tmp_path, grid)
    gone = grid.cells[1]
    shutil.rmtree(Store(tmp_path).place(gone))
    with pytest.raises(UsageError, match=f"cell {gone.digest} is missing; run the sweep again"):
        read_sweep(grid, Store(tmp_path), GoalsSpec())
