"""The command capacity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from batchbench import settings
from batchbench.batching.experiment import Experiment, make_experiment
from batchbench.cli.options import typed_command, with_options
from batchbench.cli.output import output_folder, show
from batchbench.errors import UsageError, shown
from batchbench.files import default_folders, undisturbed
from batchbench.json_file import json_text
from batchbench.reports.slo import GoalsSpec
from batchbench.settings import setting
from batchbench.studies.executors.spec import ExecutorSpec, clients_of, make_executor
from batchbench.studies.sweep.grid import SWEPT

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
class CapacitySpec:
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
    output: Path | None = setting(
        None,
        "Folder for capacity.json and the picture.",
        "Output",
        metavar="DIR",
        default_text="batchbench-results/<time>-<model>-capacity",
    )
    overwrite: bool = setting(False, "Replace a result in the folder.", "Output")
    json: bool = setting(False, "Print only capacity.json.", "Output")
    quiet: bool = setting(False, "Print only a one-line summary; no progress.", "Output")

    def __post_init__(self) -> None:
        settings.check(self)


@with_options(
    {"goals": GoalsSpec, "study": CapacitySpec, "machines": ExecutorSpec},
    raw=SWEPT,
    omit=("request_rate", "max_concurrency", "speed", "trials", "max_time"),
)
def capacity(
    given: Mapping[str, Any], goals: GoalsSpec, study: CapacitySpec, machines: ExecutorSpec
) -> None:
    experiment = _experiment(given, study)
    if not goals.slo:
        raise UsageError("--slo: give one or more latency limits, such as --slo ttft:500")
    with output_folder(
        study.output,
        default_folders(experiment.subject, "capacity"),
        overwrite=study.overwrite,
        marker="capacity.json",
    ) as folder:
        if not _search(experiment, goals, study, machines, folder):
            raise typer.Exit(1)


def _experiment(given: Mapping[str, Any], study: CapacitySpec) -> Experiment:
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


def _search(
    experiment: Experiment,
    goals: GoalsSpec,
    study: CapacitySpec,
    machines: ExecutorSpec,
    folder: Path,
) -> bool:
    """Search, write and show; return True if outputs are right."""
    from batchbench.cli.progress import CapacityDisplay
    from batchbench.cli.progress import make_console as make_error_console
    from batchbench.studies.capacity.probe import CapacityQuery
    from batchbench.studies.capacity.search import find_capacity, find_capacity_on

    query = CapacityQuery(goals, study.slo_attainment, study.max_trials)
    display = CapacityDisplay(make_error_console(quiet=study.quiet))
    together = experiment.target is not None and experiment.target.clients > 1
    if machines.executor == "local" or together:
        with clients_of(machines, [experiment], folder, display) as start:
            findings = find_capacity(experiment, query, study.precision, display, start)
    else:
        with display, closing(make_executor(machines, [experiment], folder, display)) as executor:
            findings = find_capacity_on(executor, experiment, query, study.precision, display)
    from batchbench.studies.capacity import report

    command = typed_command()
    with undisturbed():  # the search is complete: keep it
        data = report.data_of(findings, command)
        files = report.write_capacity(folder, data)
    show(
        study,
        lambda: json_text(data),
        lambda: report.sentence(data),
        lambda: report.render(data),
        command,
        files,
    )
    return not findings.verification.wrong
