"""The report of a ladder: ``ladder.json``, table and sentence for a terminal, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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

from batchbench.batching.experiment import Experiment
from batchbench.batching.models import ModelCache
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.step_cost import Ceiling, middle
from batchbench.batching.trials import WarmUp
from batchbench.files import write_whole
from batchbench.json_file import envelope, json_text
from batchbench.reports import metrics
from batchbench.reports.figures import card as cards
from batchbench.reports.figures import figure_bytes
from batchbench.reports.figures.card import INK, QUIET
from batchbench.reports.result import output_digest, recording_files, workload_facts
from batchbench.reports.result_file import Speedup
from batchbench.reports.statistics import FEWEST_PAIRS, paired_ratio
from batchbench.reports.text import (
    clean_text,
    interval,
    number,
    percent,
    plural,
    spell_number,
    spell_percent,
    times,
)
from batchbench.reports.time_budget import host_share
from batchbench.reports.validity import audit
from batchbench.studies.executors.jobs import Done
from batchbench.studies.ladder.run import Ladder, LadderOutcome
from batchbench.studies.ladder.rungs import LadderSpec

SCHEMA_VERSION = 1

BASELINES = ("notebook", "generate_batch")
"""The rungs that others are compared with: the usual tutorial's loop, and transformers' own."""

_WARM = WarmUp(0, True, None, None)  # all rungs are warmed up before the first round

Rung = Mapping[str, Any]
"""A rung in ``ladder.json``."""


# The data


@dataclass(frozen=True, eq=False)
class LadderResult:
    """The data of ``ladder.json``, and the recordings from which it was made."""

    data: Mapping[str, Any]
    recordings: Mapping[str, Sequence[Recording]]

    @property
    def title(self) -> str:
        """Model, device, batch size and workload in a line."""
        model, slots = self.data["model"], self.data["config"]["serving"]["batch_size"]
        parts = [model["name"], model["device"], plural(slots, "slot")]
        if model["device"] == "cpu":
            parts[1] += f", {plural(self.data['environment']['threads'], 'thread')}"
        return " · ".join([*parts, plural(self.data["workload"]["num_requests"], "request")])

    @property
    def passed(self) -> bool:
        """True if no rung gave a wrong token."""
        return not any(rung["verification"]["wrong"] for rung in self.data["rungs"])


def make_ladder(outcome: LadderOutcome, command: str) -> LadderResult:
    """Return the result of a ladder that just ran."""
    ladder, recordings, ceilings = outcome.ladder, outcome.recordings, outcome.ceilings
    rounds = len(next(iter(recordings.values())))
    during = {
        dtype: [middle([ceilings[i][dtype], ceilings[i + 1][dtype]]) for i in range(rounds)]
        for dtype in ceilings[-1]  # without those whose rungs failed
    }
    on_cpu = ladder.model["device"] == "cpu"
    reasons = [str(why) for why in (outcome.stopped, outcome.failed) if why is not None]
    rungs = []
    for opened in ladder.rungs:
        rung, trials = opened.rung, recordings[opened.rung.name]
        verification = outcome.verifications[rung.name]
        reasons += audit(ladder.workload, {rung.name: trials}, verification, _WARM, None)
        rungs.append(
            {
                **asdict(rung),
                "memory": opened.memory,
                **_figures(trials, during[opened.model.dtype_name], on_cpu=on_cpu),
                "speedup": {name: _speedup(recordings.get(name), trials) for name in BASELINES},
                "verification": {"passed": verification.passed, **asdict(verification)},
            }
        )
    data = {
        **envelope(SCHEMA_VERSION, command),
        "config": {**ladder.experiment.config(), "ladder": asdict(ladder.spec)},
        "environment": dict(ladder.rungs[0].session.environment),
        "model": ladder.model,
        "workload": workload_facts(ladder.workload),
        "card": make_card({dtype: middle(measured) for dtype, measured in during.items()}),
        "measured": [make_card(measured) for measured in ceilings],
        "rungs": rungs,
        "left_out": dict(ladder.left_out),
        "validity": {"status": "suspect" if reasons else "valid", "reasons": reasons},
    }
    return LadderResult(data, recordings)


def make_card(ceilings: Mapping[str, Ceiling]) -> dict[str, Any]:
    """Return what the machine allows as JSON values, by number format."""
    first = next(iter(ceilings.values()))
    return {
        "rows": first.rows,
        "kv_tokens": first.kv_tokens,
        "bandwidth": {**asdict(first.bandwidth), "beyond_cache": first.bandwidth.beyond_cache},
        "formats": {
            dtype: {
                **{name: size for name, size in asdict(limit.reading).items() if name != "dtype"},
                "floor_ms": limit.floor_s * 1e3,
                "products_ms": limit.products_s * 1e3,
                "arithmetic_ms": limit.arithmetic_s and limit.arithmetic_s * 1e3,
                "launching_ms": limit.launching_s and limit.launching_s * 1e3,
                "bound": limit.bound,
                "ceiling_tokens_per_s": limit.tokens_per_s,
            }
            for dtype, limit in ceilings.items()
        },
    }


def _figures(
    trials: Sequence[Recording], ceilings: Sequence[Ceiling], *, on_cpu: bool
) -> dict[str, Any]:
    """Return medians over a rung's trials, each compared with the limits of its own round."""
    steps = [metrics.decode_steps(trial) for trial in trials]
    step_ms = [step.full_ms for step in steps]
    pairs = list(zip(step_ms, ceilings, strict=True))
    growths = [trial.header.about.get("peak_growth_bytes") for trial in trials]
    return {
        "trials": [metrics.summary([trial]) for trial in trials],
        "summary": metrics.summary(trials),
        "counters": metrics.counters(trials[0]) if trials[0].has_steps else None,
        "servings": trials[0].header.about.get("servings", 1),
        "output_digest": output_digest(trials[0]),
        "decode_step_ms": _median(step_ms),
        "decode_step_rows": steps[0].full_rows,
        "floor_share": _median([ms and limit.floor_s * 1e3 / ms for ms, limit in pairs]),
        "times_products": _median([ms and ms / (limit.products_s * 1e3) for ms, limit in pairs]),
        "outside_model": _median([outside_model(trial, on_cpu) for trial in trials]),
        # Only the first trial grows the process: later ones use the same memory again.
        "peak_growth_bytes": max((size for size in growths if size is not None), default=None),
    }


def outside_model(recording: Recording, on_cpu: bool) -> float | None:
    """Return the share of a trial outside the model's forward pass; None if unknown.

    On a GPU it is the share without a running step, since the host's clock cannot time the pass.
    """
    model_ns = recording.header.about.get("model_ns")
    if model_ns is not None:
        return max(0.0, 1 - float(model_ns) / recording.duration_ns)
    return host_share(recording) if recording.has_steps and not on_cpu else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _speedup(baseline: Sequence[Recording] | None, trials: Sequence[Recording]) -> Speedup | None:
    """Return how many times as fast the trials are, round by round; None for the baseline."""
    if baseline is None or baseline is trials:
        return None
    durations = ([trial.duration_ns for trial in rung] for rung in (baseline, trials))
    ratio = paired_ratio(*durations)
    return None if ratio is None else ratio.as_dict()


def to_json(result: LadderResult) -> str:
    """Return ``ladder.json``; a value without meaning is null, never NaN."""
    return json_text(result.data)


def write_ladder(
    folder: Path, result: LadderResult, files: Mapping[str, bytes | str] | None = None
) -> list[Path]:
    """Write ``ladder.json``, the picture and the recordings; return their paths in this order."""
    return write_whole(folder, files or files_of(result), stale=["recordings"])


def files_of(result: LadderResult) -> dict[str, bytes | str]:
    """Return the files of a ladder by name."""
    contents: dict[str, bytes | str] = {"ladder.json": to_json(result)}
    figure = draw_ladder(result)
    contents |= {f"ladder.{format}": figure_bytes(figure, format) for format in ("png", "svg")}
    return contents | recording_files(result.recordings)


@dataclass(frozen=True)
class LadderWork:
    """A whole ladder, run on one machine, where its rungs take turns.

    The file ``failed`` has the error that ended it early, or nothing.
    """

    experiment: Experiment
    spec: LadderSpec
    command: str

    def __call__(self, watch: Watch, models: ModelCache) -> Done:
        ladder = Ladder(self.experiment, self.spec, watch)
        outcome = ladder.run(ladder.measure())
        result = make_ladder(outcome, self.command)
        return Done({**files_of(result), "failed": str(outcome.failed or "")})


# The terminal


def card_lines(card: Mapping[str, Any]) -> list[str]:
    """Return what this machine allows, as lines of text."""
    speed, cache = card["bandwidth"], "size of the last-level cache unknown"
    threads = f", {plural(speed['threads'], 'thread')}" if speed["threads"] else ""
    if speed["cache_bytes"] is not None:
        small = "" if speed["beyond_cache"] else " (too little)"
        cache = f"{speed['buffer_bytes'] / speed['cache_bytes']:.2g} × the last-level cache{small}"
    lines = [
        "What this machine allows",
        f"  memory     {number(speed['bytes_per_s'] / 1e9)} GB/s read{threads}; measured on a "
        f"buffer of {_mib(speed['buffer_bytes'])},",
        f"             {cache}: {speed['method']}, median of {speed['passes']}",
    ]
    for dtype, known in card["formats"].items():
        cached = card["kv_tokens"] * known["kv_token_bytes"]
        lines += [
            f"  {dtype}",
            f"    weights  {_mib(known['weight_bytes'])}, {_mib(known['step_weight_bytes'])} of "
            "them read in each step",
            f"    KV       {number(known['kv_token_bytes'] / 1024)} KiB per token, {_mib(cached)} "
            f"for the {number(card['kv_tokens'])} tokens of {plural(card['rows'], 'request')}",
            f"    limit    {_ms(known['floor_ms'])} ms per decode step by memory: "
            "(weights + KV) / bandwidth",
            f"    products {_ms(known['products_ms'])} ms for the step's matrix products alone",
            *_causes(known),
            f"    ceiling  {known['ceiling_tokens_per_s']:,.0f} tokens/s, limited by "
            f"{known['bound']}",
        ]
    return lines


def _causes(known: Mapping[str, Any]) -> list[str]:
    """Return the lines of a GPU on why its products take their time: arithmetic and launching."""
    if known.get("launching_ms") is None:  # a CPU, or an earlier version's ladder
        return []
    return [
        f"    compute  {number(known['arithmetic_ms'])} ms for them at the rate of a large product",
        f"    launch   {_ms(known['launching_ms'])} ms for as many products with almost no work",
    ]


def _mib(size: float) -> str:
    return f"{number(size / 2**20)} MiB"


def _ms(value: float | None) -> str:
    return "N/A" if value is None else f"{value:.2f}" if value < 10 else f"{value:,.1f}"


def table(result: LadderResult) -> Table:
    """Return a row for each rung."""
    rounds = result.data["config"]["ladder"]["rounds"]
    several = any(rung.get("servings", 1) > 1 for rung in result.data["rungs"])
    with_interval = ", with the 95 % interval" if rounds >= FEWEST_PAIRS else ""
    notes = (
        "÷ notebook, ÷ generate_batch: times as fast, median over "
        f"{plural(rounds, 'round')}{with_interval}",
        f"step: a decode step of {result.data['card']['rows']} rows",
        "÷ products: its time over that of its matrix products alone",
        "memory limit: 100 % reads weights and KV at full memory bandwidth",
        "outside model: share of the time that is not the model's forward pass",
        *[
            "a round of a fast rung serves the workload several times, and the serving of median "
            "duration counts"
        ]
        * several,
    )
    grid = Table(
        title=result.title,
        caption="; ".join(notes),
        title_style="bold",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=0,  # the box has a space between columns, and all must fit in 80
    )
    grid.add_column("Rung,\nchange", overflow="fold")
    for name in (
        "Output\ntok/s",
        "÷ note-\nbook",
        "÷ gener-\nate_batch",
        "Step\nms",
        "÷ pro-\nducts",
        "Memory\nlimit",
        "Outside\nmodel",
        "Tokens\nchecked",
    ):
        grid.add_column(name, justify="right", overflow="fold")
    for rung in result.data["rungs"]:
        label = Text(rung["name"], style="bold")
        label.append(f"\n{rung['change']}", style="not bold dim")
        cells = [
            number(rung["summary"]["output_throughput"]),
            *(_ratio(rung["speedup"][baseline]) for baseline in BASELINES),
            _ms(rung["decode_step_ms"]),
            times(rung["times_products"]),
            percent(rung["floor_share"]),
            percent(rung["outside_model"], 1),
        ]
        grid.add_row(label, *cells, _checked(rung["verification"]))
    return grid


def _ratio(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return "–"
    bounds = ratio["ci95"]
    return times(ratio["median"]) + (f"\n{interval(*bounds)}" if bounds else "")


def _checked(verification: Mapping[str, Any]) -> Text:
    """Return how many requests were checked, and how many were not identical."""
    checked, wrong = verification["requests_checked"], verification["wrong"]
    if not checked:
        return Text("none", style="yellow")
    if wrong:
        return Text(f"{wrong} of {checked}\nWRONG", style="bold red")
    text = Text(f"{verification['identical']} same")
    if ties := verification["numerical_ties"]:
        text.append(f"\n{plural(ties, 'tie')}", style="dim")
    return text


def _fastest(result: LadderResult) -> tuple[Rung | None, str]:
    """Return the fastest rung, or None with the reason why it is not known."""
    first, *others = sorted(result.data["rungs"], key=_throughput, reverse=True)
    if not others:
        return first, ""
    if result.data["validity"]["status"] != "valid":
        return None, "the run is suspect"
    if len(first["trials"]) < FEWEST_PAIRS:
        return None, f"intervals need {FEWEST_PAIRS} rounds"
    for other in others:
        rates = (
            [trial["output_throughput"] for trial in rung["trials"]] for rung in (first, other)
        )
        lead = paired_ratio(*rates)
        if lead is None or lead.low is None or lead.low <= 1:
            return None, f"{first['name']} and {other['name']} do not differ clearly"
    return first, ""


def _throughput(rung: Rung) -> float:
    return float(rung["summary"]["output_throughput"])


def headline(result: LadderResult) -> str:
    """Return the answer: the fastest rung, if it is known."""
    rungs = result.data["rungs"]
    best, why = _fastest(result)
    if best is None:
        return f"No rung is named the fastest, because {why}"
    ratios = " and ".join(
        f"{times(ratio['median'])} as fast as {name}"
        for name, ratio in best["speedup"].items()
        if ratio is not None
    )
    text = f"{best['name']} serves {number(_throughput(best))} output tokens/s"
    if len(rungs) > 1:
        text = f"{best['name']} is the fastest of {len(rungs)} rungs"
    return f"{text}, {ratios}" if ratios else text


def sentence(result: LadderResult) -> str:
    """Return the answer in one sentence."""
    parts, rungs = [headline(result)], result.data["rungs"]
    best, _ = _fastest(result)
    if best is not None and best["decode_step_ms"] is not None:
        parts.append(
            f"its decode step takes {_ms(best['decode_step_ms'])} ms: "
            f"{times(best['times_products'])} the time of its matrix products alone, at "
            f"{percent(best['floor_share'])} of the memory-bandwidth limit"
        )
    wrong = [rung["name"] for rung in rungs if rung["verification"]["wrong"]]
    if wrong:
        parts.append(f"WRONG tokens on {', '.join(wrong)}: {_first_fault(result)}")
    elif all(rung["verification"]["requests_checked"] for rung in rungs):
        parts.append("no wrong tokens on any rung")
    else:
        parts.append("tokens not verified")
    validity = result.data["validity"]
    first, *others = validity["reasons"] or [""]
    more = f"; {len(others)} more in ladder.json" if others else ""
    reasons = f" ({first}{more})" if first else ""
    return "; ".join([*parts, f"run {validity['status']}{reasons}"]) + "."


def _first_fault(result: LadderResult) -> str:
    findings = [f for rung in result.data["rungs"] for f in rung["verification"]["findings"]]
    first = next(finding for finding in findings if finding["verdict"] == "wrong")
    return f"request {first['request']}, {first['reason']}"


def render(result: LadderResult) -> RenderableType:
    """Return the sentence, the table, and the rungs that were left out."""
    status = result.data["validity"]["status"]
    style = "bold" if status == "valid" else "bold yellow" if result.passed else "bold red"
    parts: list[RenderableType] = [Text(sentence(result), style=style), Text(), table(result)]
    for name, why in result.data["left_out"].items():
        parts.append(Text(f"Left out: {name}: {why}", style="dim"))
    return Group(*parts)


# The picture

_ROW, _BAR = 0.46, 0.3  # inches: a rung's row, and its bar

_NAMES, _RATES, _STEPS, _GAP = 1.55, 2.4, 2.7, 0.35  # inches: the columns, and between the last two

_COLOURS = {
    "notebook": ("notebook engine", "#D55E00"),
    "generate_batch": ("generate_batch", "#CC79A7"),
    "slots": ("slots engine", "#0072B2"),
}


def draw_ladder(result: LadderResult) -> Figure:
    """Draw a row for each rung: output tokens/s on the left, ms per decode step on the right."""
    rungs, formats = result.data["rungs"], result.data["card"]["formats"]
    entries, height = _entries(rungs), _ROW * len(rungs)
    head = cards.legend_height(entries)
    with cards.house_style():
        page = cards.make_card(
            clean_text(headline(result)),
            clean_text(result.title),
            head + height + 0.42,
            _notes(result),
        )
        cards.add_legend(page, entries)
        rates = page.axes(_NAMES, head, _RATES, height)
        steps = page.axes(_NAMES + _RATES + _GAP, head, _STEPS, height)
        for i, rung in enumerate(rungs):
            y, colour = head + _ROW * i, _COLOURS[rung["engine"]][1]
            page.write(0, y + 0.09, clean_text(rung["name"]), size=10, weight="bold", color=colour)
            page.write(0, y + 0.25, clean_text(rung["change"]), size=8, color=QUIET)
            _draw_rate(rates, i, rung, colour)
            if rung["decode_step_ms"] is not None:
                _draw_step(steps, i, rung, colour, formats[rung["dtype"]])
        # Room for the numbers behind the bars.
        for axes, room, label in (
            (rates, 1.4, "output tokens/s"),
            (steps, 1.7, "ms per decode step, and % of the memory limit"),
        ):
            axes.set(xlim=(0, room * axes.get_xlim()[1]), ylim=(len(rungs) - 0.5, -0.5))
            axes.set(yticks=[], xlabel=label)
            axes.locator_params(axis="x", nbins=5, prune="upper")
            cards.strip_axes(axes, "bottom")
    return page.figure


def _draw_rate(axes: Axes, row: int, rung: Rung, colour: str) -> None:
    """Draw the throughput as a bar, and each round as a dot."""
    value, rates = _throughput(rung), [trial["output_throughput"] for trial in rung["trials"]]
    axes.barh(row, value, _BAR / _ROW, color=colour, alpha=0.75, lw=0, gid=f"rate-{row}")
    axes.scatter(rates, [row] * len(rates), s=9, c="#ffffff", ec=INK, lw=0.7, zorder=3)
    _write(axes, row, max(value, *rates), spell_number(value))


def _draw_step(axes: Axes, row: int, rung: Rung, colour: str, limits: Mapping[str, float]) -> None:
    """Draw the time of a decode step as a bar, and its two limits as lines."""
    step_ms, floor_ms, products_ms = (
        rung["decode_step_ms"],
        limits["floor_ms"],
        limits["products_ms"],
    )
    axes.barh(row, step_ms, _BAR / _ROW, color=colour, alpha=0.75, lw=0, gid=f"step-{row}")
    for value, style in ((floor_ms, "-"), (products_ms, ":")):
        axes.plot([value] * 2, [row - 0.42, row + 0.42], color=INK, lw=1.6, ls=style, zorder=3)
    text = f"{spell_number(step_ms)} ms, {spell_percent(rung['floor_share'])}"
    _write(axes, row, max(step_ms, floor_ms, products_ms), text)


def _write(axes: Axes, row: int, x: float, text: str) -> None:
    place: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (x, row), size=9, weight="bold", **place)


def _entries(rungs: Sequence[Rung]) -> list[Any]:
    """Return the legend: the engines' colours, and the two limits of a step."""
    engines = dict.fromkeys(_COLOURS[rung["engine"]] for rung in rungs)
    lines = (("memory limit", "-"), ("matrix products", ":"))
    return [
        *((name, (Patch(fc=colour, alpha=0.75, lw=0),)) for name, colour in engines),
        *((name, (Line2D([0], [0], color=INK, lw=1.6, ls=style),)) for name, style in lines),
    ]


def _notes(result: LadderResult) -> str:
    card, rounds = result.data["card"], result.data["config"]["ladder"]["rounds"]
    speed = card["bandwidth"]["bytes_per_s"] / 1e9
    bars = f"Bars: median of {rounds} rounds; dots: the rounds." if rounds > 1 else "One round."
    return (
        f"Memory limit: (weights + KV) / {speed:.3g} GB/s, the bandwidth measured in the same run. "
        f"Decode steps of {card['rows']} rows, medians. {bars} {_limited_by(card['formats'])}"
    )


def _limited_by(formats: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the cause that limits a step, of each number format if they differ."""
    causes = {dtype: known["bound"] for dtype, known in formats.items()}
    if len(set(causes.values())) == 1:
        return f"Steps are limited by {next(iter(causes.values()))}."
    each = ", ".join(f"{dtype} by {cause}" for dtype, cause in causes.items())
    return f"Steps are limited: {each}."
