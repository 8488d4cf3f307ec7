"""WorkloadSpec, the options of a workload, and the TOML file that holds them."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchbench import settings
from batchbench.errors import UsageError, shown
from batchbench.files import check_there, read_utf8
from batchbench.settings import setting
from batchbench.workloads.arrivals import GRAMMAR as ARRIVALS_GRAMMAR
from batchbench.workloads.arrivals import ArrivalProcess, arrival_process
from batchbench.workloads.lengths import Cycle, Lengths, parse_lengths
from batchbench.workloads.sampling import LEAST_TEMPERATURE, Sampling

TRACE_FORMATS = ("sharegpt", "azure", "burstgpt", "mooncake", "batchbench")

TIME_UNITS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
"""Units of the times in a trace, in ns."""

LIMIT = 2**16
"""Largest size of a workload file in bytes; it has about twenty keys."""

_PANEL, _ARRIVALS, _TRACE = "Workload", "Arrivals", "Trace files"

_LENGTHS = (
    "7, 4:64, uniform:min=,max=, normal:mean=,std=, lognormal:mean=,sigma=, exponential:mean=, "
    "zipf:alpha=,max=, cycle:every=,long=,short= or empirical:FILE; bounds with min= and max="
)

_CLASSIC = ("long_every", "long_tokens", "short_tokens")

_OF_TRACE = ("trace_format", "trace_block_size", "trace_time_unit", "on_bad_row", "speed")

_MOST_DOTS = 100
"""Maximum number of dots in a line: parsing takes time quadratic in the parts of a dotted key."""


@dataclass(frozen=True)
class WorkloadSpec:
    """The options of a workload: the number of requests, their lengths, prompts and arrivals."""

    queue_size: int | None = setting(
        None,
        "Number of requests; with --trace, the number of rows to read.",
        _PANEL,
        min=1,
        max=10**8,
        default_text="32, or all rows of a trace",
    )
    long_every: int | None = setting(
        None,
        "Every Nth request is long, the first included.",
        _PANEL,
        min=1,
        max=10**9,
        default_text="the batch size, so --batch-size changes the workload",
    )
    long_tokens: int | None = setting(
        None, "Output tokens of a long request.", _PANEL, min=1, max=10**9, default_text="100"
    )
    short_tokens: int | None = setting(
        None, "Output tokens of all other requests.", _PANEL, min=1, max=10**9, default_text="10"
    )
    output_tokens: str | None = setting(
        None,
        f"Output lengths, such as 10, 4:64 or lognormal:mean=,sigma=. All forms: {_LENGTHS}.",
        _PANEL,
        metavar="LENGTHS",
        default_text="the cycle of long and short requests",
        excludes=(*_CLASSIC, "trace"),
        resets=_OF_TRACE,
    )
    prompt_tokens: str | None = setting(
        None,
        "Random prompts of these lengths, written as for --output-tokens.",
        _PANEL,
        metavar="LENGTHS",
        default_text="the same 7-token prompt for all requests",
        excludes=("trace",),
        resets=(*_OF_TRACE, "chat_template"),
    )
    prompts: Path | None = setting(
        None,
        "Text file with one prompt per line; the prompts are repeated to fill the queue.",
        _PANEL,
        metavar="FILE",
        excludes=("prompt_tokens", "trace", "shared_prefix_tokens"),
        resets=_OF_TRACE,
    )
    chat_template: bool = setting(
        False,
        "Wrap each prompt of --prompts, as a user's message, in the chat template of the "
        "model's tokenizer.",
        _PANEL,
        omit_default=True,
    )
    shared_prefix_tokens: int = setting(
        0,
        "Number of tokens at the start that all random prompts have in common.",
        _PANEL,
        min=0,
        max=10**9,
    )
    overlong: str = setting(
        "error",
        "What happens to requests longer than the model's context. error: the command stops; "
        "clip: they are shortened, outputs first; scale: one factor shortens all requests so that "
        "the longest possible one fits; skip: they are left out.",
        _PANEL,
        choices=("error", "clip", "scale", "skip"),
    )
    stop_at_eos: bool = setting(
        False,
        "End a request at the model's end-of-sequence token; the number of steps then depends on "
        "the model.",
        _PANEL,
    )
    temperature: float | None = setting(
        None,
        "Draw each token from softmax(logits / temperature); 0 is greedy.",
        _PANEL,
        min=0.0,
        max=100.0,
        default_text="0, or the value in the trace",
        omit_default=True,
    )
    top_p: float = setting(
        1.0,
        "Draw from the most likely tokens that together have at least this probability.",
        _PANEL,
        min=1e-6,
        max=1.0,
        omit_default=True,
    )
    top_k: int = setting(
        0,
        "Draw from the N most likely tokens; applied before --top-p; 0 keeps all tokens.",
        _PANEL,
        min=0,
        max=10**9,
        omit_default=True,
    )
    seed: int = setting(
        0,
        "Seed for lengths, prompts, arrivals, sampled tokens (each has its own random stream) and "
        "dummy weights.",
        _PANEL,
        min=0,
        max=2**63 - 1,
    )
    request_rate: float | None = setting(
        None,
        "Requests per second; without --arrivals they form a Poisson process.",
        _ARRIVALS,
        min=1e-6,
        max=1e9,
        default_text="all at once, or the times in the trace",
        excludes=("speed",),
    )
    burstiness: float = setting(
        1.0,
        "Shape of the gamma-distributed gaps: 1 is Poisson, below 1 burstier, above 1 more even.",
        _ARRIVALS,
        min=0.01,
        max=1000.0,
    )
    arrivals: str | None = setting(
        None,
        f"Arrival process: {ARRIVALS_GRAMMAR}.",
        _ARRIVALS,
        metavar="PROCESS",
        default_text="poisson with a rate, trace with a trace, else at-once",
        resets=("request_rate", "burstiness", "speed"),
    )
    max_concurrency: int | None = setting(
        None,
        "Closed loop: at most this many requests are in the system at once.",
        _ARRIVALS,
        min=1,
        max=10**8,
    )
    trace: Path | None = setting(
        None,
        "Replay a trace: ShareGPT, Azure, BurstGPT, Mooncake, or a file made by workload save.",
        _TRACE,
        metavar="FILE",
        excludes=_CLASSIC,
        resets=("chat_template",),
    )
    trace_format: str | None = setting(
        None,
        "Format of the trace.",
        _TRACE,
        choices=TRACE_FORMATS,
        metavar="FORMAT",
        default_text="detected from its content",
    )
    trace_block_size: int | None = setting(
        None,
        "Tokens per block in the hash_ids of a Mooncake trace.",
        _TRACE,
        min=1,
        max=10**9,
        default_text="inferred from its rows; 512 if that fits",
    )
    trace_time_unit: str | None = setting(
        None,
        "Unit of the times in a Mooncake trace.",
        _TRACE,
        choices=tuple(TIME_UNITS),
        metavar="UNIT",
        default_text="inferred from its rows; ms if that is plausible",
    )
    speed: float = setting(
        1.0,
        "Replay the times of a trace this many times faster.",
        _TRACE,
        min=1e-6,
        max=1e9,
        resets=("arrivals", "burstiness"),
    )
    on_bad_row: str | None = setting(
        None,
        "What happens to invalid rows of a trace. error: the command stops; skip: they are left "
        "out and counted.",
        _TRACE,
        choices=("error", "skip"),
        metavar="WHAT",
        default_text="error",
    )

    def __post_init__(self) -> None:
        settings.check(self)
        self._check_trace()
        _ = self.process
        files = {"--prompts ": self.prompts, "--trace ": self.trace}
        for name in ("prompt_tokens", "output_tokens"):
            if (text := getattr(self, name)) is not None:
                option = settings.option_name(name)
                lengths = parse_lengths(text, option)
                files[f"{option} empirical:"] = getattr(lengths, "file", None)
        for place, file in files.items():
            if file is not None:
                check_there(file, f"{place}{file}")
        if self.shared_prefix_tokens and self.prompt_tokens is None and self.trace is None:
            raise UsageError(
                f"--shared-prefix-tokens {self.shared_prefix_tokens}: needs random prompts; "
                "give --prompt-tokens"
            )
        if self.temperature is None and (self.top_p != 1.0 or self.top_k):
            cut = f"--top-k {self.top_k}" if self.top_k else f"--top-p {self.top_p:g}"
            raise UsageError(f"{cut}: greedy decoding has no use for it; give --temperature")
        if self.temperature and self.temperature < LEAST_TEMPERATURE:
            must = f"must be 0, which is greedy, or at least {LEAST_TEMPERATURE:g}"
            raise UsageError(f"--temperature {self.temperature:g}: {must}")
        if self.chat_template and self.prompts is None:
            raise UsageError("--chat-template: needs prompts as text; give --prompts FILE")

    def _check_trace(self) -> None:
        if self.trace is None:
            for name in _OF_TRACE:
                if (value := getattr(self, name)) != (1.0 if name == "speed" else None):
                    option = settings.option_name(name)
                    raise UsageError(f"{option} {value}: needs a trace; give --trace FILE")
        elif self.speed != 1.0 and self.process.kind != "trace":
            raise UsageError(
                f"--speed {self.speed:g}: applies to the trace's own times; drop --arrivals"
            )

    @property
    def process(self) -> ArrivalProcess:
        """The process by which requests arrive."""
        return arrival_process(
            self.arrivals, self.request_rate, self.burstiness, trace=self.trace is not None
        )

    @property
    def sampling(self) -> Sampling | None:
        """The way to draw tokens; None for greedy decoding."""
        if not self.temperature:
            return None
        return Sampling(self.temperature, self.top_p, self.top_k, self.seed)

    def output_lengths(self, batch_size: int) -> Lengths:
        """Return the distribution of output lengths; ``batch_size`` is the usual ``long_every``."""
        if self.output_tokens is not None:
            return parse_lengths(self.output_tokens, "--output-tokens")
        return Cycle(
            self.long_every or batch_size, self.long_tokens or 100, self.short_tokens or 10
        )


def read_workload_file(file: Path) -> dict[str, Any]:
    """Return the settings in a TOML file by field; its paths are relative to the file."""
    where = f"--workload {file}"
    text = read_utf8(file, where, LIMIT)
    try:
        for number, line in enumerate(text.splitlines(), 1):
            if line.count(".") > _MOST_DOTS and not line.lstrip().startswith("#"):
                raise UsageError(f"{where}: line {number}: has more than {_MOST_DOTS} dots")
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        raise UsageError(f"{where}: is not TOML: {shown(error, 200)}") from error
    fields = {field.name: field for field in dataclasses.fields(WorkloadSpec)}
    for key in table:
        if key not in fields:
            raise UsageError(f"{where}: unknown key {shown(key)}; it takes {', '.join(fields)}")

    def place(key: str, value: object) -> str:
        text = str(value).lower() if isinstance(value, bool) else settings.written(value)
        return f"{where}: {key} = {text}"

    values = settings.typed(WorkloadSpec, table, place)
    for key, value in values.items():
        if isinstance(value, Path):
            values[key] = file.parent / value
        elif isinstance(value, str):
            family, _, path = value.partition(":")
            if family.strip() == "empirical" and path:
                values[key] = f"empirical:{file.parent / path}"
        settings.check_value(fields[key], value, place(key, table[key]))
    return values
