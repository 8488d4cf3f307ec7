"""The script that measures a GPU: a step that fails costs only itself, and the page is told so."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_first_run  # noqa: E402
import gpu_page  # noqa: E402
from gpu_first_run import Setup, Step  # noqa: E402

RESULT = {
    "model": {},
    "workload": {},
    "environment": {},
    "strategies": {"static": {"summary": {"duration": 2.0}, "counters": None, "trials": [1]}},
    "comparison": {"speedup": {"median": 2.875, "ci95": [2.5, 3.25]}, "step_ratio": 3.08},
    "verification": {"requests_checked": 32, "wrong": 1, "numerical_ties": 2},
    "validity": {"status": "suspect", "reasons": ["static slowed down"]},
}

LADDER = {
    "rungs": [
        {"name": "notebook", "trials": [{"output_throughput": v} for v in (100.0, 90.0, 110.0)]},
        {"name": "graph", "trials": [{"output_throughput": v} for v in (610.0, 590.0)]},
    ],
    "left_out": {"compile": "Triton is missing"},
    "validity": {"status": "valid", "reasons": []},
}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def written(name: str, text: str) -> list[str]:
    """Return a command that writes a file into a folder beside it."""
    folder = name.split("/", maxsplit=1)[0]
    return python(f"import os; os.mkdir({folder!r}); open({name!r}, 'w').write({text!r})")


def steps(setup: Setup) -> list[Step]:
    return [
        Step("figures", python("print('RESULT {\"us\": 3}')"), 60),
        Step("broken", python("import sys; print('no kernel'); sys.exit(3)"), 60),
        Step("hangs", python("import time; print('here', flush=True); time.sleep(600)"), 1),
        Step("run", written("run/result.json", json.dumps(RESULT)), 60, "run"),
    ]


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setitem(gpu_first_run.PARTS, 2, steps)
    assert not gpu_first_run.run_part(2, Setup.real(tmp_path / "shapes"), tmp_path, 300)
    figures: dict[str, Any] = json.loads((tmp_path / "part-2.json").read_text(encoding="utf-8"))
    return figures


def test_a_step_that_fails_or_hangs_costs_only_itself(part: dict[str, Any], tmp_path: Path) -> None:
    assert {name: step["exit_code"] for name, step in part.items()} == {
        "figures": 0,
        "broken": 3,
        "hangs": 124,
        "run": 0,
    }
    assert part["figures"]["result"] == {"us": 3}
    assert part["hangs"]["last_lines"] == ["here"]
    assert "no kernel" in (tmp_path / "part-2.log").read_text(encoding="utf-8")
    with tarfile.open(tmp_path / "part-2.tar.gz") as archive:
        assert "part-2/run/result.json" in archive.getnames()


def test_a_step_keeps_what_matters_of_its_result(part: dict[str, Any]) -> None:
    result = part["run"]["result"]
    assert result["comparison"] == RESULT["comparison"]
    assert result["strategies"]["static"] == {"summary": {"duration": 2.0}, "counters": None}


def test_no_step_begins_when_the_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gpu_first_run.PARTS, 1, steps)
    setup = Setup.real(tmp_path / "shapes")
    assert not gpu_first_run.run_part(1, setup, tmp_path, gpu_first_run.LEAST_S / 2)
    assert capsys.readouterr().out.count("skipped: no time left") == len(steps(setup))


@pytest.mark.parametrize("part", gpu_first_run.PARTS)
def test_the_steps_of_a_part_have_names_and_folders_of_their_own(part: int, tmp_path: Path) -> None:
    for setup in (Setup.real(tmp_path / "real"), Setup.stand_in(tmp_path)):
        made = gpu_first_run.PARTS[part](setup)
        assert len({step.name for step in made}) == len(made)
        folders = [step.folder for step in made if step.folder]
        assert len(set(folders)) == len(folders)
        assert all(step.words[0] == sys.executable for step in made)


def test_the_page_has_the_figures_and_names_what_failed(part: dict[str, Any]) -> None:
    ladder = {"ladder gpt2": {"exit_code": 0, "result": LADDER}}
    text = gpu_page.figures({2: part, 3: ladder})
    assert "| run | 2.88 (2.50–3.25) | 3.08 | 1 of 32 wrong, 2 ties | suspect; static slow" in text
    assert "| graph | 600 | 6.00 | – |" in text
    assert "- compile was left out: Triton is missing" in text
    assert "- Part 2, broken: exit code 3, `no kernel`" in text
    assert "- Part 2, hangs: exit code 124" in text


def test_the_page_changes_only_between_its_comments() -> None:
    page = f"before\n{gpu_page.BEGIN}\nold\n{gpu_page.END}\nafter\n"
    placed = gpu_page.placed(page, "new")
    assert "old" not in placed
    assert placed.startswith("before\n")
    assert placed.endswith("\nafter\n")
    assert gpu_page.placed(placed, "new") == placed
    with pytest.raises(ValueError, match="gpu figures: begin"):
        gpu_page.placed("no comments", "new")


def test_the_documentation_has_a_place_for_the_figures() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert gpu_page.placed(page, "x").count("gpu figures") == 2
