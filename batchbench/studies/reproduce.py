"""Running a recorded experiment again, and saying what agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import batchbench
from batchbench import settings
from batchbench.batching.experiment import EXECUTIONS, Experiment
from batchbench.batching.progress import Watch
from batchbench.batching.session import Session, conduct_session
from batchbench.batching.step_cost import KnownCost
from batchbench.batching.verification import NOT_VERIFIED
from batchbench.errors import UsageError
from batchbench.reports import slo
from batchbench.reports.result import Result, make_result
from batchbench.studies import receipt
from batchbench.studies.identity import named_files
from batchbench.studies.receipt import DIFFERS, Check, Receipt


def experiment_of(recorded: Result) -> Experiment:
    """The experiment of a result, with what ``auto`` meant then pinned.

    Device, number format, kind of weights and execution are those that it was made with, and the
    trials as many as were finished.

    Raises:
        UsageError: a file that it names is gone, or it is of a newer version.
    """
    data = recorded.data
    asked = Experiment.from_config(data["config"], simulated=data["simulated"])
    trials = replace(asked.trials, trials=len(recorded.recordings[recorded.names[0]]))
    if data["simulated"]:
        cost = data.get("cost")
        known = None if cost is None else KnownCost.of(cost)
        return replace(asked, trials=trials, cost=known)
    return pinned(replace(asked, trials=trials), data["model"])


def pinned(experiment: Experiment, model: Mapping[str, Any]) -> Experiment:
    """The experiment with what ``auto`` meant where ``model`` was resolved."""
    serving, execution = experiment.serving, model.get("execution")
    if execution in EXECUTIONS and serving.engine != "notebook":
        serving = replace(serving, execution=execution)
    return replace(
        experiment,
        serving=serving,
        model=replace(
            experiment.model,
            device=model["device"],
            dtype=model["dtype"],
            load_format=model["load_format"],
        ),
    )


def reproduce(recorded: Result, watch: Watch | None = None) -> Receipt:
    """Run the experiment of a result again: the same specs, seed and order of trials.

    Where the workload or the weights differ already, nothing is run.

    Raises:
        UsageError: it cannot be run here.
    """
    try:
        session = Session(experiment_of(recorded), watch or Watch())
    except UsageError as error:
        raise UsageError(f"the result cannot be run here: {error}") from error
    data = recorded.data
    differences = receipt.differences_of(
        data, batchbench.__version__, session.environment, session.model
    )
    checks = [receipt.check_workload(recorded, session.workload.digest)]
    if not data["simulated"]:
        checks.append(receipt.check_weights(recorded, session.model))
    if checks[0].verdict == DIFFERS and (files := named_files(session.experiment)):
        options = ", ".join(map(settings.option_name, sorted(files)))
        raise UsageError(
            f"the result cannot be run here: the workload differs, so a file that it is made of "
            f"({options}) was changed since; put back what it held"
        )
    if any(check.verdict == DIFFERS for check in checks):
        return Receipt(data["command"], differences, checks, None)
    again = make_result(conduct_session(session), slo.from_config(data["config"]["goals"]))
    checks += receipt.check_counters(recorded, again)
    if not data["simulated"]:
        alike = receipt.is_alike(differences)
        checks += [_check_outputs(session, recorded, again, n, alike=alike) for n in recorded.names]
    checks += receipt.check_times(recorded, again)
    return Receipt(data["command"], differences, checks, again)


def _check_outputs(
    session: Session, recorded: Result, again: Result, name: str, *, alike: bool
) -> Check:
    """A strategy's tokens; those that differ are held against the model, old ones and new."""
    differing = receipt.differing_requests(recorded, again, name)
    both = [recorded.recordings[name][0], again.recordings[name][0]]
    judged = session.verify(both, differing) if differing else NOT_VERIFIED
    return receipt.check_outputs(recorded, again, name, judged, alike=alike)
