"""Files of a result or of a study, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from batchbench.errors import UsageError
from batchbench.reports.figures import draw, render
from batchbench.reports.figures.ladder import draw_ladder
from batchbench.reports.figures.trend import draw_trend
from batchbench.reports.formats import html
from batchbench.reports.ladder import LadderResult
from batchbench.reports.ladder import to_json as ladder_json
from batchbench.reports.result import Result, recording_files, to_json
from batchbench.reports.side_by_side import Labelled
from batchbench.reports.tables import requests_frame, steps_frame
from batchbench.reports.trend import Trend


def write_folder(folder: Path, result: Result) -> list[Path]:
    """Write everything of a result; the paths, ``result.json`` first."""
    return write_whole(folder, _contents(result), stale=["recordings"])


def write_ladder(folder: Path, result: LadderResult) -> list[Path]:
    """Write ``ladder.json``, the picture and the recordings; the paths, ``ladder.json`` first."""
    contents = {"ladder.json": ladder_json(result).encode()}
    figure = draw_ladder(result)
    contents |= {f"ladder.{format}": render(figure, format) for format in ("png", "svg")}
    contents |= recording_files(result.recordings)
    return write_whole(folder, contents, stale=["recordings"])


def write_trend(folder: Path, trend: Trend) -> list[Path]:
    """Write ``trend.json`` and a picture of each line that has one; those of an older look go."""
    data = json.dumps(trend.as_data(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    contents = {"trend.json": data.encode()}
    drawn = [figure for judged in trend.lines if (figure := draw_trend(judged)) is not None]
    for i, figure in enumerate(drawn, 1):
        name = "trend" if i == 1 else f"trend-{i}"
        contents |= {f"{name}.{format}": render(figure, format) for format in ("png", "svg")}
    older = {path.name for path in folder.glob("trend*") if path.suffix in (".png", ".svg")}
    return write_whole(folder, contents, stale=sorted(older - contents.keys()))


def write_whole(
    folder: Path, contents: Mapping[str, bytes], stale: Collection[str] = ()
) -> list[Path]:
    """Write files so that wherever it is cut off, the first stands only among its own; the paths.

    Everything is made in a hidden folder beside its place and moved there when all of it is
    whole; an old first file goes first and the new one comes last.

    Args:
        contents: by name; the first is what tells readers that the rest is there.
        stale: files and folders of an older writing that must not stay beside this one.

    Raises:
        UsageError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    first = next(iter(contents))
    try:
        for name, content in contents.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_bytes(content)
        (folder / first).unlink(missing_ok=True)
        for name in stale:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name, ignore_errors=True)
            else:
                (folder / name).unlink(missing_ok=True)
        for name in sorted(contents, key=lambda name: name == first):
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
    files["report.html"] = html.render([Labelled("", result)]).encode()
    return files | recording_files(result.recordings)
