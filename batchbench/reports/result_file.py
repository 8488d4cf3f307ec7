"""The file ``result.json``: its parts as types, its checks, and its bounded reader.

``result.schema.json`` is published with the package, because other tools read these names; a test
compares it with the types.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

import jsonschema
import numpy as np

from batchbench.batching.recording import Recording
from batchbench.batching.remote.outcome import Agreement, FailedTrial, ServerData
from batchbench.errors import UsageError, shown
from batchbench.files import reason_of
from batchbench.json_file import read_json
from batchbench.version import SCHEMA_VERSION

SCHEMA_FILE = Path(__file__).with_name("result.schema.json")


class SamplingData(TypedDict):
    """The way in which tokens are drawn; greedy results have none."""

    temperature: float
    top_p: float
    top_k: int
    seed: int


class GoalsConfig(TypedDict):
    slo: list[str]
    price_per_hour: float | None


class Config(TypedDict):
    """Every option of the run, by spec; the options of each are in the spec's own class."""

    preset: NotRequired[str]
    workload: dict[str, Any]
    model: dict[str, Any]
    serving: dict[str, Any]
    trials: dict[str, Any]
    target: NotRequired[dict[str, Any]]
    goals: GoalsConfig


class Environment(TypedDict, total=False):
    """Facts about the machine and its software; a simulation knows only some of them."""

    hostname: str
    os: str
    python: str | None
    cpu: str | None
    cpu_cores: int
    memory_bytes: int
    packages: dict[str, str | None]
    git_commit: str | None
    threads: int
    cpu_kernels: str | None
    gpu: str | None
    gpu_uuid: str | None
    gpu_memory_bytes: int | None
    gpu_driver: str | None
    gpu_clock_mhz: dict[str, int] | None
    cuda: str | None
    cudnn: int | None
    gpu_attention: str | None
    float32_products: str | None


class ModelFacts(TypedDict):
    """The model that was served, with ``auto`` resolved; a simulation has no memory sizes."""

    name: str
    load_format: Literal["pretrained", "dummy"] | None  # None: a server's
    note: str
    device: str | None
    dtype: str | None
    parameters: int | None
    quantization: NotRequired[str | None]  # formats of a GGUF file that were dequantised
    attention: NotRequired[str]
    execution: NotRequired[str]
    execution_note: NotRequired[str | None]
    weights_digest: NotRequired[str]
    weight_bytes: NotRequired[int]
    packed_weight_bytes: NotRequired[int]
    kv_cache_bytes: NotRequired[int]


class WarmUpFacts(TypedDict):
    rounds: int
    settled: bool
    last_change: float | None
    step_ns: int | None
    duration_s: NotRequired[float | None]


class WorkloadFacts(TypedDict):
    name: str
    seed: int
    closed: bool
    num_requests: int
    total_input_tokens: int
    total_output_tokens: int
    digest: str
    output_lengths: list[int] | None  # as requested, if texts may end early
    max_concurrency: int | None
    arrival_rate: float | None
    sampling: NotRequired[SamplingData | None]


class FindingFacts(TypedDict):
    """A request whose tokens differ from those of its prompt generated alone."""

    request: int
    strategy: str
    verdict: Literal["numerical tie", "wrong"]
    index: int
    gap: float | None
    tolerance: float | None
    reason: str


class VerificationFacts(TypedDict):
    passed: bool | None
    requests_checked: int
    identical: int
    numerical_ties: int
    wrong: int
    reference: str | None
    max_logit_gap: float | None
    findings: list[FindingFacts]


class OutputText(TypedDict):
    request: int
    prompt: str
    output: str


_Tails = TypedDict(
    "_Tails",
    {
        "p99.9_queue_ms": float | None,
        "p99.9_ttft_ms": float | None,
        "p99.9_tpot_ms": float | None,
        "p99.9_itl_ms": float | None,
        "p99.9_e2el_ms": float | None,
    },
)


class Summary(_Tails):
    """Metrics of one trial, or of all: the median duration and the pooled latencies."""

    duration: float
    completed: int
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    energy_joules: NotRequired[float | None]
    joules_per_output_token: NotRequired[float | None]
    floor_share: NotRequired[float | None]
    cost_per_million_output_tokens: NotRequired[float | None]
    request_goodput: float | None
    slo_attainment: float | None
    mean_queue_ms: float | None
    median_queue_ms: float | None
    std_queue_ms: float | None
    p90_queue_ms: float | None
    p99_queue_ms: float | None
    mean_ttft_ms: float | None
    median_ttft_ms: float | None
    std_ttft_ms: float | None
    p90_ttft_ms: float | None
    p99_ttft_ms: float | None
    mean_tpot_ms: float | None
    median_tpot_ms: float | None
    std_tpot_ms: float | None
    p90_tpot_ms: float | None
    p99_tpot_ms: float | None
    mean_itl_ms: float | None
    median_itl_ms: float | None
    std_itl_ms: float | None
    p90_itl_ms: float | None
    p99_itl_ms: float | None
    mean_e2el_ms: float | None
    median_e2el_ms: float | None
    std_e2el_ms: float | None
    p90_e2el_ms: float | None
    p99_e2el_ms: float | None
    arrival_rate: float | None
    mean_arrival_lag_ms: float | None
    p99_arrival_lag_ms: float | None
    max_arrival_lag_ms: float | None


class Counters(TypedDict):
    """Exact counts of the work of a trial, from its plans alone."""

    forward_passes: int
    prefill_passes: int
    mixed_passes: int
    decode_passes: int
    prefill_tokens: int
    padded_prefill_tokens: int
    slot_steps: int
    useful_slot_steps: int
    prompt_slot_steps: int
    finished_slot_steps: int
    empty_slot_steps: int
    idle_slot_steps: int
    stalled_slot_steps: int
    kv_tokens_peak: int


class LengthClass(TypedDict):
    """Latencies of the requests whose outputs have a similar length."""

    min_output_tokens: int
    max_output_tokens: int
    requests: int
    mean_queue_ms: float | None
    p99_queue_ms: float | None
    mean_ttft_ms: float | None
    p99_ttft_ms: float | None
    mean_e2el_ms: float | None
    p99_e2el_ms: float | None
    mean_slowdown: float | None
    p99_slowdown: float | None


class Stall(TypedDict):
    """A long gap between two tokens, with the step that took most of it."""

    trial: int
    gap_ms: float
    requests: int
    start_ms: float
    step: int | None
    cause: str


class DecodeStep(TypedDict):
    """A decode step with the most rows, beside the time that memory bandwidth allows."""

    rows: int
    took_ms: float
    floor_ms: float
    floor_share: float
    read_bytes: float
    bytes_per_s: float


class StrategyData(TypedDict):
    trials: list[Summary]
    summary: Summary
    counters: Counters | None
    computed_passes: NotRequired[int | None]
    servings: NotRequired[int]
    output_digest: str | None
    by_output_length: list[LengthClass]
    stalls: list[Stall]
    decode_step: NotRequired[DecodeStep | None]


class Speedup(TypedDict):
    median: float
    ci95: list[float] | None


class Comparison(TypedDict):
    baseline: str
    candidate: str
    speedup: Speedup
    step_ratio: float | None
    step_ratio_source: NotRequired[Literal["server", "schedule"] | None]
    efficiency: float | None


class TimeParts(TypedDict):
    """Parts of a trial's wall time, in seconds."""

    useful_decode_s: float
    finished_s: float
    empty_s: float
    prefill_useful_s: float
    prefill_padding_s: float
    stalled_s: float
    waiting_s: float
    host_s: float
    residual_s: float


class TimeBudgetData(TypedDict):
    wall_s: float
    parts: TimeParts
    warm_up_s: float | None


class SavedPart(TypedDict):
    part: str
    saved_s: float


class Waterfall(TypedDict):
    """Seconds that a candidate saved, in all and part by part."""

    baseline: str
    candidate: str
    saved_s: float
    steps: list[SavedPart]


class Explain(TypedDict):
    strategies: dict[str, TimeBudgetData | None]
    waterfall: list[Waterfall]


class FitQuality(TypedDict):
    """Errors of a fit on steps that it did not see, as shares of a step's time."""

    steps: int
    r2: float | None
    median_error: float
    p90_error: float
    worst_error: float
    total_error: float


class FittedCost(TypedDict):
    """Costs of a step, and the steps on which they were fitted."""

    source: str
    step_ns: float
    row_ns: float
    cached_ns: float
    prompt_ns: float
    chunk_ns: float
    host_ns: float
    bends: NotRequired[list[tuple[int, float]]]
    rows_seen: list[int]
    most_prompt_tokens_seen: int
    longest_seen: int


class CostFacts(FittedCost):
    extrapolates: list[str]


class PredictedStrategy(TypedDict):
    strategy: str
    duration: float
    measured_duration: float
    error: float
    output_throughput: float
    mean_ttft_ms: float
    measured_mean_ttft_ms: float
    extrapolates: list[str]


class Prediction(TypedDict):
    fitted_on: str
    cost: FittedCost
    held_out: FitQuality
    strategies: list[PredictedStrategy]


class Validity(TypedDict):
    status: Literal["valid", "suspect"]
    reasons: list[str]


class Facts(TypedDict):
    """Options and observations of a run, which its recordings do not hold."""

    created_at: str
    command: str
    simulated: bool
    config: Config
    environment: Environment
    model: ModelFacts
    warm_up: WarmUpFacts
    small_batches: NotRequired[list[list[int]] | None]
    workload: WorkloadFacts
    verification: VerificationFacts
    stopped: str | None
    outputs: list[OutputText] | None
    cost: NotRequired[CostFacts | None]
    prediction: NotRequired[Prediction | None]
    server: NotRequired[ServerData | None]
    agreement: NotRequired[Agreement | None]
    failures: NotRequired[list[FailedTrial] | None]


class ResultData(Facts):
    schema_version: int
    batchbench_version: str
    strategies: dict[str, StrategyData]
    comparison: Comparison | None
    comparisons: list[Comparison]
    explain: Explain
    validity: Validity


def metric(figures: Mapping[str, object], name: str) -> float | None:
    """Return a metric or count whose name is known only at run time."""
    return cast("float | None", figures[name])


# Reading


def file_of(folder: Path) -> Path:
    return folder if folder.suffix == ".json" else folder / "result.json"


def read_data(folder: Path) -> dict[str, Any]:
    """Read a ``result.json`` of this version without a check of its schema.

    Raises:
        UsageError: there is no result, or it is damaged or of another schema version.
    """
    file = file_of(folder)
    try:
        data = read_json(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        absent = "is not a folder" if folder.exists() else "no such folder"
        problem = "holds no result.json" if folder.is_dir() else absent
        below = max(folder.glob("*/result.json"), key=lambda f: f.stat().st_mtime, default=None)
        hint = "give the folder that batchbench run wrote"
        hint = f"the newest in it is {below.parent}" if below else hint
        raise UsageError(f"{folder}: {problem}; {hint}") from error
    except OSError as error:
        raise UsageError(
            f"{file}: cannot be read: {reason_of(error)}; give the folder that batchbench run wrote"
        ) from error
    if not isinstance(data, dict) or "schema_version" not in data:
        raise UsageError(f"{file}: is not a result of batchbench")
    if data.get("kind") == "baseline":
        raise UsageError(f"{file}: is a baseline; give it to batchbench check --baseline {file}")
    if data["schema_version"] != SCHEMA_VERSION or isinstance(data["schema_version"], bool):
        version, by = (str(data.get(key))[:40] for key in ("schema_version", "batchbench_version"))
        raise UsageError(
            f"{file}: has schema version {version}, this batchbench reads {SCHEMA_VERSION}; read "
            f"it with batchbench {by}"
        )
    return data


def load_data(folder: Path) -> ResultData:
    """Read and check ``result.json``, given a result's folder or the file itself.

    Raises:
        UsageError: there is no result, or it is damaged or of another schema version.
    """
    data = cast("ResultData", read_data(folder))
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    fault = fault_of(data, schema) or next(_contradictions(data), None)
    if fault is not None:
        raise UsageError(f"{file_of(folder)}: is not a complete result: {fault}")
    return data


def read_time(text: object) -> datetime:
    """Return a time of a result or baseline with its zone; UTC if it names none.

    Raises:
        ValueError: it is not a time in ISO format.
    """
    if not isinstance(text, str):
        raise ValueError(f"{str(text)[:40]} is not a time")
    try:
        time = datetime.fromisoformat(text)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"{text[:40]!r} is not a time such as 2026-01-31T12:00:00+00:00"
        ) from error


def _contradictions(data: ResultData) -> Iterator[str]:
    try:
        read_time(data["created_at"])
    except ValueError as error:
        yield f"created_at: {error}"
    strategies = data["strategies"]
    if len({len(strategy["trials"]) for strategy in strategies.values()}) > 1:
        yield "its strategies have different numbers of trials"
    candidates = [comparison["candidate"] for comparison in data["comparisons"]]
    if any(candidates.count(name) != 1 for name in list(strategies)[1:]):
        yield "each strategy but the first must have exactly one comparison"
    if any(comparison["baseline"] not in strategies for comparison in data["comparisons"]):
        yield "a comparison names a baseline that is not one of its strategies"
    yield from _contradictions_of_server(data)
    lengths = data["workload"]["output_lengths"]
    if lengths is not None and len(lengths) != data["workload"]["num_requests"]:
        yield "workload.output_lengths must have one entry per request"


def _contradictions_of_server(data: ResultData) -> Iterator[str]:
    server = data.get("server")
    if server is None:
        return
    if not isinstance(data["config"].get("target", {}).get("target"), str):
        yield "it has a server, and its config has no target"
    for counts in (server["passes"], server["cached_tokens"]):
        for name, trials in counts.items():
            if name not in data["strategies"] or len(trials) != len(
                data["strategies"][name]["trials"]
            ):
                yield "its server's counts are not one per trial of each strategy"


def check_recordings(
    file: Path, data: ResultData, recordings: Mapping[str, Sequence[Recording]]
) -> None:
    """Raise UsageError if the recordings beside a result are not its own."""
    fault = next(_mismatches(data, recordings), None)
    if fault is not None:
        raise UsageError(f"{file}: its parts do not belong together: {fault}")


def _mismatches(data: ResultData, recordings: Mapping[str, Sequence[Recording]]) -> Iterator[str]:
    first = next(iter(recordings.values()))[0]
    if len(first.requests.slot) != data["workload"]["num_requests"]:
        yield "they have different numbers of requests"
    for name, trials in recordings.items():
        for trial, recording in enumerate(trials):
            header, where = recording.header, f"recording {trial} of {name[:40]}"
            if (header.strategy, header.trial) != (name, trial):
                yield f"{where} is of {header.strategy[:40]}, trial {header.trial}"
            if len(recording.requests.slot) != len(first.requests.slot):
                yield "they have different numbers of requests"
            elif not np.array_equal(recording.requests.prompt_tokens, first.requests.prompt_tokens):
                yield f"{where} has other prompts"
            if recording.has_steps != trials[0].has_steps:
                yield f"{where} has steps and the first has none, or the reverse"
            if (recording.tokens is None) != (first.tokens is None):
                yield f"{where} has tokens and others have none, or the reverse"


# The check against a schema

_KINDS = {
    "array": "a list",
    "boolean": "true or false",
    "integer": "a whole number",
    "null": "null",
    "number": "a number",
    "object": "an object",
    "string": "a text",
}

_MOST_FAULTS = 50
"""Number of faults among which the deepest is chosen."""


def fault_of(data: Any, schema: Mapping[str, Any]) -> str | None:
    """Return the fault of the data, as "name is value; it must be …"; None if it has none."""
    faults = jsonschema.Draft202012Validator(schema).iter_errors(data)
    fault: Any = jsonschema.exceptions.best_match(islice(faults, _MOST_FAULTS))
    if fault is None:
        return None
    place, rule = ".".join(map(str, fault.absolute_path)), fault.validator_value
    at = place or "it"
    if fault.validator == "required":
        missing = next(name for name in rule if name not in fault.instance)
        return f"{place}{'.' if place else ''}{missing} is missing"
    if fault.validator == "additionalProperties" and isinstance(fault.instance, dict):
        known = fault.schema.get("properties", {})
        unknown = next((name for name in fault.instance if name not in known), "")
        return f"{at} has {unknown[:40]!r}, which is not known"
    return f"{at} is {_value(fault.instance)}; it must be {_rule(fault.validator, rule)}"


def _rule(validator: str, rule: Any) -> str:
    if validator == "type":
        return " or ".join(_KINDS[name] for name in ([rule] if isinstance(rule, str) else rule))
    if validator == "enum":
        return f"one of {', '.join(map(str, rule))}"
    return {
        "minimum": f"at least {rule}",
        "exclusiveMinimum": f"above {rule}",
        "maximum": f"at most {rule}",
        "const": json.dumps(rule),
        "pattern": f"of the form {rule}",
        "minItems": f"a list of at least {rule}",
        "maxItems": f"a list of at most {rule}",
        "minProperties": "an object that is not empty",
    }.get(validator, "as the schema says")


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{…}" if value else "{}"
    if isinstance(value, list):
        return "[…]" if value else "[]"
    return shown(json.dumps(value, ensure_ascii=False))
