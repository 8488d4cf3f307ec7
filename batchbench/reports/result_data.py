"""The parts of ``result.json`` as types, so that a misspelt key is an error of the type checker.

``result.schema.json`` describes each key; a test compares it with these types.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict, cast

from batchbench.batching.remote.outcome import Agreement, FailedTrial


class Config(TypedDict):
    preset: NotRequired[str]
    workload: dict[str, Any]
    model: dict[str, Any]
    serving: dict[str, Any]
    trials: dict[str, Any]
    target: NotRequired[dict[str, Any]]
    goals: dict[str, Any]


class Environment(TypedDict, total=False):
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
    name: str
    load_format: Literal["pretrained", "dummy"] | None  # None: a server's
    note: str
    device: str | None
    dtype: str | None
    parameters: int | None
    quantization: NotRequired[str | None]
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
    sampling: NotRequired[dict[str, Any] | None]


class FindingFacts(TypedDict):
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


class ClientData(TypedDict):
    node: str
    requests: int
    rate: float | None
    late_p99_ms: float
    clock_offset_ms: float
    clock_within_ms: float


class ClientsData(TypedDict):
    rate: float | None  # of all of them together
    each: list[ClientData]


class ServerData(TypedDict):
    name: str
    version: str | None
    slots: int | None
    passes: dict[str, list[int | None]]
    cached_tokens: dict[str, list[int | None]]
    running_before: int | None
    prompt_cache_off: bool | None
    stamps: Literal["kernel", "user"] | None
    clients: NotRequired[ClientsData | None]


Summary = TypedDict(  # a call, for the names with a dot
    "Summary",
    {
        "duration": float,
        "completed": int,
        "total_input_tokens": int,
        "total_output_tokens": int,
        "request_throughput": float,
        "output_throughput": float,
        "total_token_throughput": float,
        "energy_joules": NotRequired[float | None],
        "joules_per_output_token": NotRequired[float | None],
        "floor_share": NotRequired[float | None],
        "cost_per_million_output_tokens": NotRequired[float | None],
        "request_goodput": float | None,
        "slo_attainment": float | None,
        "mean_queue_ms": float | None,
        "median_queue_ms": float | None,
        "std_queue_ms": float | None,
        "p90_queue_ms": float | None,
        "p99_queue_ms": float | None,
        "p99.9_queue_ms": float | None,
        "mean_ttft_ms": float | None,
        "median_ttft_ms": float | None,
        "std_ttft_ms": float | None,
        "p90_ttft_ms": float | None,
        "p99_ttft_ms": float | None,
        "p99.9_ttft_ms": float | None,
        "mean_tpot_ms": float | None,
        "median_tpot_ms": float | None,
        "std_tpot_ms": float | None,
        "p90_tpot_ms": float | None,
        "p99_tpot_ms": float | None,
        "p99.9_tpot_ms": float | None,
        "mean_itl_ms": float | None,
        "median_itl_ms": float | None,
        "std_itl_ms": float | None,
        "p90_itl_ms": float | None,
        "p99_itl_ms": float | None,
        "p99.9_itl_ms": float | None,
        "mean_e2el_ms": float | None,
        "median_e2el_ms": float | None,
        "std_e2el_ms": float | None,
        "p90_e2el_ms": float | None,
        "p99_e2el_ms": float | None,
        "p99.9_e2el_ms": float | None,
        "arrival_rate": float | None,
        "mean_arrival_lag_ms": float | None,
        "p99_arrival_lag_ms": float | None,
        "max_arrival_lag_ms": float | None,
    },
)
"""Metrics of one trial, or of all: the median duration and the pooled latencies."""


class Counters(TypedDict):
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


class StallData(TypedDict):
    trial: int
    gap_ms: float
    requests: int
    start_ms: float
    step: int | None
    cause: str


class DecodeStep(TypedDict):
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
    stalls: list[StallData]
    decode_step: NotRequired[DecodeStep | None]


class Speedup(TypedDict):
    median: float
    ci95: list[float] | None


class ComparisonData(TypedDict):
    baseline: str
    candidate: str
    speedup: Speedup
    step_ratio: float | None
    step_ratio_source: NotRequired[Literal["server", "schedule"] | None]
    efficiency: float | None


class TimeBudgetData(TypedDict):
    wall_s: float
    parts: dict[str, float]  # seconds of each of time_budget.PARTS
    warm_up_s: float | None


class SavedPart(TypedDict):
    part: str
    saved_s: float


class Waterfall(TypedDict):
    baseline: str
    candidate: str
    saved_s: float
    steps: list[SavedPart]


class Explain(TypedDict):
    strategies: dict[str, TimeBudgetData | None]
    waterfall: list[Waterfall]


class FitQuality(TypedDict):
    steps: int
    r2: float | None
    median_error: float
    p90_error: float
    worst_error: float
    total_error: float


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
    cost: dict[str, Any]  # of KnownCost.as_dict
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
    cost: NotRequired[dict[str, Any] | None]  # of KnownCost.as_dict, and what it extrapolates
    prediction: NotRequired[Prediction | None]
    server: NotRequired[ServerData | None]
    agreement: NotRequired[Agreement | None]
    failures: NotRequired[list[FailedTrial] | None]


class ResultData(Facts):
    schema_version: int
    batchbench_version: str
    strategies: dict[str, StrategyData]
    comparison: ComparisonData | None
    comparisons: list[ComparisonData]
    explain: Explain
    validity: Validity


def metric(figures: Mapping[str, object], name: str) -> float | None:
    """Return a metric or count whose name is known only at run time."""
    return cast("float | None", figures[name])
