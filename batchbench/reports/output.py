"""Files of a result or of a study, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from batchbench.files import write_whole
from batchbench.reports.figures import draw, render
from batchbench.reports.figures.ladder import draw_ladder
from batchbench.reports.figures.trend import draw_trend
from batchbench.reports.formats import html
from batchbench.reports.frames import requests_frame, steps_frame
from batchbench.reports.result import Result, recording_files, to_json
from batchbench.reports.side_by_side import Labelled
from batchbench.studies.ladder.result import LadderResult
from batchbench.studies.ladder.result import to_json as ladder_json
from batchbench.studies.trend.changes import Trend


def write_folder(folder: Path, result: Result) -> list[Path]:
    """Write everything of a result; the paths, ``result.json`` first."""
    return write_whole(folder, _contents(result), stale=["recordings"])


def write_ladder(folder: Path, result: LadderResult) -> list[Path]:
    """Write ``ladder.json``, the picture and the recordings; the paths, ``ladder.json`` first."""
    contents: dict[str, bytes | str] = {"ladder.json": ladder_json(result)}
    figure = draw_ladder(result)
    contents |= {f"ladder.{format}": render(figure, format) for format in ("png", "svg")}
    contents |= recording_files(result.recordings)
    return write_whole(folder, contents, stale=["recordings"])


def write_trend(folder: Path, trend: Trend) -> list[Path]:
    """Write ``trend.json`` and a picture of each line that has one; those of an older look go."""
    data = json.dumps(trend.as_data(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    contents: dict[str, bytes | str] = {"trend.json": data}
    drawn = [figure for judged in trend.lines if (figure := draw_trend(judged)) is not None]
    for i, figure in enumerate(drawn, 1):
        name = "trend" if i == 1 else f"trend-{i}"
        contents |= {f"{name}.{format}": render(figure, format) for format in ("png", "svg")}
    older = {path.name for path in folder.glob("trend*") if path.suffix in (".png", ".svg")}
    return write_whole(folder, contents, stale=sorted(older - contents.keys()))


def _contents(result: Result) -> Mapping[str, bytes | str]:
    """Each file's name and bytes."""
    files: dict[str, bytes | str] = {"result.json": to_json(result)}
    figures = draw(result.recordings, result.title)
    for name, figure in figures.items():
        for format in ("png", "svg"):
            files[f"{name}.{format}"] = render(figure, format)
    files["requests.csv"] = requests_frame(result).to_csv(index=False)
    files["steps.csv"] = steps_frame(result).to_csv(index=False)
    files["report.html"] = html.render([Labelled("", result)])
    return files | recording_files(result.recordings)
