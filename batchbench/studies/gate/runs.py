"""The runs of one version: results of one experiment, each of a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from batchbench.errors import UsageError
from batchbench.files import reason_of
from batchbench.reports.result_file import load_data
from batchbench.studies.gate.counts import Work, compare_work
from batchbench.studies.gate.evidence import Side, Varying

_PARTS = ("workload", "serving", "model", "trials", "goals")
_ASIDE = ("trials", "max_time", "verify")
"""How often and how long: of the runs of one experiment these may differ."""


@dataclass(frozen=True, eq=False)
class Run:
    """One result: what it is called, and what its ``result.json`` holds."""

    label: str
    data: Mapping[str, Any]

    @property
    def reasons(self) -> Sequence[str]:
        """Why it is stamped suspect; none if it is valid."""
        found: Sequence[str] = self.data["validity"]["reasons"]
        return found

    @property
    def strategies(self) -> list[str]:
        """The baseline first."""
        return list(self.data["strategies"])


@dataclass(frozen=True, eq=False)
class Runs:
    """All runs of one version; at least one."""

    label: str
    runs: Sequence[Run]

    @property
    def first(self) -> Mapping[str, Any]:
        """The first run's data, for what is the same in all of them."""
        return self.runs[0].data

    @property
    def valid(self) -> list[Run]:
        """Those whose times can be believed."""
        return [run for run in self.runs if not run.reasons]

    @property
    def side(self) -> Side:
        """What it is, for a gate."""
        data = self.first
        place = data["environment"].get("gpu") or data["environment"].get("cpu")
        return Side(
            self.label,
            {
                "version": data["batchbench_version"],
                "commit": data["environment"].get("git_commit"),
                "created": data["created_at"],
                "machine": "simulated" if data["simulated"] else place,
                "runs": str(len(self.runs)),
            },
        )


def load_runs(path: Path) -> Runs:
    """One result (its folder or ``result.json``), or a folder that holds several.

    Raises:
        UsageError: there is no result, one of them is spoiled, or they are not of one experiment.
    """
    try:
        files = _files(path)
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise UsageError(f"{path}: cannot be read: {reason_of(error)}") from error
    several = len(files) > 1
    runs = Runs(
        str(path), [Run(str(file) if several else str(path), load_data(file)) for file in files]
    )
    _check_runs(runs)
    return runs


def _files(path: Path) -> list[Path]:
    """Folders or files of the results that a path names; a file that is none is refused here."""
    if path.is_file() and path.suffix != ".json":
        raise UsageError(f"{path}: is no result.json; give that, or the folder that it lies in")
    if not path.is_dir() or (path / "result.json").exists():
        return [path]
    if found := sorted(file.parent for file in path.glob("*/result.json")):
        return found
    raise UsageError(
        f"{path}: holds no result.json, nor do the folders in it; give a folder that batchbench "
        "run wrote, or one that holds several such"
    )


def _check_runs(side: Runs) -> None:
    """Raise UsageError where a side's runs are not of one experiment and one version."""
    first = side.runs[0]
    for run in side.runs[1:]:
        _check_same_question(first, run)
        varying = [v for v in varying_settings(first.data, run.data) if v.name not in _ASIDE]
        if varying:
            raise UsageError(
                f"{run.label}: {_spell(varying[0], first, run)}, so that they are not runs of one "
                f"experiment; give {side.label} those of one"
            )
    for one, other in combinations(side.runs, 2):
        if not one.data["simulated"] and _measured(one) == _measured(other):
            raise UsageError(
                f"{other.label}: holds the same measurement as {one.label}, which would count "
                "twice; take one of them away"
            )


def _measured(run: Run) -> list[Any]:
    return [strategy["trials"] for strategy in run.data["strategies"].values()]


def check_comparable(base: Runs, new: Runs) -> None:
    """Raise UsageError where two versions were not asked the same question.

    That is another workload or model, or other strategies; or runs of the base which do not agree
    on what was done, so that nothing can be held against them.
    """
    _check_same_question(base.runs[0], new.runs[0])
    works = [Work.of(run.data) for run in base.runs]
    for run, work in zip(base.runs[1:], works[1:], strict=True):
        for found in compare_work(works[0], work, alike=work.simulated):
            if found.fails:
                raise UsageError(
                    f"{run.label}: its {found.name} is {found.new}, and {found.base} in "
                    f"{base.runs[0].label}; runs of one version do the same work, so "
                    f"{base.label} is nothing to compare with"
                )


def _check_same_question(base: Run, new: Run) -> None:
    then, now = base.data, new.data
    if then["simulated"] != now["simulated"]:
        one, other = (base, new) if then["simulated"] else (new, base)
        raise UsageError(
            f"{one.label}: is a simulation, and {other.label} was measured; compare two of a kind"
        )
    if then["workload"]["digest"] != now["workload"]["digest"]:
        asked = varying_settings(then, now, ("workload",))
        told = _spell(asked[0], base, new) if asked else "its prompts, lengths or times differ"
        raise UsageError(
            f"{new.label}: serves another workload than {base.label} ({told}); run both with the "
            "same workload options"
        )
    _check_model(base, new)
    _check_strategies(base, new)


def _check_model(base: Run, new: Run) -> None:
    then, now = base.data["model"], new.data["model"]
    if then["name"] != now["name"]:
        raise UsageError(
            f"{new.label}: is of the model {now['name']}, and {base.label} of {then['name']}; run "
            "both with the same --model"
        )
    digests = then.get("weights_digest"), now.get("weights_digest")
    # In another number format the same weights have another digest.
    if then["dtype"] == now["dtype"] and None not in digests and digests[0] != digests[1]:
        raise UsageError(
            f"{new.label}: has other weights than {base.label} ({now['name']}, "
            f"{digests[1][:12]} and {digests[0][:12]}); run both with the same --model, "
            "--load-format and --seed"
        )


def _check_strategies(base: Run, new: Run) -> None:
    then, now = base.strategies, new.strategies
    for one, names, other, others in ((new, now, base, then), (base, then, new, now)):
        if missing := [name for name in others if name not in names]:
            raise UsageError(
                f"{one.label}: has no strategy {missing[0]}, which {other.label} has; run both "
                f"with --strategy {','.join(then)}"
            )
    if then[0] != now[0]:
        raise UsageError(
            f"{new.label}: has the baseline {now[0]}, and {base.label} has {then[0]}; run both "
            f"with --strategy {','.join(then)}"
        )


def varying_settings(
    base: Mapping[str, Any], new: Mapping[str, Any], parts: Sequence[str] = _PARTS
) -> list[Varying]:
    """Settings that two experiments were asked to differ in, by the names of their fields."""
    return list(_settings(base["config"], new["config"], parts))


def _settings(
    base: Mapping[str, Any], new: Mapping[str, Any], parts: Sequence[str]
) -> Iterator[Varying]:
    for part in parts:
        for name in {**base[part], **new[part]}:
            then, now = base[part].get(name), new[part].get(name)
            if then != now:
                yield Varying(name, then, now)


def _spell(varying: Varying, base: Run, new: Run) -> str:
    then, now = ("nothing" if v is None else v for v in (varying.base, varying.new))
    return f"its {varying.name} is {now}, and {then} in {base.label}"
