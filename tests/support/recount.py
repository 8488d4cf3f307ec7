"""A second computation of a result, only from ``result.json`` and the recordings beside it.

Written from docs/metrics.md, step by step and slot by slot. It imports nothing of batchbench, and
runs as a program: ``python -I recount.py FOLDER [SLO …]`` prints what it finds as JSON.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import statistics
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

Numbers = dict[str, Any]

KINDS = ("useful", "prompt", "finished", "empty", "stalled")
LATENCIES = ("queue", "ttft", "tpot", "itl", "e2el")


class Trial:
    """One recording, with its spans unrolled to steps.

    A step is ``(start, end, rows, pieces)``: times in ns, slots that decode, and pieces of prompts
    as (request, start, stop).
    """

    def __init__(self, file: Path) -> None:
        arrays = columns_of(file)
        self.header = json.loads(arrays["header"].tobytes())
        self.about = self.header["about"]
        self.slots = self.header["slots"]
        self.tokens = arrays.get("tokens")
        log = {
            name.removeprefix("requests."): column.tolist()
            for name, column in arrays.items()
            if name.startswith("requests.")
        }
        self.due, self.prompt, self.output = (
            log["due_ns"],
            log["prompt_tokens"],
            log["output_tokens"],
        )
        self.admitted, self.started = log["admitted"], log["started"]
        self.first, self.last, self.released = log["first"], log["last"], log["released"]
        self.requests = range(len(self.due))
        self.steps: list[tuple[int, int, int, list[tuple[int, int, int]]]] = []
        self.decisions: list[tuple[int, int]] = []  # time, and how many requests were known
        self.waits = list(
            zip(
                *(arrays[f"waits.{c}"].tolist() for c in ("start_ns", "until_ns", "end_ns")),
                strict=True,
            )
        )
        self.has_steps = "token_ends_ns" not in arrays
        if self.has_steps:
            self._unroll(arrays)
            self.token_steps = [self._steps_of(i) for i in self.requests]
            self.times = [[self.steps[k][1] for k in steps] for steps in self.token_steps]
            self.began = [self.steps[k][0] for k in self.started]
        else:
            ends = iter(arrays["token_ends_ns"].tolist())
            self.times = [[next(ends) for _ in range(count)] for count in self.output]
            self.began = arrays["begun_ns"].tolist()
        self.duration_ns = max(times[-1] for times in self.times)

    def _unroll(self, arrays: Mapping[str, Any]) -> None:
        spans = {
            name.removeprefix("spans."): column.tolist()
            for name, column in arrays.items()
            if name.startswith("spans.")
        }
        pieces = zip(
            *(arrays[f"chunks.{c}"].tolist() for c in ("request", "start", "stop")), strict=True
        )
        measured = iter(arrays["ends_ns"].tolist()) if "ends_ns" in arrays else None
        known: list[tuple[int, int, int, int]] = []  # step, 0 for a wait, time, requests known
        for span, count in enumerate(spans["steps"]):
            step = len(self.steps)
            there = spans["waiting"][span] + sum(at <= step for at in self.admitted)
            known.append((step, 1, spans["start_ns"][span], there))
            mine = [next(pieces) for _ in range(spans["chunks"][span])]
            start = spans["start_ns"][span]
            costs = None if measured else costs_of(arrays, span, count)
            for _ in range(count):
                end = next(measured) if measured else next(costs)  # type: ignore[arg-type]
                self.steps.append((start, end, spans["decoding"][span], mine))
                start = end
        columns = (arrays[f"waits.{c}"].tolist() for c in ("step", "start_ns", "waiting"))
        for step, start, waiting in zip(*columns, strict=True):
            known.append((step, 0, start, waiting + sum(at < step for at in self.admitted)))
        self.decisions = [(time, there) for _, _, time, there in sorted(known)]

    def _steps_of(self, i: int) -> list[int]:
        """Steps in which a request got its tokens: the first, and then all that decode."""
        later = range(self.first[i] + 1, self.last[i] + 1)
        return [self.first[i], *(k for k in later if self.steps[k][2])]

    def latencies(self) -> dict[str, list[float]]:
        """Return latencies in ms, one for each request; ``itl`` has one for each gap."""
        ends = [times[-1] for times in self.times]
        pairs = list(zip(self.times, self.due, strict=True))
        return {
            "queue": [(at - due) / 1e6 for at, due in zip(self.began, self.due, strict=True)],
            "ttft": [(times[0] - due) / 1e6 for times, due in pairs],
            "tpot": [
                (end - times[0]) / 1e6 / (len(times) - 1)
                for times, end in zip(self.times, ends, strict=True)
                if len(times) > 1
            ],
            "itl": [(b - a) / 1e6 for times in self.times for a, b in pairwise(times)],
            "e2el": [(times[-1] - due) / 1e6 for times, due in pairs],
        }

    def lags(self) -> list[float] | None:
        """Return the delay until each request was noticed, in ms."""
        if not self.has_steps or not any(self.due):
            return None
        found = []
        for i, due in enumerate(self.due):
            noticed = next(time for time, there in self.decisions if there > i)
            under_way = [end for start, end, _, _ in self.steps if start < due < end]
            found.append(max(noticed - (under_way or [due])[0], 0) / 1e6)
        return found

    def kinds(self) -> list[Counter[str]]:
        """Return the number of slots of each kind and of those that yield a token, step by step."""
        found = [Counter[str]() for _ in self.steps]
        reads = [{piece[0]: piece for piece in pieces} for _, _, _, pieces in self.steps]
        for i in self.requests:
            for k in range(self.admitted[i], self.released[i]):
                if k > self.last[i]:
                    found[k]["finished"] += 1
                elif i in reads[k]:
                    found[k]["useful" if reads[k][i][2] == self.prompt[i] else "prompt"] += 1
                elif k > self.first[i] and self.steps[k][2]:
                    found[k]["useful"] += 1
                    found[k]["decodes"] += 1
                else:
                    found[k]["stalled"] += 1
        for counts in found:
            counts["empty"] = self.slots - sum(counts[kind] for kind in KINDS)
        return found

    def cached_peak(self) -> int:
        """Return the most cached tokens of held slots after a step."""
        cached: dict[int, int] = {}
        later = [set(steps[1:]) for steps in self.token_steps]
        peak = 0
        for k, (_, _, _, pieces) in enumerate(self.steps):
            cached = {i: count for i, count in cached.items() if k < self.released[i]}
            for i in cached:
                cached[i] += k in later[i]
            cached |= {i: stop for i, _, stop in pieces}
            peak = max(peak, sum(cached.values()))
        return peak

    def read(self, k: int) -> int:
        """Return the cached tokens that the rows of a step attend to, their own included."""
        total = 0
        for i in self.requests:
            if self.first[i] < k < self.released[i]:
                nth = sum(step <= k for step in self.token_steps[i])
                total += self.prompt[i] + nth - 1
        return total


def columns_of(file: Path) -> dict[str, Any]:
    """Read the arrays of an ``.npz`` file."""
    with zipfile.ZipFile(file) as archive:
        return {
            name.removesuffix(".npy"): np.lib.format.read_array(io.BytesIO(archive.read(name)))
            for name in archive.namelist()
        }


def costs_of(arrays: Mapping[str, Any], span: int, count: int) -> Iterator[int]:
    """Yield the ends of a simulated span's steps in whole ns, computed in picoseconds."""
    rest, growth, beyond = (
        int(arrays[f"growth.{c}"][span]) if f"growth.{c}" in arrays else 0
        for c in ("rest_ps", "growth_ps", "beyond_ps")
    )
    at = 1000 * int(arrays["spans.start_ns"][span]) + beyond
    for i in range(count):
        at += 1000 * int(arrays["step_ns"][span]) + rest + i * growth
        yield at // 1000


# The summary


def summary_of(trials: Sequence[Trial], limits: Mapping[str, float]) -> Numbers:
    """Return the median duration, and latencies over all requests of all trials."""
    duration = statistics.median(trial.duration_ns for trial in trials) / 1e9
    inputs, outputs = sum(trials[0].prompt), sum(trials[0].output)
    count = len(trials[0].due)
    joules = [trial.about.get("energy_joules") for trial in trials]
    energy = None if None in joules else statistics.median(joules)
    good = [good for trial in trials for good in goods(trial, limits)]
    floors = [step["floor_share"] for trial in trials if (step := decode_step(trial))]
    found: Numbers = {
        "duration": duration,
        "completed": count,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": count / duration,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
        "energy_joules": energy,
        "joules_per_output_token": None if energy is None else energy / outputs,
        "floor_share": statistics.median(floors) if floors else None,
        "request_goodput": sum(good) / len(trials) / duration if limits else None,
        "slo_attainment": sum(good) / len(good) if limits else None,
    }
    pooled = [trial.latencies() for trial in trials]
    for name in LATENCIES:
        found |= statistics_of(name, [value for each in pooled for value in each[name]])
    lags = [lag for trial in trials for lag in trial.lags() or []]
    rates = [rate for trial in trials if (rate := rate_of(trial)) is not None]
    return found | {
        "arrival_rate": statistics.median(rates) if rates else None,
        "mean_arrival_lag_ms": statistics.fmean(lags) if lags else None,
        "p99_arrival_lag_ms": float(np.percentile(lags, 99)) if lags else None,
        "max_arrival_lag_ms": max(lags) if lags else None,
    }


def statistics_of(name: str, values: Sequence[float]) -> Numbers:
    """Return metrics by the names of serving benchmarks."""
    keys = ("mean", "median", "std", "p90", "p99", "p99.9")
    if not values:
        return {f"{key}_{name}_ms": None for key in keys}
    p90, p99, p999 = np.percentile(values, [90, 99, 99.9]).tolist()
    told = (
        statistics.fmean(values),
        statistics.median(values),
        statistics.pstdev(values),
        p90,
        p99,
        p999 if len(values) >= 1000 else None,
    )
    return {f"{key}_{name}_ms": value for key, value in zip(keys, told, strict=True)}


def goods(trial: Trial, limits: Mapping[str, float]) -> list[bool]:
    """Return True for each request within all limits; TPOT of a single token has no limit."""
    found = []
    for times, due in zip(trial.times, trial.due, strict=True):
        told = {"ttft": (times[0] - due) / 1e6, "e2el": (times[-1] - due) / 1e6}
        if len(times) > 1:
            told["tpot"] = (times[-1] - times[0]) / 1e6 / (len(times) - 1)
        found.append(all(told[name] <= limit for name, limit in limits.items() if name in told))
    return found


def rate_of(trial: Trial) -> float | None:
    """Return the requests a second, by the times at which they were noticed."""
    lags = trial.lags()
    if lags is None:
        return None
    seen = [due / 1e9 + lag / 1e3 for due, lag in zip(trial.due, lags, strict=True)]
    spread = max(seen) - min(seen)
    return (len(seen) - 1) / spread if spread else None


# Counters, steps, stalls, fairness


def counters_of(trial: Trial) -> Numbers | None:
    """Return counts of the work."""
    if not trial.has_steps:
        return None
    total: Counter[str] = sum(trial.kinds(), Counter())
    sizes = [[stop - start for _, start, stop in pieces] for _, _, _, pieces in trial.steps]
    rows = [step[2] for step in trial.steps]
    return {
        "forward_passes": len(trial.steps),
        "prefill_passes": sum(bool(s) and not r for s, r in zip(sizes, rows, strict=True)),
        "mixed_passes": sum(bool(s) and bool(r) for s, r in zip(sizes, rows, strict=True)),
        "decode_passes": sum(not s for s in sizes),
        "prefill_tokens": sum(map(sum, sizes)),
        "padded_prefill_tokens": sum(len(s) * max(s, default=0) for s in sizes),
        "slot_steps": len(trial.steps) * trial.slots,
        **{f"{kind}_slot_steps": total[kind] for kind in KINDS},
        "idle_slot_steps": total["finished"] + total["empty"],
        "kv_tokens_peak": trial.cached_peak(),
    }


def decode_step(trial: Trial) -> Numbers | None:
    """Compare a decode step of the most rows with what memory allows; None if that is unknown."""
    memory = trial.about.get("memory")
    pure = [k for k, step in enumerate(trial.steps) if step[2] and not step[3]]
    if memory is None or not pure:
        return None
    rows = max(trial.steps[k][2] for k in pure)
    full = [k for k in pure if trial.steps[k][2] == rows]
    ends = [0, *(step[1] for step in trial.steps)]
    took = statistics.median(ends[k + 1] - ends[k] for k in full) / 1e6
    reading = memory["reading"]
    cached = statistics.median(trial.read(k) for k in full)
    read = reading["step_weight_bytes"] + cached * reading["kv_token_bytes"]
    floor = read / memory["bytes_per_s"] * 1e3
    return {
        "rows": rows,
        "took_ms": took,
        "floor_ms": floor,
        "floor_share": floor / took,
        "read_bytes": read,
        "bytes_per_s": memory["bytes_per_s"],
    }


def middle_step(trials: Sequence[Trial]) -> Numbers | None:
    """Return the medians over trials."""
    steps = [step for trial in trials if (step := decode_step(trial))]
    if not steps:
        return None
    return {key: statistics.median(step[key] for step in steps) for key in steps[0]}


def stalls_of(trials: Sequence[Trial]) -> list[Numbers]:
    """Return the five longest gaps of at least 1.5 times the trial's median gap."""
    found = []
    for number, trial in enumerate(trials):
        gaps = [pair for steps in getattr(trial, "token_steps", []) for pair in pairwise(steps)]
        if not gaps:
            continue
        took = {(a, b): trial.steps[b][1] - trial.steps[a][1] for a, b in gaps}
        limit = 1.5 * statistics.median(took[gap] for gap in gaps)
        shared = Counter(gaps)
        mine = [gap for gap in took if took[gap] >= limit]
        for a, b in sorted(mine, key=lambda gap: (-took[gap], gap))[:5]:
            found.append(stall_of(trial, number, a, b, shared[a, b]))
    return sorted(found, key=lambda stall: -stall["gap_ms"])[:5]


def stall_of(trial: Trial, number: int, a: int, b: int, requests: int) -> Numbers:
    """Return a gap and its longest step."""
    gap = trial.steps[b][1] - trial.steps[a][1]
    took = {k: trial.steps[k][1] - trial.steps[k][0] for k in range(a + 1, b + 1)}
    longest = max(took, key=lambda k: took[k])
    outside = gap - sum(took.values()) > took[longest]
    return {
        "trial": number,
        "gap_ms": gap / 1e6,
        "requests": requests,
        "start_ms": trial.steps[a][1] / 1e6,
        "step": None if outside else longest,
        "cause": "time outside the steps" if outside else cause_of(trial, longest),
    }


def cause_of(trial: Trial, k: int) -> str:
    """Return words for the work of a step."""
    _, _, rows, pieces = trial.steps[k]
    tokens = sum(stop - start for _, start, stop in pieces)
    words = []
    if pieces:
        requests = f"{len(pieces):,} request{'s' * (len(pieces) > 1)}"
        words.append(f"prefill of {requests}, {tokens:,} token{'s' * (tokens > 1)}")
    if rows:
        words.append(f"decode of {rows:,} slot{'s' * (rows > 1)}")
    return " + ".join(words)


def fairness_of(trials: Sequence[Trial], asked: Sequence[int]) -> list[Numbers]:
    """Return metrics by class of output lengths: one for each length, or quarters."""
    lengths, distinct = sorted(asked), sorted(set(asked))
    classes = [(length, length) for length in distinct]
    if len(distinct) > 4:
        tops = {lengths[math.ceil(len(lengths) * k / 4) - 1] for k in (1, 2, 3, 4)}
        lows = [distinct[0], *(min(n for n in distinct if n > t) for t in sorted(tops)[:-1])]
        classes = list(zip(lows, sorted(tops), strict=True))
    met = [row for trial in trials for row in met_with(trial)]
    rows: list[Numbers] = []
    for low, high in classes:
        members = [figures for length, figures in met if low <= length <= high]
        row: Numbers = {
            "min_output_tokens": low,
            "max_output_tokens": high,
            "requests": len(members),
        }
        for name in ("queue_ms", "ttft_ms", "e2el_ms", "slowdown"):
            values = [figures[name] for figures in members]
            row[f"mean_{name}"] = statistics.fmean(values) if values else None
            row[f"p99_{name}"] = float(np.percentile(values, 99)) if values else None
        rows.append(row)
    return rows


def met_with(trial: Trial) -> Iterator[tuple[int, Numbers]]:
    """Return the output tokens and latencies of each request."""
    told = trial.latencies()
    steps = [(end - start) / 1e6 for start, end, _, _ in trial.steps]
    usual = statistics.median(steps or told["itl"] or told["ttft"])
    columns = (trial.output, told["queue"], told["ttft"], told["e2el"])
    for tokens, queue, ttft, e2el in zip(*columns, strict=True):
        figures = {"queue_ms": queue, "ttft_ms": ttft, "e2el_ms": e2el}
        yield tokens, figures | {"slowdown": e2el / (tokens * usual)}


def digest_of(trial: Trial) -> str | None:
    """Return the SHA-256 of the numbers of tokens and the tokens."""
    if trial.tokens is None:
        return None
    content = np.array(trial.output, "<i8").tobytes() + trial.tokens.astype("<i4").tobytes()
    return hashlib.sha256(content).hexdigest()


# The account of the time


def account_of(trial: Trial) -> dict[str, float]:
    """Return the seconds of each part."""
    alone: dict[int, list[int]] = {}
    for start, end, rows, pieces in trial.steps:
        if not pieces:
            alone.setdefault(rows, []).append(end - start)
    usual = sorted((rows, statistics.median(took)) for rows, took in alone.items())
    parts = dict.fromkeys(
        ("useful_decode_s", "finished_s", "empty_s", "prefill_useful_s", "prefill_padding_s",
         "stalled_s", "waiting_s", "host_s", "residual_s"), 0.0,
    )  # fmt: skip
    for (start, end, rows, pieces), kinds in zip(trial.steps, trial.kinds(), strict=True):
        took = end - start
        decode = float(took) if rows else 0.0
        if rows and pieces and usual:
            decode = min(decode, float(np.interp(rows, *zip(*usual, strict=True))))
        prompt, share = took - decode, decode / trial.slots
        n, u, s = len(pieces), kinds["decodes"], kinds["stalled"]
        prefill = share * n + (prompt * n / (n + u + s) if n else 0.0)
        sizes = [stop - begin for _, begin, stop in pieces]
        padding = 0.0
        if trial.about.get("pads_prompts") and n:
            padding = prefill * (1 - sum(sizes) / (n * max(sizes)))
        parts["useful_decode_s"] += share * u
        parts["finished_s"] += share * kinds["finished"]
        parts["empty_s"] += share * kinds["empty"]
        parts["prefill_padding_s"] += padding
        parts["prefill_useful_s"] += prefill - padding
        parts["stalled_s"] += share * s + (prompt * (u + s) / (n + u + s) if n else 0.0)
    before = 0
    for start, end, _, _ in trial.steps:
        waited = sum(
            max(min(over, until, start) - max(begin, before), 0)
            for begin, until, over in trial.waits
        )
        parts["waiting_s"] += waited
        parts["host_s"] += max(start - before, 0) - waited
        before = end
    wall = trial.about.get("wall_ns", trial.duration_ns)
    parts["residual_s"] = wall - sum(parts.values())
    return {name: ns / 1e9 for name, ns in parts.items()}


def explain_of(trials: Mapping[str, Sequence[Trial]]) -> Numbers:
    """Return the account of each strategy's median trial, and the savings of candidates."""
    parts: dict[str, dict[str, float] | None] = {}
    for name, each in trials.items():
        ranked = sorted(each, key=lambda trial: trial.duration_ns)
        middle = ranked[(len(ranked) - 1) // 2 : len(ranked) // 2 + 1]
        parts[name] = None
        if each[0].has_steps:
            told = [account_of(trial) for trial in middle]
            parts[name] = {key: statistics.fmean(one[key] for one in told) for key in told[0]}
    baseline, *candidates = trials
    base = parts[baseline]
    falls = []
    for name in candidates:
        own = parts[name]
        if base is None or own is None:
            continue
        falls.append(
            {
                "baseline": baseline,
                "candidate": name,
                "saved_s": math.fsum(base.values()) - math.fsum(own.values()),
                "steps": [{"part": part, "saved_s": base[part] - own[part]} for part in base],
            }
        )
    told_of = {
        name: of and {"wall_s": math.fsum(of.values()), "parts": of} for name, of in parts.items()
    }
    return {"strategies": told_of, "waterfall": falls}


# The comparison


def comparison_of(name: str, trials: Mapping[str, Sequence[Trial]]) -> Numbers:
    """Compare a candidate with the first strategy, pair by pair."""
    baseline = next(iter(trials))
    pairs = list(zip(trials[baseline], trials[name], strict=True))
    logs = [math.log(base.duration_ns / new.duration_ns) for base, new in pairs]
    speedup = math.exp(statistics.median(logs))
    interval = None
    if len(logs) >= 3:
        half = T[len(logs) - 1] * statistics.stdev(logs) / len(logs) ** 0.5
        centre = statistics.fmean(logs)
        interval = [math.exp(centre - half), math.exp(centre + half)]
    ratio = None
    if all(trial.has_steps for pair in pairs for trial in pair):
        ratio = statistics.median(len(base.steps) / len(new.steps) for base, new in pairs)
    return {
        "baseline": baseline,
        "candidate": name,
        "speedup": {"median": speedup, "ci95": interval},
        "step_ratio": ratio,
        "step_ratio_source": ratio and "schedule",
        "efficiency": ratio and speedup / ratio,
    }


T = {2: 4.302652729911275, 3: 3.182446305284263, 4: 2.776445105197}
"""Student's t at 97.5 %, by degrees of freedom."""


def recount(folder: Path, slos: Sequence[str] = ()) -> Numbers:
    """Return all parts of a result that follow from its recordings.

    Args:
        slos: limits to hold requests against instead of those that the result names.
    """
    data = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    goals = data["config"]["goals"]
    limits = {
        name: float(ms) for name, _, ms in (slo.partition(":") for slo in slos or goals["slo"])
    }
    trials = {
        name: [
            Trial(folder / "recordings" / f"{i}-{trial}.npz")
            for trial in range(len(strategy["trials"]))
        ]
        for i, (name, strategy) in enumerate(data["strategies"].items())
    }
    asked = next(iter(trials.values()))[0].output
    strategies = {}
    for name, each in trials.items():
        summary = summary_of(each, limits)
        price = goals["price_per_hour"]
        cost = None if price is None else price / 3600 / summary["output_throughput"] * 1e6
        strategies[name] = {
            "trials": [summary_of([trial], limits) for trial in each],
            "summary": {**summary, "cost_per_million_output_tokens": cost},
            "by_output_length": fairness_of(each, asked),
            "stalls": stalls_of(each),
            "decode_step": middle_step(each),
            "counters": counters_of(each[0]),
            "computed_passes": each[0].about.get("computed_passes"),
            "output_digest": digest_of(each[0]),
        }
    comparisons = [comparison_of(name, trials) for name in list(trials)[1:]]
    return {
        "strategies": strategies,
        "comparisons": comparisons,
        "comparison": comparisons[-1] if comparisons else None,
        "explain": explain_of(trials),
        "requests": {name: [trial.latencies() for trial in each] for name, each in trials.items()},
    }


if __name__ == "__main__":
    json.dump(recount(Path(sys.argv[1]), sys.argv[2:]), sys.stdout, allow_nan=False)
