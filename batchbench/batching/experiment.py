"""An experiment as frozen specs: workload, model, serving and trials."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from batchbench import settings
from batchbench.batching.models import ModelSpec
from batchbench.batching.policies import ORDERS, POLICIES, WAITING, make_policy
from batchbench.batching.presets import NOTEBOOK, PRESETS, Basis, check_preset
from batchbench.batching.remote.spec import (
    CHAT,
    COMPLETIONS,
    TargetSpec,
    refuse_own,
    with_served_model,
)
from batchbench.batching.step_cost import KnownCost
from batchbench.batching.strategies import GENERATE_BATCH_SAMPLES, find
from batchbench.errors import UsageError, shown
from batchbench.settings import parse_whole, setting
from batchbench.workloads.lengths import parse_lengths
from batchbench.workloads.spec import WorkloadSpec

EXECUTIONS = ("auto", "eager", "graph", "compile")
PREFILLS = ("auto", "separate", "mixed")


_serving = partial(setting, panel="Serving")
_measuring = partial(setting, panel="Measuring")


def budget_of(slots: int) -> int:
    """Return the default token budget of a mixed pass."""
    return max(2048, 2 * slots)


@dataclass(frozen=True)
class ServingSpec:
    """Settings of the scheduler and the engine."""

    batch_size: int = _serving(
        8, "Number of slots: how many requests can run together.", min=1, max=2**20
    )
    strategy: str = _serving(
        "static,continuous",
        "Strategies to compare, baseline first. static: batches of the waiting requests; "
        "static-fixed: waits for full batches; static-bucketed: sorted by prompt length; "
        "static-oracle: sorted by output length as if it were known, the best case of static "
        "batching; continuous; generate_batch: transformers' own continuous batching; help: list "
        "all, including installed plug-ins; or your own class as package.module:Policy.",
        metavar="NAMES",
    )
    max_wait: float = _serving(
        0.0,
        "Milliseconds that a static batch waits to fill up, counted from the arrival of its oldest "
        "request.",
        min=0.0,
        max=1e9,
        unit="milliseconds",
    )
    order: str = _serving(
        "fifo",
        "Order of the queue, for strategies that do not sort it themselves.",
        choices=tuple(ORDERS),
    )
    engine: str = _serving(
        "slots",
        "Engine that runs the model. slots: one preallocated KV cache; notebook: left padding, KV "
        "cache rebuilt whenever the batch changes.",
        choices=("slots", "notebook"),
    )
    prefill: str = _serving(
        "auto",
        "How new requests are prefilled. mixed: in the same pass as running requests (chunked "
        "prefill; slots engine only); separate: in a pass of their own; auto: mixed if the engine "
        "supports it.",
        choices=PREFILLS,
    )
    max_batched_tokens: int | None = _serving(
        None,
        "Maximum number of tokens per pass with mixed prefill.",
        min=2,
        max=10**9,
        default_text="2048, or twice the batch size if that is more",
    )
    execution: str = _serving(
        "auto",
        "How decode passes run. eager: operation by operation; graph: as replayed CUDA graphs; "
        "compile: with torch.compile; auto: graph on CUDA, else eager.",
        choices=EXECUTIONS,
    )

    def __post_init__(self) -> None:
        settings.check(self)
        if not self.strategies:
            raise UsageError("--strategy: name at least one, such as static,continuous")
        if len(set(self.strategies)) < len(self.strategies):
            raise UsageError(f"--strategy {shown(self.strategy)}: has the same strategy twice")
        for name in self.policies:
            make_policy(name)
        for name in self.plug_ins:
            find(name)
        if self.max_wait and not any(name in WAITING for name in self.strategies):
            names = f"none of --strategy {shown(self.strategy)} waits for a batch to fill"
            raise UsageError(f"--max-wait {self.max_wait:g}: {names}; add {' or '.join(WAITING)}")
        for name, able in (("prefill", "separate"), ("execution", "eager")):
            value = getattr(self, name)
            if self.engine == "notebook" and value not in ("auto", able):
                why = f"the notebook engine is only {able}; give --{name} auto or --engine slots"
                raise UsageError(f"--{name} {value}: {why}")
        if self.mixes_prefill and self.token_budget <= self.batch_size:
            raise UsageError(
                f"--max-batched-tokens {self.token_budget}: must be above the batch size "
                f"({self.batch_size}), or no prompt could ever join a full batch; raise it, or "
                "give --prefill separate"
            )

    @property
    def mixes_prefill(self) -> bool:
        """True if prompts are computed together with the running requests."""
        return self.prefill == "mixed" or (self.prefill == "auto" and self.engine != "notebook")

    @property
    def token_budget(self) -> int:
        return self.max_batched_tokens or budget_of(self.batch_size)

    @property
    def strategies(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.strategy.split(",") if name.strip())

    @property
    def policies(self) -> tuple[str, ...]:
        """The strategies that are policies of our own scheduler."""
        return tuple(name for name in self.strategies if name in POLICIES or ":" in name)

    @property
    def plug_ins(self) -> tuple[str, ...]:
        """The strategies that schedule by themselves."""
        return tuple(name for name in self.strategies if name not in self.policies)


@dataclass(frozen=True)
class TrialsSpec:
    """Settings of the measurement."""

    trials: int = _measuring(
        4,
        "Number of trials of each strategy; the order of the strategies alternates.",
        min=1,
        max=10_000,
    )
    verify: str = _measuring(
        "all",
        "Requests whose tokens are checked against unbatched generation: all, none or a number.",
        metavar="all|N|none",
    )
    max_time: float | None = _measuring(
        None,
        "Time limit of the trials in seconds. A trial pair that would end later is not started; "
        "a pair that exceeds the limit by more than a tenth is dropped.",
        min=0.001,
        max=1e9,
        unit="seconds",
    )

    def __post_init__(self) -> None:
        settings.check(self)
        _ = self.verify_limit

    @property
    def verify_limit(self) -> int | None:
        """Number of requests to check; None for all."""
        words: dict[str, int | None] = {"all": None, "none": 0}
        if self.verify in words:
            return words[self.verify]
        place, must = f"--verify {shown(self.verify)}", "must be all, none or a number of requests"
        if (limit := parse_whole(self.verify, place, must)) < 0:
            raise UsageError(f"{place}: {must}")
        return limit


@dataclass(frozen=True)
class Experiment:
    """The settings of one experiment.

    ``preset`` is the preset that the specs started from (see :meth:`of`); it shortens
    :meth:`command`. A simulation takes its step times from ``cost``; without it every step takes
    one unit of time. ``target`` is the server that serves the workload; None for our own engine.
    """

    workload: WorkloadSpec = field(default_factory=WorkloadSpec)
    model: ModelSpec = field(default_factory=ModelSpec)
    serving: ServingSpec = field(default_factory=ServingSpec)
    trials: TrialsSpec = field(default_factory=TrialsSpec)
    simulated: bool = False
    preset: str = NOTEBOOK
    cost: KnownCost | None = None
    target: TargetSpec | None = None

    def __post_init__(self) -> None:
        if self.target is not None:
            if self.target.target is None:
                object.__setattr__(self, "target", None)
            else:
                _check_served(self, self.target)
        if self.workload.stop_at_eos and "static-oracle" in self.serving.strategies:
            why = "needs output lengths, which --stop-at-eos leaves open; remove one of them"
            raise UsageError(f"--strategy static-oracle: {why}")
        if self.workload.sampling is not None and "generate_batch" in self.serving.strategies:
            raise UsageError(GENERATE_BATCH_SAMPLES)
        check_preset(self.preset)

    @classmethod
    def of(
        cls,
        *layers: Mapping[str, Any],
        preset: str = NOTEBOOK,
        simulated: bool = False,
        cost: KnownCost | None = None,
    ) -> Experiment:
        """Return the experiment of a preset; each layer's settings replace those before it.

        A layer maps names of fields, of any spec, to values:
        ``Experiment.of({"batch_size": 32}, preset="chat")``.
        Raises UsageError for an unknown preset or setting, or settings that contradict each other.
        """
        check_preset(preset)
        defaults = {"trials": 1} if simulated else {}
        refuse_own(*layers)
        values = with_served_model(
            settings.layered(PARTS.values(), defaults, PRESETS[preset].settings, *layers)
        )
        known = {f.name for spec in PARTS.values() for f in fields(spec)}
        if unknown := [name for name in values if name not in known]:
            raise UsageError(f"{unknown[0]}: an experiment has no such setting")
        parts = {name: settings.make_spec(spec, values) for name, spec in PARTS.items()}
        return cls(**parts, simulated=simulated, preset=preset, cost=cost)

    def config(self) -> dict[str, Any]:
        """Return the preset's name, and all settings as JSON values, spec by spec."""
        parts = {name: settings.as_json(part) for name, part in self._parts()}
        return {"preset": self.preset, **parts}

    def _parts(self) -> list[tuple[str, Any]]:
        """Return the names and specs of the parts that there are."""
        parts = [(name, getattr(self, name)) for name in PARTS]
        return [(name, part) for name, part in parts if part is not None]

    @property
    def server(self) -> str | None:
        """The address of the server; None for our own engine."""
        return None if self.target is None else self.target.target

    @property
    def subject(self) -> str:
        """The model, or the server, for the name of a folder."""
        return self.model.model if self.target is None else self.target.place.replace(":", "-")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, simulated: bool = False) -> Experiment:
        """Return the experiment whose :meth:`config` is given; missing settings are defaults.

        Raises UsageError for a setting that this version does not know, or a file that is gone.
        """
        parts: dict[str, Any] = {
            name: settings.from_json(spec, config[name])
            for name, spec in PARTS.items()
            if name in config or name != "target"
        }
        return cls(**parts, simulated=simulated, preset=config.get("preset", NOTEBOOK))

    def command(self, name: str | None = None) -> str:
        """Return the command line that runs the experiment again, with options beyond its preset.

        If no option can express a difference from the preset, such as a setting removed from it,
        the options are those beyond the defaults. ``name`` is the command's, unless it is run or
        simulate.
        """
        for preset in dict.fromkeys((self.preset, NOTEBOOK)):
            options = self._options(preset)
            with suppress(UsageError):  # the rest of the preset contradicts it, or a file is gone
                again = Experiment.of(options, preset=preset, simulated=self.simulated)
                if replace(again, preset=self.preset, cost=self.cost) == self:
                    break
        words = ["batchbench", *(name or ("simulate" if self.simulated else "run")).split()]
        words += ["--cost", self.cost.source] if self.cost else []
        words += ["--preset", preset] * (preset != NOTEBOOK)
        for name, value in options.items():
            option = settings.option_name(name)
            words += [option] if value is True else [option, str(value)]
        return shlex.join(words)

    def _options(self, preset: str) -> dict[str, Any]:
        """Return the settings beyond a preset; beyond the default preset always with the sizes."""
        served = {} if self.target is None else {"target": self.target.target}
        base = Experiment.of(served, preset=preset, simulated=self.simulated)
        always = ("target", *(("batch_size", "queue_size") if preset == NOTEBOOK else ()))
        own = dict(self._parts())
        return {
            f.name: value
            for part in ("target", "serving", "workload", "model", "trials")
            if part in own
            for f in settings.kept(own[part])
            for value in [getattr(own[part], f.name)]
            if value is not None and value is not False
            if f.name in always or value != getattr(getattr(base, part), f.name)
        }


PARTS: Mapping[str, Any] = {
    "workload": WorkloadSpec,
    "model": ModelSpec,
    "serving": ServingSpec,
    "trials": TrialsSpec,
    "target": TargetSpec,
}
"""The specs of an experiment; no two have a field of the same name."""


def make_experiment(
    chosen: Mapping[str, Any], *, simulated: bool, cost: KnownCost | None = None
) -> Experiment:
    """Return the experiment of these options; the preset, the file or defaults give all others.

    Raises UsageError if the options exclude each other, or a value is wrong.
    """
    basis: Basis = settings.make_spec(Basis, chosen)
    names = {field.name for field in fields(Basis)}
    own = {name: value for name, value in chosen.items() if name not in names}
    _, file = basis.layers()
    return Experiment.of(file, own, preset=basis.preset, simulated=simulated, cost=cost)


def _check_served(experiment: Experiment, target: TargetSpec) -> None:
    """Raise UsageError for a setting that has no meaning on a server."""
    if experiment.simulated:
        raise UsageError("--target: a simulation has no server; use batchbench run, or drop it")
    for part in (experiment.serving, experiment.model):
        changed = [f.name for f in fields(part) if getattr(part, f.name) != f.default]
        refuse_own({"target": target.target, **dict.fromkeys(changed)})
    strategies, clients = experiment.serving.strategies, f"--clients {target.clients}"
    if others := [name for name in strategies if name not in ("static", "continuous")]:
        raise UsageError(
            f"--strategy {shown(others[0])}: a server schedules by itself, so --target has static "
            "(in waves) and continuous; drop it"
        )
    if target.clients > 1 and "static" in strategies:
        why = "only a single client knows when a wave has ended; add --strategy continuous"
        raise UsageError(f"{clients}: {why}")
    if target.clients > 1 and experiment.workload.max_concurrency is not None:
        why = "no client knows how many requests the others have sent; drop --max-concurrency"
        raise UsageError(f"{clients}: {why}")
    if experiment.workload.chat_template and target.endpoint == CHAT:
        why = f"the server applies its own at {CHAT}; drop it, or give --endpoint {COMPLETIONS}"
        raise UsageError(f"--chat-template: {why}")
    verify = experiment.trials.verify
    if verify not in ("all", "none") and target.verify_model is None:
        why = "--target checks outputs only with --verify-model FOLDER; add it, or drop --verify"
        raise UsageError(f"--verify {shown(verify)}: {why}")


def pinned(experiment: Experiment, model: Mapping[str, Any]) -> Experiment:
    """Replace ``auto`` by the values with which ``model`` was resolved."""
    if experiment.target is not None:
        return replace(experiment, model=replace(experiment.model, model=model["name"]))
    serving, execution = experiment.serving, model.get("execution")
    if execution in EXECUTIONS and serving.engine != "notebook":
        serving = replace(serving, execution=execution)
    resolved = {name: model[name] for name in ("device", "dtype", "load_format")}
    return replace(experiment, serving=serving, model=replace(experiment.model, **resolved))


def named_files(experiment: Experiment) -> dict[str, Any]:
    """Return digests of the files that settings name, by field name, and of a model's files."""
    files: dict[str, Any] = {}
    for _, spec in experiment._parts():
        for name, value in vars(spec).items():
            if name in ("prompt_tokens", "output_tokens") and value is not None:
                # Lengths such as empirical:FILE name a file.
                value = getattr(parse_lengths(value, settings.option_name(name)), "file", None)
                value = None if value is None else Path(value)
            if isinstance(value, Path) and value.is_file():
                files[name] = digest_of_file(value)
    place = Path(experiment.model.model)
    own = sorted(place.iterdir()) if place.is_dir() else [place]
    if statuses := [(file.name, file.stat()) for file in own if file.is_file()]:
        files["model"] = [(name, s.st_size, s.st_mtime_ns) for name, s in statuses]
    return files


def digest_of_file(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
