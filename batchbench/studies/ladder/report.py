"""A ladder on a terminal: the card of the machine, the table of rungs, the sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench.files import write_whole
from batchbench.reports.figures import figure_bytes
from batchbench.reports.figures.card import (
    INK,
    QUIET,
    Card,
    house_style,
    make_card,
    strip_axes,
    text_extent,
)
from batchbench.reports.result import recording_files
from batchbench.reports.statistics import FEWEST_PAIRS
from batchbench.reports.text import clean_text, number, spell_number, spell_percent
from batchbench.studies.ladder.result import LadderResult, count_threads
from batchbench.studies.ladder.result import to_json as ladder_json

_GB, _MIB = 1e9, 2**20


def card_lines(card: Mapping[str, Any]) -> list[str]:
    """What this machine allows, a line a figure; printed before anything is served."""
    speed = card["bandwidth"]
    threads = f", {count_threads(speed['threads'])}" if speed["threads"] else ""
    lines = [
        "What this machine allows",
        f"  memory     {number(speed['bytes_per_s'] / _GB)} GB/s read{threads}; measured on a "
        f"buffer of {number(speed['buffer_bytes'] / _MIB)} MiB,",
        f"             {_cache(speed)}: {speed['method']}, median of {speed['passes']}",
    ]
    for dtype, known in card["formats"].items():
        cached = card["kv_tokens"] * known["kv_token_bytes"]
        lines += [
            f"  {dtype}",
            f"    weights  {number(known['weight_bytes'] / _MIB)} MiB, "
            f"{number(known['step_weight_bytes'] / _MIB)} MiB of them read in each step",
            f"    KV       {number(known['kv_token_bytes'] / 1024)} KiB a token, "
            f"{number(cached / _MIB)} MiB for the {number(card['kv_tokens'])} tokens of "
            f"{card['rows']} requests",
            f"    floor    {_ms(known['floor_ms'])} ms a decode step: "
            "(weights + KV read) / bandwidth",
            f"    products {_ms(known['products_ms'])} ms: the step's matrix products alone",
            f"    ceiling  {known['ceiling_tokens_per_s']:,.0f} tokens/s, where {known['bound']} "
            "binds",
        ]
    return lines


def _cache(speed: Mapping[str, Any]) -> str:
    if speed["cache_bytes"] is None:
        return "size of the last-level cache unknown"
    times = speed["buffer_bytes"] / speed["cache_bytes"]
    fits = "" if speed["beyond_cache"] else " (too little)"
    return f"{times:.2g} × the last-level cache{fits}"


def _ms(value: float | None) -> str:
    return "N/A" if value is None else f"{value:.2f}" if value < 10 else f"{value:,.1f}"


def table(result: LadderResult) -> Table:
    """A row a rung, from the ground up: how fast, how near to what the machine allows."""
    rounds = result.data["config"]["ladder"]["rounds"]
    notes = [
        f"{rounds} round{'s' * (rounds != 1)}"
        + (", ÷: median over pairs of them" if rounds > 1 else "")
        + (" and its 95 % interval" if rounds >= FEWEST_PAIRS else ""),
        f"step: a decode step of {result.data['card']['rows']} rows",
        "÷ products: by its matrix products alone",
        "floor: share of it that the step reaches",
        "host: time outside the model's forward pass",
    ]
    grid = Table(
        title=result.title,
        caption="; ".join(notes),
        title_style="bold",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=0,  # the box has a space between columns, and 80 of them must do
    )
    grid.add_column("Rung,\nits change", overflow="fold")
    for name in (
        "Output\ntok/s",
        "÷ note-\nbook",
        "÷ gener-\nate_batch",
        "Step\nms",
        "÷ pro-\nducts",
        "Floor\n%",
        "Host\n%",
        "Tokens\nchecked",
    ):
        grid.add_column(name, justify="right", overflow="fold")
    for rung in result.data["rungs"]:
        grid.add_row(*_row(rung))
    return grid


def _row(rung: Mapping[str, Any]) -> list[Text]:
    name = Text(rung["name"], style="bold")
    name.append(f"\n{rung['change']}", style="not bold dim")
    cells = [
        number(rung["summary"]["output_throughput"]),
        *(_against(rung["speedup"][yardstick]) for yardstick in rung["speedup"]),
        _ms(rung["decode_step_ms"]),
        "N/A" if rung["times_products"] is None else f"{rung['times_products']:.2f}×",
        _percent(rung["floor_share"], 0),
        _percent(rung["outside_model"], 1),
    ]
    return [name, *map(Text, cells), _checked(rung["verification"])]


def _against(ratio: Mapping[str, Any] | None) -> str:
    """A ratio, and under it its interval."""
    if ratio is None:
        return "–"
    interval = ratio["ci95"]
    text = f"{ratio['median']:.2f}×"
    return text if interval is None else f"{text}\n{interval[0]:.2f}–{interval[1]:.2f}"


def _percent(share: float | None, digits: int) -> str:
    return "N/A" if share is None else f"{100 * share:.{digits}f}"


def _checked(found: Mapping[str, Any]) -> Text:
    """How many requests were checked, and what was not identical."""
    if not found["requests_checked"]:
        return Text("none", style="yellow")
    if found["wrong"]:
        return Text(f"{found['wrong']} of {found['requests_checked']}\nWRONG", style="bold red")
    text = Text(f"{found['identical']} same")
    if found["numerical_ties"]:
        ties = found["numerical_ties"]
        text.append(f"\n{ties} tie{'s' * (ties > 1)}", style="dim")
    return text


def sentence(result: LadderResult) -> str:
    """The answer in one sentence."""
    rungs = result.data["rungs"]
    best = max(rungs, key=lambda rung: rung["summary"]["output_throughput"])
    faster = [
        f"{ratio['median']:.2f}× {name}"
        for name, ratio in best["speedup"].items()
        if ratio is not None
    ]
    parts = [
        f"{best['name']} is the fastest of {len(rungs)} rungs"
        if len(rungs) > 1
        else f"{best['name']} yields {number(best['summary']['output_throughput'])} tokens/s",
    ]
    if faster:
        parts[-1] += f", {' and '.join(faster)}"
    if best["decode_step_ms"] is not None:
        share = _percent(best["floor_share"], 0)
        parts.append(
            f"its decode step of {_ms(best['decode_step_ms'])} ms is {best['times_products']:.2f}× "
            f"its matrix products alone and reaches {share} % of the floor"
        )
    wrong = [rung["name"] for rung in rungs if rung["verification"]["wrong"]]
    checked = all(rung["verification"]["requests_checked"] for rung in rungs)
    if wrong:
        parts.append(f"WRONG tokens on {', '.join(wrong)}: {_first_fault(result)}")
    else:
        parts.append("no token wrong on any" if checked else "tokens not verified")
    validity = result.data["validity"]
    first, *others = validity["reasons"] or [""]
    more = f"; {len(others)} more in ladder.json" if others else ""
    reasons = f" ({first}{more})" if first else ""
    return "; ".join([*parts, f"run {validity['status']}{reasons}"]) + "."


def _first_fault(result: LadderResult) -> str:
    """What went wrong first, of the lowest rung on which something did."""
    findings = [f for rung in result.data["rungs"] for f in rung["verification"]["findings"]]
    first = next(finding for finding in findings if finding["verdict"] == "wrong")
    return f"request {first['request']}, {first['reason']}"


def render(result: LadderResult) -> RenderableType:
    """Table and sentence."""
    status = result.data["validity"]["status"]
    style = "bold" if status == "valid" else "bold yellow" if result.passed else "bold red"
    parts: list[RenderableType] = [Text(sentence(result), style=style), Text(), table(result)]
    for name, why in result.data["left_out"].items():
        parts.append(Text(f"Left out: {name}: {why}", style="dim"))
    return Group(*parts)


_ROW, _BAR, _HEAD = 0.46, 0.3, 0.4  # inches: a rung's row, its bar, and legend and titles above

_NAMES, _RATES, _STEPS = 1.55, 2.4, 2.7  # inches: the three columns

_GAP = 0.35

_KINDS = {
    "notebook": ("the notebook's way", "#D55E00"),
    "generate_batch": ("transformers' generate_batch", "#CC79A7"),
    "slots": ("slots engine", "#0072B2"),
}

Rung = Mapping[str, Any]


def draw_ladder(result: LadderResult) -> Figure:
    """A row a rung, from the ground up: tokens/s on the left, ms a decode step on the right."""
    rungs = result.data["rungs"]
    with house_style():
        tall = _ROW * len(rungs)
        card = make_card(
            _headline(rungs), clean_text(result.title), _HEAD + tall + 0.42, _notes(result)
        )
        _legend(card, rungs)
        for i, rung in enumerate(rungs):
            y = _HEAD + _ROW * i
            colour = _KINDS[rung["engine"]][1]
            card.write(0, y + 0.09, clean_text(rung["name"]), size=10, weight="bold", color=colour)
            card.write(0, y + 0.25, clean_text(rung["change"]), size=8, color=QUIET)
        left = _NAMES
        _rates(card.axes(left, _HEAD, _RATES, tall), rungs)
        left += _RATES + _GAP
        _steps(card.axes(left, _HEAD, _STEPS, tall), rungs, result.data["card"]["formats"])
    return card.figure


def _rates(axes: Axes, rungs: Sequence[Rung]) -> None:
    """Output tokens a second, every round a dot."""
    far = 0.0
    for i, rung in enumerate(rungs):
        value = rung["summary"]["output_throughput"]
        each = np.array([trial["output_throughput"] for trial in rung["trials"]])
        _bar(axes, i, value, rung, f"rate-{i}")
        axes.scatter(each, np.full(len(each), i), s=9, c="#ffffff", ec=INK, lw=0.7, zorder=3)
        reach = max(value, float(each.max()))
        far = max(far, _write(axes, i, reach, spell_number(value), _RATES))
    axes.set(xlim=(0, far), xlabel="output tokens/s")
    _rows(axes, len(rungs), 4)


def _steps(axes: Axes, rungs: Sequence[Rung], formats: Mapping[str, Any]) -> None:
    """Milliseconds a decode step, and the least that its number format allows."""
    far = 0.0
    for i, rung in enumerate(rungs):
        if (took := rung["decode_step_ms"]) is None:
            continue
        _bar(axes, i, took, rung, f"step-{i}")
        known = formats[rung["dtype"]]
        for value, style in ((known["floor_ms"], "-"), (known["products_ms"], ":")):
            axes.plot([value] * 2, [i - 0.42, i + 0.42], color=INK, lw=1.6, ls=style, zorder=3)
            far = max(far, value * 1.05)
        text = f"{spell_number(took)} ms, {spell_percent(rung['floor_share'])}"
        reach = max(took, known["products_ms"], known["floor_ms"])
        far = max(far, _write(axes, i, reach, text, _STEPS))
    axes.set(xlim=(0, far or 1), xlabel="ms a decode step, and the share of the floor reached")
    _rows(axes, len(rungs), 5)


def _bar(axes: Axes, row: int, value: float, rung: Rung, gid: str) -> None:
    colour = _KINDS[rung["engine"]][1]
    axes.barh(row, value, _BAR / _ROW, color=colour, alpha=0.75, lw=0, gid=gid)


def _write(axes: Axes, row: int, far: float, text: str, width: float) -> float:
    """A figure behind its bar; where the axis must end so that it has room."""
    style: dict[str, Any] = {"size": 9, "weight": "bold", "va": "center"}
    axes.annotate(text, (far, row), (5, 0), textcoords="offset points", **style)
    points = width * 72
    return far * points / (points - text_extent(text, 9, "bold") - 8)


def _rows(axes: Axes, rows: int, ticks: int) -> None:
    axes.set(ylim=(rows - 0.5, -0.5), yticks=[])
    axes.locator_params(axis="x", nbins=ticks, prune="upper")
    strip_axes(axes, "bottom")


def _legend(card: Card, rungs: Sequence[Rung]) -> None:
    """Whose way a bar is, and the two lines."""
    engines = list(dict.fromkeys(rung["engine"] for rung in rungs))
    handles: list[Any] = [Patch(fc=_KINDS[e][1], alpha=0.75, lw=0) for e in engines]
    labels = [_KINDS[e][0] for e in engines]
    for name, style in (("floor", "-"), ("matrix products alone", ":")):
        handles.append(Line2D([0], [0], color=INK, lw=1.6, ls=style))
        labels.append(name)
    card.figure.legend(
        handles,
        labels,
        ncols=len(labels),
        loc="upper left",
        bbox_to_anchor=card.at(0, 0.05),
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.6,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def _headline(rungs: Sequence[Rung]) -> str:
    best = max(rungs, key=lambda rung: rung["summary"]["output_throughput"])
    text = f"{best['name']} yields {spell_number(best['summary']['output_throughput'])} tokens/s"
    ratios = {name: ratio for name, ratio in best["speedup"].items() if ratio is not None}
    if ratios:
        text += ", " + " and ".join(
            f"{ratio['median']:.2f}× {name}" for name, ratio in ratios.items()
        )
    return clean_text(text)


def _notes(result: LadderResult) -> str:
    card, rounds = result.data["card"], result.data["config"]["ladder"]["rounds"]
    speed = card["bandwidth"]["bytes_per_s"] / 1e9
    notes = [
        f"Floor: (weights + KV read) / {speed:.3g} GB/s, the bandwidth measured in the same run.",
        f"Decode steps of {card['rows']} rows, medians.",
        f"Bars: median of {rounds} rounds in turns; dots: the rounds."
        if rounds > 1
        else "One round.",
    ]
    return " ".join(notes)


def write_ladder(folder: Path, result: LadderResult) -> list[Path]:
    """Write ``ladder.json``, the picture and the recordings; the paths, ``ladder.json`` first."""
    contents: dict[str, bytes | str] = {"ladder.json": ladder_json(result)}
    figure = draw_ladder(result)
    contents |= {f"ladder.{format}": figure_bytes(figure, format) for format in ("png", "svg")}
    contents |= recording_files(result.recordings)
    return write_whole(folder, contents, stale=["recordings"])
