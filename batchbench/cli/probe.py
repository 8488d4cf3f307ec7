"""The command probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from batchbench import settings
from batchbench.batching.remote.spec import SERVED_MODEL, TargetSpec
from batchbench.cli.options import typed_command, with_options
from batchbench.cli.output import make_console, output_folder, show
from batchbench.errors import UsageError
from batchbench.json_file import json_text
from batchbench.settings import setting

PROBE_HELP = """Find out if a server batches continuously, and how many slots it has.

The server must have OpenAI's completions or chat completions API. The answer is continuous, static,
serial or cannot tell, with the observations of each test. A probe sends up to several hundred short
requests, so run it when nobody else uses the server. Exit code 0; 1 if a request failed; 2 if the
server cannot be reached; 3 if it cannot tell, with --strict.

Example: batchbench probe http://127.0.0.1:8000"""

CANNOT_TELL = 3

_PANEL = "Probe"


@dataclass(frozen=True)
class ProbeSpec:
    """The options of a probe, apart from the connection."""

    model: str = setting(
        SERVED_MODEL,
        "Name of the model on the server; auto: the only model of the server.",
        "Server",
        metavar="NAME",
    )
    max_time: float = setting(
        60.0,
        "Seconds after which the probe stops and judges by what it has observed.",
        _PANEL,
        min=1.0,
        max=86_400.0,
        unit="seconds",
    )
    strict: bool = setting(False, "Exit with code 3 if the probe cannot tell.", _PANEL)
    output: Path | None = setting(
        None,
        "Folder for probe.json and the picture.",
        "Output",
        metavar="DIR",
        default_text="nothing is written",
    )
    overwrite: bool = setting(False, "Replace a result in the folder.", "Output")
    json: bool = setting(False, "Print only probe.json.", "Output")
    quiet: bool = setting(False, "Print only a one-line summary; no progress.", "Output")

    def __post_init__(self) -> None:
        settings.check(self)


@with_options([TargetSpec], omit=("target", "tokenizer", "verify_model", "clients"))
def probe(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL",
            help="Address of the server, such as http://127.0.0.1:8000.",
            show_default=False,
        ),
    ],
    given: Mapping[str, Any],
    spec: ProbeSpec,
) -> None:
    from batchbench.cli.progress import make_display
    from batchbench.studies.probe import ask

    lost, overwrite = "nothing was written", spec.overwrite
    place = output_folder(spec.output, overwrite=overwrite, marker="probe.json", lost=lost)
    try:
        target = TargetSpec(target=url, **given)
        with place:
            with make_display(quiet=spec.quiet) as display:
                findings = ask.probe(target, spec.model, spec.max_time, display)
            from batchbench.studies.probe import report

            command = typed_command()
            data = report.data_of(findings, command)
            files = report.write_probe(spec.output, findings, data) if spec.output else []
            rendered = report.render(findings, make_console().width)
            show(spec, json_text(data), report.sentence(findings), rendered, command, files)
    except UsageError as error:
        raise UsageError(str(error).replace("--target", "URL")) from error
    if findings.failures:
        raise typer.Exit(1)
    if spec.strict and findings.verdict.slots is None:
        raise typer.Exit(CANNOT_TELL)
