"""A grid: the cells that some options span, each of them one experiment."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

from batchbench import settings
from batchbench.batching.experiment import PARTS, Experiment
from batchbench.batching.presets import Basis
from batchbench.batching.step_cost import KnownCost
from batchbench.errors import UsageError, shown
from batchbench.reports.result_file import SCHEMA_VERSION
from batchbench.settings import parse_number
from batchbench.version import __version__
from batchbench.workloads.lengths import parse_lengths

SWEPT: Mapping[str, type] = {"basis": Basis, **PARTS}
"""The specs whose fields may be swept."""

MOST_CELLS = 100_000

Values = Mapping[str, Any]
"""Of options, by the name of their field."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One experiment of a grid, or the reason why its options do not go together."""

    chosen: Values  # of the options that were given
    experiment: Experiment | None
    fault: str | None = None

    @cached_property
    def digest(self) -> str:
        """What the cell is kept under: equal digests give equal results."""
        if self.experiment is None:
            raise ValueError(f"no experiment: {self.fault}")
        # NumPy and SciPy, only now

        return digest_of(self.experiment)

    def says(self, names: tuple[str, ...]) -> str:
        """Its values of some options: ``--batch-size 8 --long-every 4``."""
        return " ".join(f"{settings.option_name(name)} {self.chosen[name]}" for name in names)


@dataclass(frozen=True)
class Grid:
    """All combinations of the values given to options.

    Args:
        axes: values by field name, as typed; an option that is not named keeps its default.
        simulated: on a virtual clock, where every step costs one unit.

    Raises:
        UsageError: a value that its option does not take, whatever the others are.
    """

    axes: Mapping[str, tuple[Any, ...]]
    simulated: bool = False

    def __post_init__(self) -> None:
        count = 1
        for values in self.axes.values():
            count *= len(values)
        if count > MOST_CELLS:
            raise UsageError(f"the grid has {count:,} cells, more than {MOST_CELLS:,}: thin it out")
        self._refuse_hopeless()

    @property
    def varying(self) -> tuple[str, ...]:
        """Options with more than one value."""
        return tuple(name for name, values in self.axes.items() if len(values) > 1)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every combination once; the last option given varies fastest."""
        combined = itertools.product(*self.axes.values())
        return tuple(self._cell(dict(zip(self.axes, values, strict=True))) for values in combined)

    def _cell(self, chosen: Values) -> Cell:
        try:
            return Cell(chosen, make_experiment(chosen, simulated=self.simulated))
        except UsageError as error:
            return Cell(chosen, None, str(error))

    def _refuse_hopeless(self) -> None:
        """Raise what is wrong with a value that neither stands alone nor in any of its cells."""
        faulty = [cell for cell in self.cells if cell.fault is not None]
        if len(faulty) == len(self.cells):
            raise UsageError(faulty[0].fault)
        for name in self.axes if faulty else ():
            for value in {cell.chosen[name] for cell in faulty}:
                alone = self._cell({name: value})
                own = (cell.fault for cell in self.cells if cell.chosen[name] == value)
                if alone.fault is not None and all(own):
                    raise UsageError(alone.fault)

    @property
    def digest(self) -> str:
        """Of what was asked: the same command has the same."""
        text = f"{__version__} {self.command()}"
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def words(self) -> list[str]:
        """The options that give this grid again."""
        return words_of_axes(self.axes)

    def command(self, *more: str) -> str:
        """The command line that sweeps it again."""
        simulated = ["--simulated"] * self.simulated
        return shlex.join(["batchbench", "sweep", *self.words(), *simulated, *more])


def make_experiment(
    chosen: Values, *, simulated: bool, cost: KnownCost | None = None
) -> Experiment:
    """The experiment of these options; all others are as the preset, the file or defaults say.

    Raises:
        UsageError: the options do not go together.
    """
    basis: Basis = settings.make_spec(Basis, chosen)
    names = {field.name for field in dataclasses.fields(Basis)}
    own = {name: value for name, value in chosen.items() if name not in names}
    _, file = basis.layers()
    return Experiment.of(file, own, preset=basis.preset, simulated=simulated, cost=cost)


def words_of_axes(axes: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """What to type for the values of options."""
    return [word for name, values in axes.items() for word in _words(name, values)]


def _spelled(value: float) -> str:
    """Return the shortest text that is read as the same number."""
    short = f"{value:.15g}"
    return short if type(value)(float(short)) == value else repr(value)


def _words(name: str, values: tuple[Any, ...]) -> Iterator[str]:
    option = settings.option_name(name)
    if all(isinstance(value, bool) for value in values):
        for value in values:
            yield option if value else option.replace("--", "--no-", 1)
    elif all(isinstance(value, int | float) for value in values):
        yield from (option, ",".join(map(_spelled, values)))
    else:
        for value in values:
            yield from (option, str(value))


GRAMMAR = (
    "a number (8), a list (1,2,4), start:stop (1:3 is 1, 2, 3) or start:stop:step (1:16:5 is 1, 6, "
    "11, 16)"
)

MOST = 10_000
"""Values of one option; a longer range is a slip of the pen."""


def parse_numbers(text: str, kind: type[int] | type[float], option: str) -> list[int | float]:
    """The numbers that ``text`` names, in its order; a stop that is hit is one of them.

    Raises:
        UsageError: the text is not of the grammar, or names too many numbers; names ``option``.
    """
    found: list[int | float] = []
    place = f"{option} {shown(text)}"
    for part in text.split(","):
        for number in _range(part, place):
            value = kind(number)
            if value != number and kind is int:
                raise UsageError(f"{place}: {shown(number)} must be a whole number")
            found.append(value)
        if len(found) > MOST:
            raise UsageError(f"{place}: more than {MOST:,} values; give fewer")
    return found


def _range(part: str, asked: str) -> list[Decimal]:
    """One number, or those of a range; decimals, since 0.1 + 0.2 must be 0.3."""
    numbers = [parse_number(piece, asked, f"must be {GRAMMAR}") for piece in part.split(":")]
    if len(numbers) == 1:
        return numbers
    if len(numbers) > 3:
        raise UsageError(f"{asked}: must be {GRAMMAR}")
    start, stop, step = numbers if len(numbers) == 3 else (*numbers, Decimal(1))
    if step == 0 or (stop - start) / step < 0:
        raise UsageError(
            f"{asked}: a step of {shown(step)} does not lead from {shown(start)} to {shown(stop)}"
        )
    if (stop - start) / step >= MOST:
        raise UsageError(f"{asked}: more than {MOST:,} values; take a larger step")
    return [start + i * step for i in range(int((stop - start) / step) + 1)]


LENGTH = 16
"""Hexadecimal digits: among a million cells two agree by chance once in 4 × 10⁷ such sets."""


def digest_of(experiment: Experiment) -> str:
    """SHA-256, shortened, over all settings, the program's version, and the files that are named.

    Files count with their content, a model's folder with names, sizes and times (its weights may
    be many gigabytes), a policy of the user's own with its source.
    """
    depends = {
        "batchbench": __version__,
        "schema": SCHEMA_VERSION,
        "simulated": experiment.simulated,
        "config": experiment.config(),
        **({"cost": experiment.cost.as_dict()} if experiment.cost else {}),
        "files": {
            **named_files(experiment),
            **{n: _module(n.partition(":")[0]) for n in experiment.serving.strategies if ":" in n},
        },
    }
    text = json.dumps(depends, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def named_files(experiment: Experiment) -> dict[str, Any]:
    """Of every setting that is a path, and of a model that is a folder."""
    found: dict[str, Any] = {}
    for part in ("workload", "serving", "trials", "model"):
        spec = getattr(experiment, part)
        for field in fields(spec):
            value = getattr(spec, field.name)
            file = value if isinstance(value, Path) else _file_of_lengths(field.name, value)
            if file is not None and file.is_file():
                with file.open("rb") as content:
                    found[field.name] = hashlib.file_digest(content, "sha256").hexdigest()
    folder = Path(experiment.model.model)
    if folder.is_dir():
        found["model"] = [
            (file.name, (about := file.stat()).st_size, about.st_mtime_ns)
            for file in sorted(folder.iterdir())
            if file.is_file()
        ]
    return found


def _file_of_lengths(name: str, value: Any) -> Path | None:
    """The file of lengths that ``empirical:FILE`` names."""
    if name not in ("prompt_tokens", "output_tokens") or value is None:
        return None
    file = getattr(parse_lengths(value, settings.option_name(name)), "file", None)
    return None if file is None else Path(file)


def _module(name: str) -> str | None:
    """Digest of a module's source, where it has a file."""
    loaded = sys.modules.get(name)
    origin = getattr(loaded, "__file__", None)
    if origin is None:
        spec = importlib.util.find_spec(name)
        origin = spec.origin if spec is not None else None
    file = Path(origin) if origin else None
    return hashlib.sha256(file.read_bytes()).hexdigest() if file and file.is_file() else None
