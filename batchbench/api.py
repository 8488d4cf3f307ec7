"""Run one experiment from Python: keyword arguments in, a result out."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from rich.text import Text

from batchbench import settings
from batchbench.batching.experiment import PARTS, Experiment
from batchbench.batching.presets import Basis
from batchbench.batching.progress import Watch
from batchbench.batching.session import conduct
from batchbench.files import check_folder
from batchbench.reports import result as results
from batchbench.reports.formats.terminal import sentence, table
from batchbench.reports.slo import GoalsSpec

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_SPEC_OF: Mapping[str, type] = {
    field.name: spec
    for spec in (Basis, *PARTS.values(), GoalsSpec)
    for field in dataclasses.fields(spec)
}


def run(*, watch: Watch | None = None, **options: Any) -> Result:
    """Serve a workload under static and continuous batching, check the outputs, compare.

        r = batchbench.run(batch_size=8, queue_size=32)
        r.summary, r.requests, r.plot.timeline()

    Args:
        watch: receives progress; None shows nothing.
        options: those of ``batchbench run``, with underscores. Give files as strings or paths, and
            several strategies or limits as a list. ``preset`` and ``workload`` (a TOML file) hold
            settings that the other options replace.

    Raises:
        TypeError: there is no such option; the message names the nearest.
        UsageError: an option is wrong, or cannot be carried out here.
    """
    return _conduct("run", options, watch, simulated=False)


def simulate(*, watch: Watch | None = None, **options: Any) -> Result:
    """Run the experiment on a virtual clock, without a model: every step takes 1 ms.

    Arguments and errors are those of :func:`run`.
    """
    return _conduct("simulate", options, watch, simulated=True)


def load(path: str | Path) -> Result:
    """Read the result in a folder that ``batchbench run`` or :meth:`Result.save` wrote.

    Raises:
        UsageError: there is no result, it is damaged, or it has another schema version.
    """
    result = results.load_result(Path(path))
    return Result(result.data, result.recordings)


def _conduct(
    name: str, options: Mapping[str, Any], watch: Watch | None, *, simulated: bool
) -> Result:
    with settings.python_names(_SPEC_OF):
        values = _typed(name, options)
        basis = settings.make_spec(Basis, values)
        goals = settings.make_spec(GoalsSpec, values)
        own = {option: v for option, v in values.items() if _SPEC_OF[option] in PARTS.values()}
        file = basis.layers()[1:]  # Experiment.of adds the preset's own settings below it
        experiment = Experiment.of(*file, own, preset=basis.preset, simulated=simulated)
        with warnings.catch_warnings():
            # tqdm's, when a library imports it in a notebook that has no widgets.
            warnings.filterwarnings("ignore", message="IProgress not found")
            result = results.make_result(conduct(experiment, watch), goals)
    return Result(result.data, result.recordings)


def _typed(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options, converted to the types of their fields."""
    values: dict[str, Any] = {}
    for option, value in options.items():
        if option not in _SPEC_OF:
            near = difflib.get_close_matches(option.replace("-", "_"), _SPEC_OF, 1)
            hint = f"; did you mean {near[0]}?" if near else "; batchbench run --help lists them"
            raise TypeError(f"{name}() has no option {option!r}{hint}")
        values |= settings.typed(_SPEC_OF[option], {option: value})
    return values


class Result(results.Result):
    """The result of a run: ``result.json`` as data, recordings, frames and pictures.

    Attributes:
        data: the content of ``result.json``; its keys are documented in ``result.schema.json``.
        recordings: the trials of each strategy, the baseline first.
        requests: a pandas DataFrame with one row per request, trial and strategy.
        steps: a DataFrame with one row per span of equal steps, trial and strategy.
        summary: a DataFrame with one row per strategy: metrics, counters and speed-up.
    """

    # pandas and matplotlib take a second to import, so only code that needs them imports them.

    @cached_property
    def requests(self) -> pd.DataFrame:
        from batchbench.reports.output import requests_frame

        return requests_frame(self)

    @cached_property
    def steps(self) -> pd.DataFrame:
        from batchbench.reports.output import steps_frame

        return steps_frame(self)

    @cached_property
    def summary(self) -> pd.DataFrame:
        from batchbench.reports.output import summary_frame

        return summary_frame(self)

    @property
    def plot(self) -> Plots:
        """Functions that draw the pictures that a run writes, as matplotlib figures.

        ``result.plot.timeline().savefig("timeline.svg")`` saves one.
        """
        from batchbench.reports.figures import PICTURES, draw_one

        def picture(name: str) -> Callable[[], Figure]:
            def draw() -> Figure:
                return draw_one(name, self.recordings, self.title)

            draw.__doc__ = PICTURES[name].__doc__
            return draw

        return Plots(**{name: picture(name) for name in PICTURES})

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the files that ``batchbench run --output`` writes, and return the folder.

        Raises:
            UsageError: it cannot be written, or has a result and ``overwrite`` is not given.
        """
        from batchbench.reports.output import write_folder

        with settings.python_names():
            check_folder(Path(folder), overwrite=overwrite)
            write_folder(Path(folder), self)
        return Path(folder)

    def __repr__(self) -> str:
        return f"<batchbench result: {self.title}: {sentence(self)}>"

    def _repr_html_(self) -> str:
        import pandas as pd

        grid = table(self)
        columns = [[_plain(column.header), *map(_plain, column.cells)] for column in grid.columns]
        head, *rows = zip(*columns, strict=True)
        html = pd.DataFrame(rows, columns=head).to_html(index=False, border=0)
        note = (
            "" if grid.caption is None else f"<p><small>{escape(_plain(grid.caption))}</small></p>"
        )
        return (
            f"<p><b>{escape(sentence(self))}</b></p>\n<p>{escape(self.title)}</p>\n{html}\n{note}"
        )


def _plain(cell: object) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)


class Plots(SimpleNamespace):
    """Pictures of a result, a function each."""

    def __getattr__(self, name: str) -> Callable[[], Figure]:
        raise AttributeError(f"there is no picture {name}; there are {', '.join(vars(self))}")
