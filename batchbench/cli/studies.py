"""The commands sweep, capacity and ladder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import typer

from batchbench.batching.experiment import Experiment, TrialsSpec, make_experiment
from batchbench.cli.options import (
    EXPERIMENT,
    OutputSpec,
    Spec,
    folder_setting,
    typed_command,
    with_options,
)
from batchbench.cli.output import echo, output_folder, show
from batchbench.errors import BatchbenchError, Interrupted, UsageError, shown
from batchbench.files import default_folders, undisturbed, write_whole
from batchbench.json_file import json_text, parse_json
from batchbench.reports.slo import GoalsSpec
from batchbench.settings import setting
from batchbench.studies.executors.jobs import Job, run_parts
from batchbench.studies.executors.spec import ExecutorSpec, clients_of, make_executor
from batchbench.studies.ladder.rungs import LadderSpec, choose_rungs
from batchbench.studies.sweep.grid import SWEPT, Grid

SWEEP_HELP = (
    "Run a grid of experiments: any option of run may have many values.\n\n"
    "Give numbers as lists or as ranges that include their stop (--batch-size 1,2,4,8 --queue-size "
    "16:64:16), flags as --flag --no-flag, and repeat other options (--dtype float32 --dtype "
    "bfloat16). --strategy names the strategies that run side by side in each cell. Finished cells "
    "are kept, so the same command continues where it stopped.\n\n"
    "Example: batchbench sweep --batch-size 1,2,4,8,16,32 --long-every 8 --simulated"
)


@dataclass(frozen=True)
class SweepSpec(Spec):
    """Options of ``sweep`` itself."""

    simulated: bool = setting(
        False, "Serve on a virtual clock, as simulate does, with one trial per cell.", "Sweep"
    )
    retry_failed: bool = setting(
        False, "Retry cells that failed, such as a batch that did not fit into memory.", "Sweep"
    )
    dry_run: bool = setting(
        False, "List the cells with their forward passes; run nothing.", "Sweep"
    )
    output: Path | None = folder_setting(
        "sweep.csv, sweep.json, pictures and the finished cells",
        "batchbench-results/sweep-<digest of the grid>",
    )
    json: bool = setting(False, "Print only sweep.json.", "Output")
    quiet: bool = setting(False, "Print only a one-line summary; no progress.", "Output")


@with_options(swept=SWEPT.values())
def sweep(
    axes: Mapping[str, tuple[Any, ...]], goals: GoalsSpec, study: SweepSpec, machines: ExecutorSpec
) -> None:
    from batchbench.batching.session import conduct
    from batchbench.cli.progress import make_display
    from batchbench.studies.sweep.run import Store, ask_servers, lines_of, run_cells

    grid = Grid(axes, study.simulated)
    if study.dry_run:
        for line in lines_of(grid):
            echo(line)
        return
    grid = replace(grid, servers=ask_servers(grid))
    place = study.output or Path("batchbench-results") / f"sweep-{grid.digest}"
    lost = "the same command continues from the cells that are kept"
    with output_folder(place, lost=lost) as folder:
        store = Store(folder)
        for cell in grid.cells if study.retry_failed else ():
            store.forget_failure(cell)
        price = goals.price_per_hour
        with make_display(quiet=study.quiet, varying=grid.varying, price_per_hour=price) as display:
            asked = store.unfinished(grid)
            kept = store.machine(grid) if asked and machines.executor != "local" else None
            if any(e.target is not None and e.target.clients > 1 for e in asked):
                with clients_of(machines, asked, folder, display) as start:
                    run_cells(grid, store, display, partial(conduct, start=start))
            else:
                with closing(make_executor(machines, asked, folder, display, kept)) as executor:
                    run_cells(grid, store, display, executor=executor)
        from batchbench.studies.sweep import report  # pandas and matplotlib, only now

        swept = report.read_sweep(grid, store, goals)
        command = typed_command(keep=["output"])
        files, text, not_drawn = report.write_sweep(folder, swept, command)
        cells = report.cells_of(swept)
        rendered = report.render(swept, cells, not_drawn)
        show(study, text, report.sentence(swept, cells), rendered, command, files)
        if not swept.served:
            raise UsageError(f"no cell could be served: {swept.failed[0].reason}")
        if swept.failed or swept.wrong or swept.broken:
            raise typer.Exit(1)


CAPACITY_HELP = (
    "Find the highest request rate that each strategy sustains within --slo.\n\n"
    "A rate is sustained if enough requests meet all limits and the queue does not grow. The "
    "search doubles the rate until it is not sustained, then bisects. It repeats each rate until "
    "the trials give a clear answer."
    "\n\nExample: batchbench capacity --slo ttft:500 --slo tpot:50"
)

ALLOWED_MISSES = 5
"""Minimum number of requests that may miss a limit in a trial; with fewer, chance decides."""

FEWEST, MOST = 100, 10_000


@dataclass(frozen=True)
class CapacitySpec(Spec):
    """The requirements on a sustained rate, and the precision of the search."""

    slo_attainment: float = setting(
        0.95,
        "Share of the requests that must meet all limits.",
        "Capacity",
        min=0.01,
        max=0.9999,
        unit="share",
    )
    precision: float = setting(
        0.05,
        "Largest gap between the highest sustained and the lowest unsustained rate, as a share.",
        "Capacity",
        min=0.0001,
        max=1.0,
        unit="share",
    )
    max_trials: int = setting(
        8,
        "Maximum number of trials per rate, each with different arrivals; a single trial gives no "
        "interval.",
        "Capacity",
        min=1,
        max=1000,
    )
    simulated: bool = setting(False, "Serve on a virtual clock, as simulate does.", "Capacity")
    output: Path | None = folder_setting(
        "capacity.json and the picture", "batchbench-results/<time>-<model>-capacity"
    )
    overwrite: bool = setting(False, "Replace a result in the folder.", "Output")
    json: bool = setting(False, "Print only capacity.json.", "Output")
    quiet: bool = setting(False, "Print only a one-line summary; no progress.", "Output")


@with_options(
    SWEPT.values(), omit=("request_rate", "max_concurrency", "speed", "trials", "max_time")
)
def capacity(
    given: Mapping[str, Any], goals: GoalsSpec, study: CapacitySpec, machines: ExecutorSpec
) -> None:
    experiment = _without_rate(given, study)
    if not goals.slo:
        raise UsageError("--slo: give one or more latency limits, such as --slo ttft:500")
    with output_folder(
        study.output,
        default_folders(experiment.subject, "capacity"),
        overwrite=study.overwrite,
        marker="capacity.json",
    ) as folder:
        from batchbench.cli.progress import make_display
        from batchbench.studies.capacity.search import (
            CapacityQuery,
            find_capacity,
            find_capacity_on,
        )

        query = CapacityQuery(goals, study.slo_attainment, study.max_trials, study.precision)
        together = experiment.target is not None and experiment.target.clients > 1
        with make_display(quiet=study.quiet) as display:
            if machines.executor == "local" or together:
                with clients_of(machines, [experiment], folder, display) as start:
                    findings = find_capacity(experiment, query, display, start)
            else:
                with closing(make_executor(machines, [experiment], folder, display)) as executor:
                    findings = find_capacity_on(executor, experiment, query, display)
        from batchbench.studies.capacity import report

        command = typed_command()
        with undisturbed():  # the search is complete: keep it
            data = report.data_of(findings, command)
            files = report.write_capacity(folder, data)
        text, rendered = json_text(data), report.render(data)
        show(study, text, report.sentence(data), rendered, command, files)
        if findings.verification.wrong:
            raise typer.Exit(1)


def _without_rate(given: Mapping[str, Any], study: CapacitySpec) -> Experiment:
    """Return the experiment, at a rate that the search replaces."""
    process = str(given.get("arrivals", "poisson"))
    if process.partition(":")[0] in ("at-once", "trace", "ramp"):
        raise UsageError(
            f"--arrivals {shown(process)}: has no rate to search for; use poisson, gamma or "
            "constant"
        )
    enough = math.ceil(ALLOWED_MISSES / (1 - study.slo_attainment)) * (10 if study.simulated else 1)
    sizes = {} if "trace" in given else {"queue_size": min(max(enough, FEWEST), MOST)}
    experiment = make_experiment({**sizes, "request_rate": 1.0, **given}, simulated=study.simulated)
    # A file or a preset may limit concurrency, which would hide a growing queue.
    return replace(experiment, workload=replace(experiment.workload, max_concurrency=None))


LADDER_HELP = """Compare engines, from the notebook's loop to the limits of this hardware.

All engines serve the same workload in turn. Each differs from an earlier one by a single change.

Example: batchbench ladder --rungs notebook,generate_batch,packed"""

_DECIDED = (
    *("strategy", "engine", "max_wait", "prefill", "execution"),
    *("stop_at_eos", "trials", "max_time", "dry_run", "trace_out"),
)
"""Options of a run in which rungs differ, or which a ladder does not have."""


@with_options((*EXPERIMENT, TrialsSpec), omit=_DECIDED)
def ladder(
    given: Mapping[str, Any], ladder: LadderSpec, output: OutputSpec, machines: ExecutorSpec
) -> None:
    experiment = make_experiment(given, simulated=False)
    with output_folder(
        output.output,
        default_folders(experiment.model.model, "ladder"),
        overwrite=output.overwrite,
        marker="ladder.json",
    ) as folder:
        climb = _climb if machines.executor == "local" else _climb_elsewhere
        data, files, ended = climb(experiment, ladder, output, machines, folder)
        from batchbench.studies.ladder import report

        text, rendered = json_text(data), report.render(data)
        show(output, text, report.sentence(data), rendered, typed_command(), files)
        if ended is not None:
            raise ended
        if not report.passed(data):
            raise typer.Exit(1)


Climbed = tuple[Mapping[str, Any], Sequence[Path], BatchbenchError | None]
"""The data of a ladder, its files, and what ended it early."""


def _climb(
    experiment: Experiment, spec: LadderSpec, output: OutputSpec, _: ExecutorSpec, folder: Path
) -> Climbed:
    """Measure the machine, show it, and measure the rungs."""
    from batchbench.cli.progress import make_display
    from batchbench.studies.ladder.run import Ladder

    count = len(choose_rungs(spec.rungs))
    with make_display(quiet=output.quiet, strategies=count) as display:
        ladder = Ladder(experiment, spec, display)
        ceilings = ladder.measure()
    from batchbench.studies.ladder import report  # scipy and matplotlib: after errors of options

    if not output.quiet and not output.json:
        echo("\n".join([*report.card_lines(report.make_card(ceilings)), ""]))
    with display:
        outcome = ladder.run(ceilings)
    with undisturbed():  # the measurement is complete: keep it
        data = report.make_ladder(outcome, typed_command())
        files = write_whole(folder, report.files_of(outcome, data), report.STALE)
    if outcome.stopped:
        return data, files, Interrupted(f"{outcome.stopped}; the results are in {folder}")
    return data, files, _failure(outcome.failed, folder)


def _climb_elsewhere(
    experiment: Experiment,
    spec: LadderSpec,
    output: OutputSpec,
    machines: ExecutorSpec,
    folder: Path,
) -> Climbed:
    """Run the ladder as one job: its rungs are compared with each other, so they stay together."""
    from batchbench.cli.progress import make_display
    from batchbench.studies.ladder import report

    job = Job("the ladder", report.LadderWork(experiment, spec, typed_command()))
    with (
        make_display(quiet=output.quiet) as display,
        closing(make_executor(machines, [experiment], folder, display)) as executor,
    ):
        contents = dict(run_parts([job], executor, display)[job.key][0])
    failed = contents.pop("failed")
    files = write_whole(folder, contents, report.STALE)
    return parse_json(str(contents["ladder.json"]).encode()), files, _failure(failed, folder)


def _failure(why: object, folder: Path) -> UsageError | None:
    return UsageError(f"{why}; the results before it are in {folder}") if why else None
