"""The command compare."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from batchbench import settings
from batchbench.cli.options import with_options
from batchbench.cli.verdict import GateOutputSpec, check_outputs, conclude
from batchbench.reports.conditions import CompareSpec

COMPARE_HELP = """Compare two versions by their results, and say which differences are real.

First the work: the exact counts of closed workloads, and the tokens, where
any change fails. Then speed-ups within a run, which the machine's own speed
cancels out of. Absolute times are compared only between like environments,
and fail only where --fail-if asks for it. Four or more runs a side, each of
a process of its own, in a folder that holds them, tell far more than one.

Exit code 0: nothing is worse, or it cannot be told (--strict makes that 3);
1: something is worse, or the work changed; 2: the two cannot be compared.

Example: batchbench compare batchbench-results/my-run batchbench-results/my-run
Example: batchbench compare batchbench-results/my-run batchbench-results/my-run --fail-if 'output_throughput < -5%'"""  # noqa: E501


@with_options({"question": CompareSpec, "output": GateOutputSpec})
def compare(
    base: Annotated[
        Path,
        typer.Argument(
            metavar="BASE",
            help="A result's folder, its result.json, or a folder of several results.",
            show_default=False,
        ),
    ],
    new: Annotated[
        Path,
        typer.Argument(metavar="NEW", help="The same of the new version.", show_default=False),
    ],
    question: CompareSpec,
    output: GateOutputSpec,
) -> None:
    """Hold two versions against each other."""
    check_outputs(output)
    from batchbench.studies.gate.compare import compare_versions
    from batchbench.studies.gate.runs import load_runs

    words = ["batchbench", "compare", str(base), str(new)]
    typed = shlex.join([*words, *settings.words_of(question, CompareSpec())])
    conclude(compare_versions(load_runs(base), load_runs(new), question, typed), output)
