"""A grid: the cells that some options span, each of them one experiment."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import batchbench
from batchbench import settings
from batchbench.batching.experiment import PARTS, Experiment
from batchbench.batching.presets import Basis
from batchbench.batching.step_cost import KnownCost
from batchbench.errors import UsageError

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
        from batchbench.studies.identity import digest_of  # NumPy and SciPy, only now

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
        text = f"{batchbench.__version__} {self.command()}"
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
