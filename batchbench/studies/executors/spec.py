"""Options of where the parts of a study run, and the executor that they ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchbench import settings
from batchbench.batching.experiment import Experiment
from batchbench.batching.progress import Watch
from batchbench.errors import UsageError, shown
from batchbench.settings import option_name, setting
from batchbench.studies.executors.jobs import Executor, Needs, clients_on
from batchbench.version import __version__

if TYPE_CHECKING:
    from batchbench.batching.remote.clients import Start

EXECUTORS = ("local", "ray", "slurm")

_OWNERS = {
    "ray_address": ("ray",),
    **dict.fromkeys(("slurm_partition", "slurm_time", "slurm_gpus", "parallel"), ("slurm",)),
    **dict.fromkeys(("same_hardware", "any_hardware"), ("ray", "slurm")),
}
"""Executors that have an option."""

_PANEL, MINUTES, PARALLEL = "Machines", 60, 16


@dataclass(frozen=True)
class ExecutorSpec:
    """The place where the independent parts of a study run."""

    executor: str = setting(
        "local",
        "Where independent parts of the work run. local: on this machine, one after the other; "
        "ray: on a Ray cluster, one on each GPU, or on each node without GPUs; slurm: each as a "
        "Slurm job.",
        _PANEL,
        choices=EXECUTORS,
    )
    ray_address: str | None = setting(
        None,
        "Ray cluster: auto for the one that this machine belongs to, or ray://HOST:10001.",
        _PANEL,
        metavar="ADDRESS",
        default_text="a new Ray instance on this machine",
    )
    slurm_partition: str | None = setting(
        None, "Slurm partition.", _PANEL, metavar="NAME", default_text="Slurm's default"
    )
    slurm_time: int | None = setting(
        None,
        "Time limit of each Slurm job in minutes.",
        _PANEL,
        min=1,
        max=10**6,
        metavar="MINUTES",
        default_text=str(MINUTES),
    )
    slurm_gpus: int | None = setting(
        None, "GPUs per Slurm job.", _PANEL, min=0, max=64, default_text="0, for a whole node"
    )
    parallel: int | None = setting(
        None,
        "Maximum number of Slurm jobs at once.",
        _PANEL,
        min=1,
        max=10_000,
        default_text=str(PARALLEL),
    )
    same_hardware: bool = setting(
        False,
        "Use only machines like the first: the same processor, GPU and software. This is the "
        "default unless all cells are simulated.",
        _PANEL,
        excludes=("any_hardware",),
    )
    any_hardware: bool = setting(
        False,
        "Use all machines; the report marks cells as suspect if their machines differ.",
        _PANEL,
    )

    def __post_init__(self) -> None:
        settings.check(self)
        for field in fields(self):
            owners = _OWNERS.get(field.name, EXECUTORS)
            if getattr(self, field.name) != field.default and self.executor not in owners:
                option = option_name(field.name)
                raise UsageError(
                    f"{option}: is an option of --executor {' or '.join(owners)}, not of "
                    f"{self.executor}; add --executor {owners[0]}, or drop {option}"
                )
        address = self.ray_address
        if address is not None and address != "auto" and not address.startswith("ray://"):
            raise UsageError(f"--ray-address {shown(address)}: must be auto or ray://HOST:10001")


def make_executor(
    spec: ExecutorSpec,
    experiments: Sequence[Experiment],
    folder: Path,
    watch: Watch,
    first: Mapping[str, Any] | None = None,
) -> Executor:
    """Return the executor for experiments; this process if there are none.

    Args:
        folder: folder of the study, in which Slurm jobs have their files.
        first: facts of the machine on which a part of the study ran already.

    Raises:
        UsageError: the executor is not installed, or there is no such cluster.
    """
    if spec.executor == "local" or not experiments:
        return Executor(watch)
    timed = not all(experiment.simulated for experiment in experiments)
    same = spec.same_hardware or (timed and not spec.any_hardware)
    gpus = any(e.target is None and e.model.device != "cpu" for e in experiments)
    needs = Needs({**((same and first) or {}), "batchbench": __version__}, same, timed, gpus)
    try:
        if spec.executor == "ray":
            from batchbench.studies.executors.ray_cluster import RayCluster

            return RayCluster(spec.ray_address, watch, needs)
        from batchbench.studies.executors.slurm import Slurm
    except ModuleNotFoundError as error:
        name = {"ray": "ray", "slurm": "submitit"}[spec.executor]
        if error.name != name:
            raise
        raise UsageError(
            f"--executor {spec.executor}: needs {name}; type pip install "
            f"'batchbench-llm[{spec.executor}]'"
        ) from error
    return Slurm(
        folder / "jobs",
        watch,
        needs,
        parallel=spec.parallel or PARALLEL,
        partition=spec.slurm_partition,
        minutes=spec.slurm_time or MINUTES,
        gpus=spec.slurm_gpus or 0,
    )


@contextmanager
def clients_of(
    spec: ExecutorSpec, experiments: Sequence[Experiment], folder: Path, watch: Watch
) -> Iterator[Start | None]:
    """Yield what starts clients on an executor; None on this machine, which needs no help."""
    if spec.executor == "local":
        yield None
        return
    with closing(make_executor(spec, experiments, folder, watch)) as executor:
        yield clients_on(executor)
