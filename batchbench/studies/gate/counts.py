"""What was done, counted exactly: two versions' counters and outputs, strategy by strategy.

Equal counts are equal and others are not: no statistics, and one look is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from batchbench.errors import UsageError
from batchbench.reports.statistics import Verdict
from batchbench.studies.gate.evidence import Evidence, Kind, Varying

OUTPUTS = "outputs"
"""The metric under which a strategy's tokens are told."""

_FIXED = ("prefill_tokens", "useful_slot_steps")
"""What the workload asks for: fewer of them is work left out, and no improvement."""

_COMPOSITION = ("prefill_passes", "mixed_passes", "decode_passes", "prompt_slot_steps")
"""Parts of a whole: of themselves neither good nor bad, and better only where the whole is."""

_WHOLE = "forward_passes"


@dataclass(frozen=True)
class Work:
    """The work of one version.

    Attributes:
        counters: each strategy's counts by name, as ``result.json`` has them; None where it
            schedules for itself and shows no steps.
        digests: each strategy's digest of all tokens; None where no model ran.
        closed: all requests were there at the start with given lengths, so that counts depend on
            nothing but the schedule.
        simulated: on a virtual clock.
        dtype: the model's number format; None where no model ran.
    """

    counters: Mapping[str, Mapping[str, int] | None]
    digests: Mapping[str, str | None]
    closed: bool
    simulated: bool
    dtype: str | None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Work:
        """Of a result's data."""
        strategies = data["strategies"]
        return cls(
            counters={name: _counts(each) for name, each in strategies.items()},
            digests={name: each["output_digest"] for name, each in strategies.items()},
            closed=data["workload"]["closed"],
            simulated=data["simulated"],
            dtype=data["model"]["dtype"],
        )


def work_told(works: Mapping[str, Mapping[str, Any]], told: Mapping[str, Any]) -> Work:
    """What a measured version did.

    Args:
        works: by strategy, its counters and ``output_digest`` in one mapping.
        told: its ``workload`` and ``model``, as a result tells of them.
    """
    return Work(
        counters={
            name: {key: count for key, count in work.items() if key != "output_digest"} or None
            for name, work in works.items()
        },
        digests={name: work["output_digest"] for name, work in works.items()},
        closed=told["workload"]["closed"],
        simulated=False,
        dtype=told["model"]["dtype"],
    )


def _counts(strategy: Mapping[str, Any]) -> Mapping[str, int] | None:
    """The schedule's counters, and what the model computed where that is known."""
    computed = strategy.get("computed_passes")
    if strategy["counters"] is None or computed is None:
        counters: Mapping[str, int] | None = strategy["counters"]
        return counters
    return {**strategy["counters"], "computed_passes": computed}


def compare_work(
    base: Work, new: Work, *, alike: bool, allow_improvement: bool = False
) -> list[Evidence]:
    """Each strategy's counts and outputs, those of the base first and in its order.

    Counts gate where the workload is closed, and in a simulation also where it is not, provided
    that both took their time from the same cost. Outputs gate where the same tokens must come out
    to the bit: a closed workload, like environments, float32. Elsewhere the precision may decide
    between two tokens, and a difference is told but fails nothing.

    Args:
        alike: whether the environments (of simulations: the costs) are such that the same must
            come out.
        allow_improvement: a strategy may change where every count of it that changed is better.

    Raises:
        UsageError: a strategy of the base is missing.
    """
    if missing := [name for name in base.counters if name not in new.counters]:
        raise UsageError(
            f"strategy {missing[0]}: the base has it and the new version has not; run both with "
            f"--strategy {','.join(base.counters)}"
        )
    closed = base.closed and new.closed
    exact = closed or (base.simulated and new.simulated and alike)
    single = base.dtype == new.dtype == "float32"
    found: list[Evidence] = []
    for name, counters in base.counters.items():
        found += _of_counters(name, counters, new.counters[name], exact, allow_improvement)
        digests = base.digests.get(name), new.digests.get(name)
        found += _of_outputs(name, *digests, gated=closed and alike and single)
    return found


def _of_counters(
    strategy: str,
    base: Mapping[str, int] | None,
    new: Mapping[str, int] | None,
    exact: bool,
    allow_improvement: bool,
) -> Iterator[Evidence]:
    if base is None and new is None:
        yield Evidence(
            Kind.WORK,
            "counters",
            strategy,
            None,
            None,
            Verdict.UNKNOWN,
            why="cannot be told, since the strategy schedules for itself and shows no steps",
        )
        return
    if base is None or new is None:
        yield Evidence(
            Kind.WORK,
            "counters",
            strategy,
            None if base is None else "counted",
            None if new is None else "counted",
            Verdict.CHANGED,
            fails=exact,
            gated=exact,
            why="are there in one of the two only",
        )
        return
    changed = {key for key in base.keys() & new.keys() if base[key] != new[key]}
    better = {key for key in changed if _is_better(key, base, new)}
    allowed = allow_improvement and better == changed
    for key in [*base, *(key for key in new if key not in base)]:
        if key not in base or key not in new:  # one of the two is of a version that counts more
            side = "base" if key not in base else "new version"
            yield Evidence(
                Kind.WORK,
                key,
                strategy,
                base.get(key),
                new.get(key),
                Verdict.UNKNOWN,
                why=f"was not counted by the {side}",
            )
            continue
        same = base[key] == new[key]
        yield Evidence(
            Kind.WORK,
            key,
            strategy,
            base[key],
            new[key],
            Verdict.SAME if same else Verdict.CHANGED,
            fails=exact and not same and not allowed,
            gated=exact,
            change=new[key] / base[key] - 1 if base[key] else None,
            why=None if same else _spell_change(base[key], new[key], exact, allowed),
        )


def _is_better(key: str, base: Mapping[str, int], new: Mapping[str, int]) -> bool:
    if key in _FIXED:
        return False
    if key in _COMPOSITION:
        return new.get(_WHOLE, 0) < base.get(_WHOLE, 0)
    return new[key] < base[key]


def _spell_change(base: int, new: int, exact: bool, allowed: bool) -> str:
    share = f" ({new / base - 1:+.1%})".replace("%", " %").replace("-", "−") if base else ""
    text = f"{'grew' if new > base else 'fell'} by {abs(new - base):,}{share}"
    if not exact:
        return f"{text}, as it may where who waits depends on the machine's speed"
    return f"{text}, an improvement, which was allowed" if allowed else text


def _of_outputs(
    strategy: str, base: str | None, new: str | None, *, gated: bool
) -> Iterator[Evidence]:
    if base is None and new is None:
        return
    same, missing = base == new, base is None or new is None
    why = None
    if missing:
        why = "are there in one of the two only"
    elif not same:
        why = "differ" if gated else "differ, perhaps by no more than numerical ties"
    yield Evidence(
        Kind.WORK,
        OUTPUTS,
        strategy,
        base and base[:12],
        new and new[:12],
        Verdict.SAME if same else Verdict.CHANGED,
        fails=gated and not same,
        gated=gated,
        why=why,
    )


FOR_TOKENS = (
    *("device", "cpu", "threads", "gpu", "gpu_driver", "cuda", "torch", "transformers", "numpy"),
    *("dtype", "engine", "execution", "cpu_kernels"),
)
"""What the last bit of a logit depends on, and with it a token that is nearly tied."""

FOR_TIMES = (*FOR_TOKENS, "cpu_cores", "gpu_memory_bytes", "python")
"""What times depend on. Name and kernel of the host are not among them: a CI has many of a kind."""

_ITSELF = ("batchbench", "git_commit")
"""The versions that are compared, which are meant to differ."""

_PASSING = ("gpu_clock_mhz", "packages")


def flat(environment: Mapping[str, Any]) -> dict[str, Any]:
    """An environment with its packages among its facts."""
    packages: Mapping[str, Any] = environment.get("packages", {})
    return {**environment, **packages}


def facts_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """All that a result tells of its machine, its installation and how it computed.

    A simulation depends on none of that, only on what a step costs.
    """
    if data["simulated"]:
        cost = data.get("cost") or {}
        # Which run taught it, and what that run saw, change no time.
        told = {"source", "extrapolates", "rows_seen", "most_prompt_tokens_seen", "longest_seen"}
        return {"cost of a step": {k: v for k, v in cost.items() if k not in told} or "one unit"}
    model, found = data["model"], flat(data["environment"])
    if found.get("python"):
        found["python"] = ".".join(str(found["python"]).split(".")[:2])
    found |= {name: model.get(name) for name in ("device", "dtype", "execution")}
    return {**found, "engine": data["config"]["serving"]["engine"]}


def environment_differences(base: Mapping[str, Any], new: Mapping[str, Any]) -> list[Varying]:
    """Every fact in which two results' environments differ; the versions themselves are none."""
    facts = facts_of(base) | facts_of(new)
    return _varying(base, new, [n for n in facts if n not in _ITSELF + _PASSING])


def differing(
    base: Mapping[str, Any], new: Mapping[str, Any], names: Iterable[str]
) -> list[Varying]:
    """Of the facts that must be the same for times or for tokens, those that are not.

    Args:
        names: :data:`FOR_TIMES` or :data:`FOR_TOKENS`; of simulations their cost stands for both.
    """
    simulated = base["simulated"] or new["simulated"]
    return environment_differences(base, new) if simulated else _varying(base, new, names)


def _varying(
    base: Mapping[str, Any], new: Mapping[str, Any], names: Iterable[str]
) -> list[Varying]:
    then, now = facts_of(base), facts_of(new)
    return [
        Varying(name, then.get(name), now.get(name))
        for name in names
        if then.get(name) != now.get(name)
    ]
