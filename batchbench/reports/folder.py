"""The result's folder, written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from batchbench.errors import UsageError
from batchbench.reports.figures import draw, render
from batchbench.reports.result import Result, recording_file, to_json
from batchbench.reports.tables import requests_frame, steps_frame


def write_folder(folder: Path, result: Result) -> list[Path]:
    """Write recordings, frames, pictures and ``result.json``; the paths, ``result.json`` first.

    Everything is made in a hidden folder beside its place and moved there when all of it is
    whole; an old result goes first and the new ``result.json`` comes last, so that wherever this
    is cut off, a result.json stands only among its own files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        contents = _contents(result)
        for name, content in contents.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_bytes(content)
        (folder / "result.json").unlink(missing_ok=True)
        shutil.rmtree(folder / "recordings", ignore_errors=True)
        for name in sorted(contents, key=lambda name: name == "result.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, folder / name)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise UsageError(f"--output {folder}: cannot be written: {why}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return [folder / name for name in contents]


def _contents(result: Result) -> Mapping[str, bytes]:
    """Each file's name and bytes."""
    files = {"result.json": to_json(result).encode()}
    figures = draw(result.recordings, result.title)
    for name, figure in figures.items():
        for format in ("png", "svg"):
            files[f"{name}.{format}"] = render(figure, format)
    files["requests.csv"] = requests_frame(result).to_csv(index=False).encode()
    files["steps.csv"] = steps_frame(result).to_csv(index=False).encode()
    for i, trials in enumerate(result.recordings.values()):
        for trial, recording in enumerate(trials):
            files[recording_file(i, trial)] = recording.save()
    return files
