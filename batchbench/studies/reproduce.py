"""Run a recorded experiment again and compare the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from batchbench import settings
from batchbench.batching.experiment import Experiment, named_files, pinned
from batchbench.batching.machine import Difference, facts_of
from batchbench.batching.machine import differences as differences_between
from batchbench.batching.progress import Watch
from batchbench.batching.remote.outcome import ServerFacts
from batchbench.batching.session import open_bench, run_on
from batchbench.batching.step_cost import KnownCost
from batchbench.batching.verification import NOT_VERIFIED, Verification
from batchbench.errors import UsageError
from batchbench.reports.result import Result, make_result
from batchbench.reports.served import typical_passes
from batchbench.reports.slo import GoalsSpec
from batchbench.reports.statistics import FEWEST_PAIRS, interval_of_ratio
from batchbench.reports.text import joined, times, times_within
from batchbench.version import __version__


class Verdict(StrEnum):
    """The outcome of one comparison with the record."""

    AGREES = "agrees"
    TIES = "ties"
    DIFFERS = "differs"
    OBSERVED = "observed"
    NOT_COMPARED = "not compared"


_IRRELEVANT = ("hostname", "os", "python", "cpu_cores", "memory_bytes")
"""Facts of the environment on which no token depends."""


LARGE = 1.5
"""Ratio of two times that is reported even with too few trials for an interval."""


@dataclass(frozen=True)
class Check:
    """One comparison with the record; only an exact one must agree."""

    name: str
    recorded: str
    here: str
    verdict: Verdict
    exact: bool = True
    change: str = ""  # of a measured time that differs, in words


@dataclass(frozen=True, eq=False)
class Reproduction:
    """Environment differences, all checks, and the result of the second run."""

    command: str
    differences: Sequence[Difference]
    checks: Sequence[Check]
    again: Result | None  # None if the workload or the weights differ, so that nothing was run

    @property
    def wrong(self) -> list[str]:
        """Names of the exact checks that differ; ties do not count."""
        return [c.name for c in self.checks if c.exact and c.verdict == Verdict.DIFFERS]

    @property
    def agrees(self) -> bool:
        """True if all exact checks agree, up to ties if the environment differs."""
        return not self.wrong

    @property
    def sentence(self) -> str:
        """The answer in one sentence."""
        if wrong := self.wrong:
            text = f"NOT reproduced: {joined(wrong)} {'differs' if len(wrong) == 1 else 'differ'}"
            return f"{text}." if self.again else f"{text}, so nothing was run."
        counts = Counter((check.exact, check.verdict) for check in self.checks)
        exact, ties = counts[True, Verdict.AGREES], counts[True, Verdict.TIES]
        text = f"reproduced: {exact} of {exact} exact checks agree"
        if ties:
            text = f"reproduced: {exact} exact checks agree, {ties} up to numerical ties"
        measured = [c for c in self.checks if not c.exact]
        if changes := [c.change for c in measured if c.change]:
            return f"{text}, but times are not reproduced: {joined(changes)}."
        if agree := counts[False, Verdict.AGREES]:
            text += f"; {agree} of {len(measured)} times agree within their intervals"
        elif measured:
            text += "; too few trials to compare times"
        return f"{text}."

    def as_data(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {
            "agrees": self.agrees,
            "sentence": self.sentence,
            "command": self.command,
            "environment": [
                {"name": d.name, "recorded": d.base, "here": d.new} for d in self.differences
            ],
            "checks": [asdict(check) for check in self.checks],
            "validity": None if self.again is None else self.again.data["validity"],
        }


# Checks


def differences_of(
    recorded: Mapping[str, Any], environment: Mapping[str, Any], model: Mapping[str, Any]
) -> list[Difference]:
    """Return the differences between a result's environment and model, and those here."""
    then = {"batchbench": recorded["batchbench_version"]}
    then["execution"] = recorded["model"].get("execution")
    now = {"batchbench": __version__, "execution": model.get("execution")}
    return differences_between(
        facts_of(recorded["environment"], {}) | then, facts_of(environment, {}) | now
    )


def is_alike(differences: Sequence[Difference]) -> bool:
    """Return True if both environments must produce the same tokens."""
    return all(difference.name in _IRRELEVANT for difference in differences)


def _exact(is_equal: bool) -> Verdict:
    return Verdict.AGREES if is_equal else Verdict.DIFFERS


def _check(name: str, then: Any, now: Any, otherwise: Verdict = Verdict.DIFFERS) -> Check:
    """Compare two numbers or digests; None is one that was not recorded."""
    verdict = Verdict.AGREES if then == now else otherwise
    return Check(name, _shown(then), _shown(now), Verdict.NOT_COMPARED if then is None else verdict)


def _shown(value: int | str | None) -> str:
    if value is None:
        return "not recorded"
    return value[:12] if isinstance(value, str) else f"{value:,}"


def check_weights(recorded: Result, model: Mapping[str, Any]) -> Check:
    then, now = (m.get("weights_digest") for m in (recorded.data["model"], model))
    return _check("weights", then, now)


def check_counters(recorded: Result, again: Result) -> Iterator[Check]:
    """Compare each strategy's counters, which are exact unless they depend on the speed."""
    exact = recorded.data["simulated"] or recorded.data["workload"]["closed"]
    for name, strategy in recorded.data["strategies"].items():
        then: Any = strategy["counters"]
        now: Any = again.data["strategies"][name]["counters"]
        if then is None or now is None:  # it schedules by itself, and reports no steps
            continue
        other = [key for key, value in then.items() if now[key] != value]
        shown = other[0] if other else "forward_passes"
        more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
        texts = [f"{counters[shown]:,} {shown.replace('_', ' ')}" for counters in (then, now)]
        verdict = _exact(not other) if exact or not other else Verdict.OBSERVED
        yield Check(f"counters, {name}", texts[0], texts[1] + more, verdict, exact)


def _differing_requests(recorded: Result, again: Result, name: str) -> list[int]:
    """Return the requests with other tokens in a strategy's first trial."""
    then, now = recorded.recordings[name][0], again.recordings[name][0]
    count = len(then.requests.slot)
    return [i for i in range(count) if not np.array_equal(then.tokens_of(i), now.tokens_of(i))]


def check_outputs(
    recorded: Result, again: Result, name: str, judged: Verification, *, alike: bool
) -> Check:
    """Compare a strategy's tokens; ``judged`` verifies the old and new ones that differ."""
    then, now = (digest or "no model ran" for digest in _output_digests(recorded, again, name))
    verdict, here = Verdict.AGREES, now[:12]
    if then != now:
        count = recorded.data["workload"]["num_requests"]
        is_wrong = alike or judged.wrong or not judged.requests_checked
        verdict = Verdict.DIFFERS if is_wrong else Verdict.TIES
        here = f"{judged.requests_checked} of {count} requests differ"
        if judged.requests_checked:
            here += f", {judged.wrong} wrong" if judged.wrong else ", all numerical ties"
    return Check(f"outputs, {name}", then[:12], here, verdict)


def _check_served(recorded: Result, again: Result) -> Iterator[Check]:
    """Compare a server's passes and outputs, which a server need not repeat exactly."""
    for name in recorded.names:
        label = recorded.label(name)
        passes = [typical_passes(r.data.get("server"), name) for r in (recorded, again)]
        if None not in passes:
            yield _check(f"forward passes, {label}", passes[0], passes[1], Verdict.OBSERVED)
        then, now = _output_digests(recorded, again, name)
        check = _check(f"outputs, {label}", then, now, Verdict.OBSERVED)
        if then is not None and now is None:
            check = replace(check, verdict=Verdict.NOT_COMPARED)
        elif check.verdict == Verdict.OBSERVED:
            differing = len(_differing_requests(recorded, again, name))
            here = f"{differing:,} of {recorded.data['workload']['num_requests']:,} requests differ"
            check = replace(check, here=here)
        yield check


def _output_digests(recorded: Result, again: Result, name: str) -> list[str | None]:
    return [r.data["strategies"][name]["output_digest"] for r in (recorded, again)]


def check_times(recorded: Result, again: Result) -> Iterator[Check]:
    """Compare durations, and speed-ups over the first strategy.

    Simulated ones must be equal. Measured ones agree if the 95 % interval of their ratio (Welch's
    t interval of the difference of mean logarithms) includes 1.
    """
    simulated, base = recorded.data["simulated"], None
    for name in recorded.names:
        trials = (r.data["strategies"][name]["trials"] for r in (recorded, again))
        then, now = (np.array([trial["duration"] for trial in each]) for each in trials)
        yield _check_ratio(f"duration, {recorded.label(name)}", then, now, "s", exact=simulated)
        base = base or (then, now)
        if name != recorded.names[0]:
            pair = (base[0] / then, base[1] / now)
            yield _check_ratio(f"speed-up, {name}", *pair, "×", exact=simulated)


def _check_ratio(name: str, then: Any, now: Any, unit: str, *, exact: bool) -> Check:
    recorded, here = (f"{np.exp(np.median(np.log(values))):.4g} {unit}" for values in (then, now))
    if exact:
        return Check(name, recorded, here, _exact(np.array_equal(then, now)))
    ratio = float(np.exp(np.log(now).mean() - np.log(then).mean()))
    if min(len(then), len(now)) < FEWEST_PAIRS:
        here += ", too few trials to compare"
        verdict, is_other = Verdict.OBSERVED, not 1 / LARGE < ratio < LARGE
    else:
        low, high = interval_of_ratio(then, now)
        here += f", {times_within(ratio, low, high)}"
        is_other = not low <= 1 <= high
        verdict = _exact(not is_other)
    change = f"{name.replace(',', ' of')} is {times(ratio)} the recorded one" if is_other else ""
    return Check(name, recorded, here, verdict, exact=False, change=change)


# The second run


def experiment_of(recorded: Result) -> Experiment:
    """Return the experiment of a result, with the values that ``auto`` had.

    Device, number format, kind of weights and execution are those of the record, and as many
    trials as were finished.
    """
    data = recorded.data
    experiment = Experiment.from_config(data["config"], simulated=data["simulated"])
    trials = replace(experiment.trials, trials=len(recorded.recordings[recorded.names[0]]))
    if data["simulated"]:
        cost = data.get("cost")
        known = None if cost is None else KnownCost.of(cost)
        return replace(experiment, trials=trials, cost=known)
    return pinned(replace(experiment, trials=trials), data["model"])


def _server_facts(server: Mapping[str, Any] | ServerFacts | None) -> dict[str, Any]:
    """Return what a server told about itself, by the names that a comparison shows."""
    told: Mapping[str, Any] = asdict(server) if isinstance(server, ServerFacts) else server or {}
    return {f"server {name}": told.get(name) for name in ("name", "version", "slots") if told}


def reproduce(recorded: Result, watch: Watch | None = None) -> Reproduction:
    """Run the experiment of a result again: the same specs, seed and order of trials.

    Nothing is run if the workload or the weights differ; UsageError if it cannot be run here.
    """
    try:
        session = open_bench(experiment_of(recorded), watch or Watch())
    except UsageError as error:
        raise UsageError(f"the result cannot be run here: {error}") from error
    data = recorded.data
    differences = differences_of(data, session.environment, session.model)
    differences += differences_between(
        _server_facts(data.get("server")), _server_facts(session.server())
    )
    checks = [_check("workload", data["workload"]["digest"], session.workload.digest)]
    if not (data["simulated"] or recorded.served):
        checks.append(check_weights(recorded, session.model))
    if checks[0].verdict == Verdict.DIFFERS and (files := named_files(session.experiment)):
        options = ", ".join(map(settings.option_name, sorted(files)))
        raise UsageError(
            "the result cannot be run here: the workload differs, so a file that it uses "
            f"({options}) has changed; restore it"
        )
    if any(check.verdict == Verdict.DIFFERS for check in checks):
        return Reproduction(data["command"], differences, checks, None)
    goals = settings.from_json(GoalsSpec, data["config"]["goals"])
    again = make_result(run_on(session), goals)
    checks += check_counters(recorded, again)
    if recorded.served:
        checks += _check_served(recorded, again)
    elif not data["simulated"]:
        for name in recorded.names:
            differing = _differing_requests(recorded, again, name)
            both = [recorded.recordings[name][0], again.recordings[name][0]]
            judged = session.verify(both, differing) if differing else NOT_VERIFIED
            alike = is_alike(differences)
            checks.append(check_outputs(recorded, again, name, judged, alike=alike))
    checks += check_times(recorded, again)
    return Reproduction(data["command"], differences, checks, again)
