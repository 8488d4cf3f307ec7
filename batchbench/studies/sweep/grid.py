"""A grid of experiments: every combination of the values given to some options."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

from batchbench import settings
from batchbench.batching.experiment import (
    PARTS,
    Experiment,
    digest_of_file,
    make_experiment,
    named_files,
)
from batchbench.batching.presets import Basis
from batchbench.errors import UsageError, shown
from batchbench.settings import parse_number
from batchbench.version import SCHEMA_VERSION, __version__

SWEPT: Mapping[str, type] = {"basis": Basis, **PARTS}
"""Specs whose fields may be swept."""

MOST_CELLS = 100_000

Values = Mapping[str, Any]
"""Values of options by field name."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One experiment of a grid, or the reason why its options do not go together."""

    chosen: Values  # values of the options that were given
    experiment: Experiment | None
    fault: str | None = None
    server: str | None = None  # what the server of --target says it is
    saved_digest: str | None = None

    @cached_property
    def digest(self) -> str:
        """Name of the cell's folder; equal digests give equal results."""
        assert self.experiment is not None, self.fault
        return self.saved_digest or digest_of(self.experiment, self.server)


@dataclass(frozen=True)
class Grid:
    """All combinations of the values given to options.

    Raises UsageError if a value is invalid with any other options.
    """

    axes: Mapping[str, tuple[Any, ...]]  # by field name; other options keep their defaults
    simulated: bool = False  # on a virtual clock, where every step costs one unit
    # What the server of each --target says it is: another one at the address has other cells.
    servers: Mapping[str, str] = field(default_factory=dict)
    # Of a saved sweep: its server, version and files may have changed since.
    digests: Sequence[str | None] = ()

    def __post_init__(self) -> None:
        count = math.prod(map(len, self.axes.values()))
        if count > MOST_CELLS:
            raise UsageError(
                f"the grid has {count:,} cells, more than {MOST_CELLS:,}: give fewer values"
            )
        self._refuse_hopeless()

    @property
    def varying(self) -> tuple[str, ...]:
        return tuple(name for name, values in self.axes.items() if len(values) > 1)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every combination once; the last option varies fastest."""
        combinations = itertools.product(*self.axes.values())
        cells = (self._cell(dict(zip(self.axes, v, strict=True))) for v in combinations)
        saved = itertools.chain(self.digests, itertools.repeat(None))
        return tuple(replace(cell, saved_digest=d) for cell, d in zip(cells, saved, strict=False))

    def _cell(self, chosen: Values) -> Cell:
        try:
            experiment = make_experiment(chosen, simulated=self.simulated)
            return Cell(chosen, experiment, server=self.servers.get(chosen.get("target", "")))
        except UsageError as error:
            return Cell(chosen, None, str(error))

    def _refuse_hopeless(self) -> None:
        """Raise UsageError for a value that is wrong alone and in every one of its cells."""
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
        """Name of the default folder; the same command has the same."""
        text = f"{__version__} {self.command()}"
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def command(self, *more: str) -> str:
        """Return the command line that sweeps this grid."""
        simulated = ["--simulated"] * self.simulated
        return shlex.join(["batchbench", "sweep", *words_of_axes(self.axes), *simulated, *more])


def words_of_axes(axes: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """Return the words that give options these values on a command line."""
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


_GRAMMAR = (
    "a number (8), a list (1,2,4), start:stop (1:3 is 1, 2, 3) or start:stop:step (1:16:5 is 1, 6, "
    "11, 16)"
)

MOST = 10_000
"""Values of one option; a longer range is a typing error."""


def parse_numbers(text: str, kind: type[int] | type[float], option: str) -> list[int | float]:
    """Return the numbers that a text names, in its order; a range includes its stop."""
    numbers: list[int | float] = []
    place = f"{option} {shown(text)}"
    for part in text.split(","):
        for number in _range(part, place):
            value = kind(number)
            if value != number and kind is int:
                raise UsageError(f"{place}: {shown(number)} must be a whole number")
            numbers.append(value)
        if len(numbers) > MOST:
            raise UsageError(f"{place}: more than {MOST:,} values; give fewer")
    return numbers


def _range(part: str, place: str) -> list[Decimal]:
    """Parse one number or a range; decimals, since 0.1 + 0.2 must be 0.3."""
    numbers = [parse_number(piece, place, f"must be {_GRAMMAR}") for piece in part.split(":")]
    if len(numbers) == 1:
        return numbers
    if len(numbers) > 3:
        raise UsageError(f"{place}: must be {_GRAMMAR}")
    start, stop, step = numbers if len(numbers) == 3 else (*numbers, Decimal(1))
    if step == 0 or (stop - start) / step < 0:
        raise UsageError(
            f"{place}: a step of {shown(step)} does not lead from {shown(start)} to {shown(stop)}"
        )
    if (stop - start) / step >= MOST:
        raise UsageError(f"{place}: more than {MOST:,} values; take a larger step")
    return [start + i * step for i in range(int((stop - start) / step) + 1)]


LENGTH = 16
"""Hexadecimal digits: two of a million cells agree by chance once in 4 × 10⁷ sweeps."""


def digest_of(experiment: Experiment, server: str | None = None) -> str:
    """Return a shortened SHA-256 over all settings, the program's version and named files.

    Files enter with their content, a model's folder with names, sizes and times (its weights may
    be many gigabytes), a policy of the user with its source.
    """
    depends = {
        "batchbench": __version__,
        "schema": SCHEMA_VERSION,
        "simulated": experiment.simulated,
        "config": experiment.config(),
        **({"cost": experiment.cost.as_dict()} if experiment.cost else {}),
        **({"server": server} if server else {}),
        "files": {
            **named_files(experiment),
            **{n: _module(n.partition(":")[0]) for n in experiment.serving.strategies if ":" in n},
        },
    }
    text = json.dumps(depends, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def _module(name: str) -> str | None:
    """Return the digest of a module's source, if it has a file."""
    origin = getattr(sys.modules.get(name), "__file__", None)
    if origin is None:
        spec = importlib.util.find_spec(name)
        origin = spec.origin if spec is not None else None
    file = Path(origin) if origin else None
    return digest_of_file(file) if file and file.is_file() else None
