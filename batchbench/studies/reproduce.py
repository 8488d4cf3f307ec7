"""Running a recorded experiment again, and saying what agrees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench import settings
from batchbench.batching.experiment import EXECUTIONS, Experiment
from batchbench.batching.progress import Watch
from batchbench.batching.session import Session, run_session
from batchbench.batching.step_cost import KnownCost
from batchbench.batching.verification import NOT_VERIFIED, Verification
from batchbench.errors import UsageError
from batchbench.reports.result import Result, make_result
from batchbench.reports.slo import GoalsSpec
from batchbench.reports.statistics import FEWEST_PAIRS, interval_of_ratio
from batchbench.studies.gate.counts import flat
from batchbench.studies.sweep.grid import named_files
from batchbench.version import __version__

AGREES, TIES, DIFFERS, OBSERVED, NOT_RUN = "agrees", "ties", "differs", "observed", "not compared"

_PASSING = ("hostname", "gpu_clock_mhz", "os", "python", "cpu_cores", "memory_bytes")
"""Of the environment, what no token depends on."""


@dataclass(frozen=True)
class Difference:
    """One thing in the environment that is not as it was."""

    name: str
    recorded: Any
    here: Any


@dataclass(frozen=True)
class Check:
    """One thing that was held against the record.

    ``exact`` ones must agree; others (times) are told with their intervals.
    """

    name: str
    recorded: str
    here: str
    verdict: str
    exact: bool = True


@dataclass(frozen=True, eq=False)
class Receipt:
    """What differs in the environment, what was compared, and the result of running it again."""

    command: str
    differences: Sequence[Difference]
    checks: Sequence[Check]
    again: Result | None  # None where what is asked differs already, so that nothing was run

    @property
    def agrees(self) -> bool:
        """Whether everything exact is as it was, ties of unlike environments included."""
        return not any(check.exact and check.verdict == DIFFERS for check in self.checks)

    @property
    def sentence(self) -> str:
        """The answer in one sentence."""
        wrong = [c.name for c in self.checks if c.exact and c.verdict == DIFFERS]
        if wrong:
            text = f"NOT reproduced: {', '.join(wrong)} differ{'s' * (len(wrong) == 1)}"
            return f"{text}." if self.again else f"{text}, so nothing was run."
        exact = sum(c.exact and c.verdict == AGREES for c in self.checks)
        text = f"reproduced: {exact} of {exact} exact checks agree"
        if ties := sum(c.verdict == TIES for c in self.checks):
            text = f"reproduced: {exact} exact checks agree, {ties} up to numerical ties"
        times = [c for c in self.checks if not c.exact and c.verdict in (AGREES, DIFFERS)]
        if times:
            within = sum(c.verdict == AGREES for c in times)
            text += f"; {within} of {len(times)} times are within their intervals"
        return f"{text}."

    def as_data(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "agrees": self.agrees,
            "sentence": self.sentence,
            "command": self.command,
            "environment": [asdict(difference) for difference in self.differences],
            "checks": [asdict(check) for check in self.checks],
            "validity": None if self.again is None else self.again.data["validity"],
        }


# The environment


def differences_of(
    recorded: Mapping[str, Any], version: str, environment: Mapping[str, Any], model: Any
) -> list[Difference]:
    """What differs between a result's environment and this one.

    Args:
        recorded: the data of the result.
        version: of this batchbench.
        environment: as the session found it.
        model: as resolved here.
    """
    then = flat(recorded["environment"]) | _about(recorded, recorded["batchbench_version"])
    now = flat(environment) | _about({"model": model}, version)
    return [
        Difference(name, then.get(name), now.get(name))
        for name in {**then, **now}
        if name not in ("gpu_clock_mhz", "packages") and then.get(name) != now.get(name)
    ]


def _about(data: Mapping[str, Any], version: str) -> dict[str, Any]:
    return {"batchbench": version, "execution": data["model"].get("execution")}


def is_alike(differences: Sequence[Difference]) -> bool:
    """Whether the same tokens must come out to the bit."""
    return all(difference.name in _PASSING for difference in differences)


# What is compared


def check_workload(recorded: Result, digest: str) -> Check:
    """Whether the same is asked, to the token and the nanosecond."""
    then = recorded.data["workload"]["digest"]
    return Check("workload", then[:12], digest[:12], AGREES if digest == then else DIFFERS)


def check_weights(recorded: Result, model: Mapping[str, Any]) -> Check:
    """Whether the weights are the same, bit for bit."""
    then, now = (m.get("weights_digest") for m in (recorded.data["model"], model))
    verdict = AGREES if now == then else DIFFERS
    if then is None:
        verdict = NOT_RUN
    return Check("weights", _short(then), _short(now), verdict)


def _short(digest: str | None) -> str:
    return "not recorded" if digest is None else digest[:12]


def check_counters(recorded: Result, again: Result) -> Iterator[Check]:
    """Each strategy's counters; observations where who waits depends on the machine's speed."""
    exact = recorded.data["simulated"] or recorded.data["workload"]["closed"]
    for name, strategy in recorded.data["strategies"].items():
        then: Any = strategy["counters"]
        now: Any = again.data["strategies"][name]["counters"]
        if then is None or now is None:  # it schedules for itself, and shows no steps
            continue
        other = [key for key, value in then.items() if now[key] != value]
        shown = other[0] if other else "forward_passes"
        more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
        spelled = shown.replace("_", " ")
        verdict = AGREES if not other else DIFFERS if exact else OBSERVED
        yield Check(
            f"counters, {name}",
            f"{then[shown]:,} {spelled}",
            f"{now[shown]:,} {spelled}{more}",
            verdict,
            exact,
        )


def differing_requests(recorded: Result, again: Result, name: str) -> list[int]:
    """Requests that got other tokens than they had, in a strategy's first trial."""
    then, now = recorded.recordings[name][0], again.recordings[name][0]
    count = len(then.requests.slot)
    return [i for i in range(count) if not np.array_equal(then.tokens_of(i), now.tokens_of(i))]


def check_outputs(
    recorded: Result, again: Result, name: str, judged: Verification, *, alike: bool
) -> Check:
    """A strategy's tokens; ``judged`` is what the model says of those that differ, then and now."""
    then, now = (
        result.data["strategies"][name]["output_digest"] or "no model ran"
        for result in (recorded, again)
    )
    verdict, here = AGREES, now[:12]
    if then != now:
        count = recorded.data["workload"]["num_requests"]
        verdict = DIFFERS if alike or judged.wrong or not judged.requests_checked else TIES
        here = f"{judged.requests_checked} of {count} requests differ"
        if judged.requests_checked:
            here += f", {judged.wrong} wrong" if judged.wrong else ", all numerical ties"
    return Check(f"outputs, {name}", then[:12], here, verdict)


def check_times(recorded: Result, again: Result) -> Iterator[Check]:
    """Durations of each strategy, and the speed-up of each over the first.

    Measured ones agree where the 95 % interval of their ratio (Welch's t interval of the
    difference of mean logarithms) includes 1; simulated ones must be equal.
    """
    simulated = recorded.data["simulated"]
    for name in recorded.names:
        then, now = _durations(recorded, name), _durations(again, name)
        yield _check_ratio(f"duration, {name}", then, now, "s", exact=simulated)
    for name in recorded.names[1:]:
        then, now = (
            _durations(r, recorded.names[0]) / _durations(r, name) for r in (recorded, again)
        )
        yield _check_ratio(f"speed-up, {name}", then, now, "×", exact=simulated)


def _durations(result: Result, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([trial["duration"] for trial in result.data["strategies"][name]["trials"]])


def _check_ratio(name: str, then: Any, now: Any, unit: str, *, exact: bool) -> Check:
    recorded, here = (f"{np.exp(np.median(np.log(values))):.4g} {unit}" for values in (then, now))
    if exact:
        return Check(name, recorded, here, AGREES if np.array_equal(then, now) else DIFFERS)
    if min(len(then), len(now)) < FEWEST_PAIRS:
        return Check(name, recorded, f"{here}, too few trials to tell", OBSERVED, exact=False)
    low, high = interval_of_ratio(then, now)
    text = f"{here}, {np.exp(np.log(now).mean() - np.log(then).mean()):.2f}× ({low:.2f}–{high:.2f})"
    return Check(name, recorded, text, AGREES if low <= 1 <= high else DIFFERS, exact=False)


# On a terminal

_STYLES = {AGREES: "green", TIES: "yellow", DIFFERS: "bold red", OBSERVED: "dim", NOT_RUN: "dim"}


def render(receipt: Receipt) -> RenderableType:
    """What differs in the environment, the sentence, and a row a check."""
    grid = Table(pad_edge=False)
    for title in ("Check", "Recorded", "Here"):
        grid.add_column(title, overflow="fold")
    grid.add_column("", no_wrap=True)
    for check in receipt.checks:
        style = _STYLES[check.verdict] if check.exact or check.verdict == AGREES else "yellow"
        grid.add_row(check.name, check.recorded, check.here, Text(check.verdict, style))
    style = "bold" if receipt.agrees else "bold red"
    parts = [_environment(receipt), Text(), Text(receipt.sentence, style), Text(), grid]
    if receipt.again is not None and (reasons := receipt.again.data["validity"]["reasons"]):
        parts.append(Text(f"The second run is suspect: {'; '.join(reasons)}.", "yellow"))
    return Group(*parts)


def _environment(receipt: Receipt) -> RenderableType:
    if not receipt.differences:
        return Text("The environment is the one of the record.")
    grid = Table(
        title="What differs in the environment", pad_edge=False, title_style="bold", box=None
    )
    for title in ("", "recorded", "here"):
        grid.add_column(title, overflow="fold", header_style="dim")
    for difference in receipt.differences:
        grid.add_row(difference.name, _spelled(difference.recorded), _spelled(difference.here))
    return grid


def _spelled(value: Any) -> str:
    return "–" if value is None else f"{value:,}" if type(value) is int else str(value)


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
    differences = differences_of(data, __version__, session.environment, session.model)
    checks = [check_workload(recorded, session.workload.digest)]
    if not data["simulated"]:
        checks.append(check_weights(recorded, session.model))
    if checks[0].verdict == DIFFERS and (files := named_files(session.experiment)):
        options = ", ".join(map(settings.option_name, sorted(files)))
        raise UsageError(
            f"the result cannot be run here: the workload differs, so a file that it is made of "
            f"({options}) was changed since; put back what it held"
        )
    if any(check.verdict == DIFFERS for check in checks):
        return Receipt(data["command"], differences, checks, None)
    goals = settings.from_json(GoalsSpec, data["config"]["goals"])
    again = make_result(run_session(session), goals)
    checks += check_counters(recorded, again)
    if not data["simulated"]:
        alike = is_alike(differences)
        checks += [_check_outputs(session, recorded, again, n, alike=alike) for n in recorded.names]
    checks += check_times(recorded, again)
    return Receipt(data["command"], differences, checks, again)


def _check_outputs(
    session: Session, recorded: Result, again: Result, name: str, *, alike: bool
) -> Check:
    """A strategy's tokens; those that differ are held against the model, old ones and new."""
    differing = differing_requests(recorded, again, name)
    both = [recorded.recordings[name][0], again.recordings[name][0]]
    judged = session.verify(both, differing) if differing else NOT_VERIFIED
    return check_outputs(recorded, again, name, judged, alike=alike)
