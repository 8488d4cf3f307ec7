"""A ladder on a terminal: the card of the machine, the table of rungs, the sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench.reports.comparison import FEWEST_PAIRS
from batchbench.reports.text import number
from batchbench.studies.ladder.result import LadderResult, count_threads

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
