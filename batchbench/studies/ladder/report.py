"""The report of a ladder: ``ladder.json``, table and sentence for a terminal, and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from batchbench.json_file import envelope, json_text
from batchbench.reports import metrics
from batchbench.reports.figures import card as cards
from batchbench.reports.figures import figure_bytes
from batchbench.reports.figures.card import INK, QUIET
from batchbench.reports.result import output_digest, recording_files, workload_facts
from batchbench.reports.result_data import Speedup, Summary, VerificationFacts
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

Data = Mapping[str, Any]
"""The data of ``ladder.json``, and of a rung in it."""


# The data


def title_of(data: Data) -> str:
    """Return model, device, batch size and workload in a line."""
    model, slots = data["model"], data["config"]["serving"]["batch_size"]
    parts = [model["name"], model["device"], plural(slots, "slot")]
    if model["device"] == "cpu":
        parts[1] += f", {plural(data['environment']['threads'], 'thread')}"
    return " · ".join([*parts, plural(data["workload"]["num_requests"], "request")])


def passed(data: Data) -> bool:
    """Return True if no rung gave a wrong token."""
    return not any(rung["verification"]["wrong"] for rung in data["rungs"])


def make_ladder(outcome: LadderOutcome, command: str) -> dict[str, Any]:
    """Return the data of ``ladder.json`` of a ladder that just ran."""
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
    return {
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
        "floor_share": _median(ms and limit.floor_s * 1e3 / ms for ms, limit in pairs),
        "times_products": _median(ms and ms / (limit.products_s * 1e3) for ms, limit in pairs),
        "outside_model": _median(outside_model(trial, on_cpu) for trial in trials),
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


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _speedup(baseline: Sequence[Recording] | None, trials: Sequence[Recording]) -> Speedup | None:
    """Return how many times as fast the trials are, round by round; None for the baseline."""
    if baseline is None or baseline is trials:
        return None
    ratio = paired_ratio(*([trial.duration_ns for trial in rung] for rung in (baseline, trials)))
    return None if ratio is None else ratio.as_dict()


STALE = ("recordings",)
"""What is removed of an earlier ladder in the same folder."""


def files_of(outcome: LadderOutcome, data: Data) -> dict[str, bytes | str]:
    """Return the files of a ladder by name."""
    figure = draw_ladder(data)
    pictures = {f"ladder.{format}": figure_bytes(figure, format) for format in ("png", "svg")}
    return {"ladder.json": json_text(data), **pictures, **recording_files(outcome.recordings)}


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
        files = files_of(outcome, make_ladder(outcome, self.command))
        return Done({**files, "failed": str(outcome.failed or "")})


# The terminal


def card_lines(card: Mapping[str, Any]) -> list[str]:
    """Return what this machine allows, as lines of text."""
    speed, cache = card["bandwidth"], "size of the last-level cache unknown"
    threads = f", {plural(speed['threads'], 'thread')}" if speed["threads"] else ""
    if speed["cache_bytes"] is not None:
        small = "" if speed["beyond_cache"] else " (too small)"
        cache = f"{speed['buffer_bytes'] / speed['cache_bytes']:.2g} × the last-level cache{small}"
    lines = [
        "What this machine allows",
        f"  memory     {number(speed['bytes_per_s'] / 1e9)} GB/s read{threads}; measured on a "
        f"buffer of {_mib(speed['buffer_bytes'])},",
        f"             {cache}: {speed['method']}, median of {speed['passes']}",
    ]
    for dtype, known in card["formats"].items():
        weights, read = _mib(known["weight_bytes"]), _mib(known["step_weight_bytes"])
        token, cached = number(known["kv_token_bytes"] / 1024), card["kv_tokens"]
        kept = f"{_mib(cached * known['kv_token_bytes'])} for the {number(cached)} tokens"
        rows = {
            "weights": f"{weights}, {read} of them read in each step",
            "KV": f"{token} KiB per token, {kept} of {plural(card['rows'], 'request')}",
            "limit": f"{_ms(known['floor_ms'])} ms per memory-bound decode step: (weights + KV) / "
            "bandwidth",
            "products": f"{_ms(known['products_ms'])} ms for the step's matrix products alone",
        }
        if known.get("launching_ms") is not None:  # not on a CPU, nor in an earlier version's file
            large, launch = number(known["arithmetic_ms"]), _ms(known["launching_ms"])
            rows["compute"] = f"{large} ms for these products at the rate of a large one"
            rows["launch"] = f"{launch} ms for as many products of almost no work"
        rate = f"{known['ceiling_tokens_per_s']:,.0f} tokens/s"
        rows["ceiling"] = f"{rate}, limited by {known['bound']}"
        lines += [f"  {dtype}", *(f"    {name:<8} {text}" for name, text in rows.items())]
    return lines


def _mib(size: float) -> str:
    return f"{number(size / 2**20)} MiB"


def _ms(value: float | None) -> str:
    return "N/A" if value is None else f"{value:.2f}" if value < 10 else f"{value:,.1f}"


def table(data: Data) -> Table:
    """Return a row for each rung."""
    rounds, rungs = data["config"]["ladder"]["rounds"], data["rungs"]
    with_interval = ", with the 95 % interval" if rounds >= FEWEST_PAIRS else ""
    notes = [
        "÷ notebook, ÷ generate_batch: how many times as fast, median over "
        f"{plural(rounds, 'round')}{with_interval}",
        f"step: a decode step of {data['card']['rows']} rows",
        "÷ products: time of a decode step ÷ time of its matrix products alone",
        "memory limit: at 100 %, a step reads weights and KV at full memory bandwidth",
        "outside model: share of the time that is not the model's forward pass",
    ]
    if any(rung.get("servings", 1) > 1 for rung in rungs):
        notes.append(
            "a round of a fast rung serves the workload several times, and the serving of median "
            "duration counts"
        )
    grid = Table(
        title=title_of(data),
        caption="; ".join(notes),
        title_style="bold",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=0,  # the box has a space between columns, and all must fit in 80
    )
    grid.add_column("Rung,\nchange", overflow="fold")
    columns = ("Output\ntok/s", "÷ note-\nbook", "÷ gener-\nate_batch", "Step\nms")
    for name in (*columns, "÷ pro-\nducts", "Memory\nlimit", "Outside\nmodel", "Tokens\nchecked"):
        grid.add_column(name, justify="right", overflow="fold")
    for rung in rungs:
        label = Text(rung["name"], style="bold")
        label.append(f"\n{rung['change']}", style="not bold dim")
        grid.add_row(
            label,
            number(_throughput(rung)),
            *(_ratio(rung["speedup"][baseline]) for baseline in BASELINES),
            _ms(rung["decode_step_ms"]),
            times(rung["times_products"]),
            percent(rung["floor_share"]),
            percent(rung["outside_model"], 1),
            _checked(rung["verification"]),
        )
    return grid


def _ratio(ratio: Speedup | None) -> str:
    if ratio is None:
        return "–"
    bounds = ratio["ci95"]
    return times(ratio["median"]) + (f"\n{interval(bounds[0], bounds[1])}" if bounds else "")


def _checked(verification: VerificationFacts) -> Text:
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


def _fastest(data: Data) -> tuple[Data | None, str]:
    """Return the fastest rung, or None with the reason why it is not known."""
    first, *others = sorted(data["rungs"], key=_throughput, reverse=True)
    if not others:
        return first, ""
    if data["validity"]["status"] != "valid":
        return None, "the run is suspect"
    if len(first["trials"]) < FEWEST_PAIRS:
        return None, f"intervals need {FEWEST_PAIRS} rounds"
    for other in others:
        lead = paired_ratio(_rates(first), _rates(other))
        if lead is None or lead.low is None or lead.low <= 1:
            return None, f"{first['name']} and {other['name']} do not differ clearly"
    return first, ""


def _throughput(rung: Data) -> float:
    summary: Summary = rung["summary"]
    return summary["output_throughput"]


def _rates(rung: Data) -> list[float]:
    return [trial["output_throughput"] for trial in rung["trials"]]


def headline(data: Data) -> str:
    """Return the answer: the fastest rung, if it is known."""
    best, why = _fastest(data)
    if best is None:
        return f"No rung is named the fastest, because {why}"
    text = f"{best['name']} serves {number(_throughput(best))} output tokens/s"
    if len(data["rungs"]) > 1:
        text = f"{best['name']} is the fastest of {len(data['rungs'])} rungs"
    ratios = " and ".join(
        f"{times(ratio['median'])} as fast as {name}"
        for name, ratio in best["speedup"].items()
        if ratio is not None
    )
    return f"{text}, {ratios}" if ratios else text


def sentence(data: Data) -> str:
    """Return the answer in one sentence."""
    parts, rungs = [headline(data)], data["rungs"]
    best, _ = _fastest(data)
    if best is not None and best["decode_step_ms"] is not None:
        parts.append(
            f"its decode step takes {_ms(best['decode_step_ms'])} ms: "
            f"{times(best['times_products'])} the time of its matrix products alone, at "
            f"{percent(best['floor_share'])} of the memory-bandwidth limit"
        )
    wrong = [rung["name"] for rung in rungs if rung["verification"]["wrong"]]
    if wrong:
        parts.append(f"WRONG tokens on {', '.join(wrong)}: {_first_fault(data)}")
    elif all(rung["verification"]["requests_checked"] for rung in rungs):
        parts.append("no wrong tokens on any rung")
    else:
        parts.append("tokens not verified")
    validity = data["validity"]
    first, *others = validity["reasons"] or [""]
    more = f"; {len(others)} more in ladder.json" if others else ""
    reasons = f" ({first}{more})" if first else ""
    return "; ".join([*parts, f"run {validity['status']}{reasons}"]) + "."


def _first_fault(data: Data) -> str:
    findings = (f for rung in data["rungs"] for f in rung["verification"]["findings"])
    first = next(finding for finding in findings if finding["verdict"] == "wrong")
    return f"request {first['request']}, {first['reason']}"


def render(data: Data) -> RenderableType:
    """Return the sentence, the table, and the rungs that were left out."""
    status = data["validity"]["status"]
    style = "bold" if status == "valid" else "bold yellow" if passed(data) else "bold red"
    parts: list[RenderableType] = [Text(sentence(data), style=style), Text(), table(data)]
    for name, why in data["left_out"].items():
        parts.append(Text(f"Left out: {name}: {why}", style="dim"))
    return Group(*parts)


# The picture

_ROW, _BAR = 0.46, 0.3  # inches: a rung's row, and its bar

_NAMES, _RATES, _STEPS, _GAP = 1.55, 2.4, 2.7, 0.35  # inches: the columns, and between the last two

_LIMITS = {"memory limit": "-", "matrix products": ":"}
"""Limits of a step, with the styles of their lines."""

_COLOURS = {
    "notebook": ("notebook engine", "#D55E00"),
    "generate_batch": ("generate_batch", "#CC79A7"),
    "slots": ("slots engine", "#0072B2"),
}


def draw_ladder(data: Data) -> Figure:
    """Draw a row for each rung: output tokens/s on the left, ms per decode step on the right."""
    rungs, formats = data["rungs"], data["card"]["formats"]
    entries, height = _entries(rungs), _ROW * len(rungs)
    head = cards.legend_height(entries)
    with cards.house_style():
        page = cards.make_card(
            clean_text(headline(data)),
            clean_text(title_of(data)),
            head + height + 0.42,
            _notes(data),
        )
        cards.add_legend(page, entries)
        rates = page.axes(_NAMES, head, _RATES, height)
        steps = page.axes(_NAMES + _RATES + _GAP, head, _STEPS, height)
        for i, rung in enumerate(rungs):
            y, colour = head + _ROW * i, _COLOURS[rung["engine"]][1]
            page.write(0, y + 0.09, clean_text(rung["name"]), size=10, weight="bold", color=colour)
            page.write(0, y + 0.25, clean_text(rung["change"]), size=8, color=QUIET)
            rounds, value = _rates(rung), _throughput(rung)
            step_ms, limits = rung["decode_step_ms"], []
            _draw_bar(rates, i, value, colour, f"rate-{i}", spell_number(value), max(rounds))
            rates.scatter(rounds, [i] * len(rounds), s=9, c="#ffffff", ec=INK, lw=0.7, zorder=3)
            if step_ms is not None:
                limits = [formats[rung["dtype"]][name] for name in ("floor_ms", "products_ms")]
                text = f"{spell_number(step_ms)} ms, {spell_percent(rung['floor_share'])}"
                _draw_bar(steps, i, step_ms, colour, f"step-{i}", text, max(limits))
            for limit, style in zip(limits, _LIMITS.values(), strict=False):
                ends = [i - 0.42, i + 0.42]
                steps.plot([limit] * 2, ends, color=INK, lw=1.6, ls=style, zorder=3)
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


def _draw_bar(
    axes: Axes, row: int, value: float, colour: str, gid: str, text: str, beyond: float
) -> None:
    """Draw a value as a bar, and a text to its right, past marks that reach ``beyond``."""
    axes.barh(row, value, _BAR / _ROW, color=colour, alpha=0.75, lw=0, gid=gid)
    place: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (max(value, beyond), row), size=9, weight="bold", **place)


def _entries(rungs: Sequence[Data]) -> list[Any]:
    """Return the legend: the engines' colours, and the two limits of a step."""
    engines = dict.fromkeys(_COLOURS[rung["engine"]] for rung in rungs)
    return [
        *((name, (Patch(fc=colour, alpha=0.75, lw=0),)) for name, colour in engines),
        *((name, (Line2D([0], [0], color=INK, lw=1.6, ls=ls),)) for name, ls in _LIMITS.items()),
    ]


def _notes(data: Data) -> str:
    card, rounds = data["card"], data["config"]["ladder"]["rounds"]
    speed = card["bandwidth"]["bytes_per_s"] / 1e9
    bars = f"Bars: median of {rounds} rounds; dots: the rounds." if rounds > 1 else "One round."
    causes = {known["bound"] for known in card["formats"].values()}
    limits = ", ".join(f"{dtype} by {known['bound']}" for dtype, known in card["formats"].items())
    limits = f"by {causes.pop()}" if len(causes) == 1 else limits
    return (
        f"Memory limit: (weights + KV) / {speed:.3g} GB/s, the bandwidth measured in the same run. "
        f"Decode steps of {card['rows']} rows, medians. {bars} Steps are limited {limits}."
    )
