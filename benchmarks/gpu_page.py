"""Write the figures of a GPU into docs/performance.md.

    python benchmarks/gpu_page.py DIR [--page docs/performance.md]

DIR has the part-1.json, part-2.json and part-3.json of gpu_first_run.py; a part that is missing is
left out. The script replaces what stands between the two ``gpu figures`` comments of the page, so
every figure there comes from those files. It compares them with what the project asks of a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- gpu figures: begin -->", "<!-- gpu figures: end -->"

Figures = Mapping[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(str(cell) for cell in row) + " |"


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def results(part: Figures) -> Iterator[tuple[str, Figures]]:
    """Yield the steps that have a result, with it."""
    for name, step in part.items():
        if step.get("result"):
            yield name, step["result"]


def machine(part: Figures) -> Iterator[str]:
    facts = dict(results(part)).get("facts")
    if facts is None:
        return
    yield (
        f"Measured on one {facts['gpu']} (compute capability {facts['compute_capability']}), "
        f"torch {facts['torch']}, CUDA {facts['cuda']}, transformers {facts['transformers']}."
    )
    yield ""


def steps(part: Figures) -> Iterator[str]:
    """Yield the table of decode steps: time, floor, launches."""
    rows = []
    for name, result in results(part):
        for execution, step in result.get("step", {}).items():
            floor, products = result["floor_us"], result["products_us"]
            rows.append(
                (
                    name.removeprefix("step "),
                    execution,
                    number(step["step_us"], 0),
                    number(step["step_us"] / floor if floor else None),
                    number(step["step_us"] / products if products else None),
                    number(step["kernels"], 0),
                    number(step["kernels_us"], 0),
                )
            )
    if rows:
        yield "A decode step, in bfloat16 (`gpu_first_run.py --part 1`):"
        yield ""
        head = ("model", "execution", "step, µs", "÷ floor", "÷ products", "kernels", "kernels, µs")
        yield from table(head, rows)
        yield ""


def runs(part: Figures) -> Iterator[str]:
    """Yield the table of runs: speed-up, verification, verdict."""
    rows = []
    for name, result in results(part):
        comparison, checked = result.get("comparison"), result.get("verification") or {}
        if comparison is None:
            continue
        speedup = comparison["speedup"]
        interval = speedup.get("ci95") or (None, None)
        outcome = "–"
        if checked.get("requests_checked"):
            total = checked["requests_checked"]
            outcome = f"{checked['wrong']} of {total} wrong, {checked['numerical_ties']} ties"
        validity = result["validity"]
        status = "; ".join([validity["status"], *validity["reasons"]])
        shown = f"{number(speedup['median'])} ({number(interval[0])}–{number(interval[1])})"
        rows.append((name, shown, number(comparison["step_ratio"]), outcome, status))
    if rows:
        yield "Runs (`gpu_first_run.py --part 2`):"
        yield ""
        head = ("run", "speed-up (95 %)", "step ratio", "requests checked", "validity")
        yield from table(head, rows)
        yield ""


def tokens_per_s(rung: Figures) -> float | None:
    trials = sorted(trial["output_throughput"] for trial in rung["trials"])
    middle = len(trials) // 2
    return (trials[middle] + trials[~middle]) / 2 if trials else None


def ladders(part: Figures) -> Iterator[str]:
    """Yield one table a ladder: each rung's tokens/s beside the notebook's."""
    for name, result in results(part):
        if "rungs" not in result:
            continue
        speeds = {rung["name"]: tokens_per_s(rung) for rung in result["rungs"]}
        rows = []
        for rung, speed in speeds.items():
            ratios = [
                number(speed / speeds[other]) if speed and speeds.get(other) else "–"
                for other in ("notebook", "generate_batch")
            ]
            rows.append((rung, number(speed, 0), *ratios))
        yield f"The {name} (`gpu_first_run.py --part 3`; {result['validity']['status']}):"
        yield ""
        yield from table(("rung", "tokens/s", "÷ notebook", "÷ generate_batch"), rows)
        yield ""
        for rung, reason in (result.get("left_out") or {}).items():
            yield f"- {rung} was left out: {reason}"
        yield ""


def failures(parts: Mapping[int, Figures]) -> Iterator[str]:
    """Yield a line for each step that failed or was skipped."""
    for number_, part in parts.items():
        for name, step in part.items():
            if "skipped" in step:
                yield f"- Part {number_}, {name}: skipped, {step['skipped']}."
            elif step["exit_code"] != 0:
                last = step["last_lines"][-1] if step["last_lines"] else "no output"
                yield f"- Part {number_}, {name}: exit code {step['exit_code']}, `{last[:120]}`"


def figures(parts: Mapping[int, Figures]) -> str:
    """Return the figures of all parts as Markdown."""
    lines = [
        *machine(parts.get(1, {})),
        *steps(parts.get(1, {})),
        *runs(parts.get(2, {})),
        *ladders(parts.get(3, {})),
    ]
    failed = list(failures(parts))
    if failed:
        lines += ["Steps without a result:", "", *failed]
    return "\n".join(lines).strip()


def placed(page: str, text: str) -> str:
    """Return the page with the text between its two comments; ValueError if they are missing."""
    before, found, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"the page has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--page", type=Path, default=Path("docs/performance.md"))
    options = parser.parse_args()
    parts = {
        number_: json.loads(file.read_text(encoding="utf-8"))
        for number_ in (1, 2, 3)
        if (file := options.folder / f"part-{number_}.json").is_file()
    }
    if not parts:
        parser.error(f"{options.folder} has no part-1.json, part-2.json or part-3.json")
    page = options.page.read_text(encoding="utf-8")
    options.page.write_text(placed(page, figures(parts)), encoding="utf-8")


if __name__ == "__main__":
    main()
