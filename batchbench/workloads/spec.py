"""WorkloadSpec: what a workload is made from."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchbench import settings
from batchbench.errors import UsageError, shown
from batchbench.files import check_there, read_binary
from batchbench.settings import check_value, hints_of, kind_of, setting
from batchbench.workloads import arrival_times
from batchbench.workloads.arrival_times import ArrivalProcess, arrival_process
from batchbench.workloads.lengths import Cycle, Lengths, parse_lengths

_PANEL = "Workload"

_ARRIVALS = "Arrivals"

_TRACE = "Trace files"

TRACE_FORMATS = ("sharegpt", "azure", "burstgpt", "mooncake", "batchbench")

TIME_UNITS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
"""Units of the times of a trace, in ns."""

LENGTHS = (
    "7, 4:64, uniform:min=,max=, normal:mean=,std=, lognormal:mean=,sigma=, exponential:mean=, "
    "zipf:alpha=,max=, cycle:every=,long=,short= or empirical:FILE; bounds with min= and max="
)
"""The grammar, shorter than in errors."""

_CLASSIC = ("long_every", "long_tokens", "short_tokens")

_OF_TRACE = ("trace_format", "trace_block_size", "trace_time_unit", "on_bad_row", "speed")


@dataclass(frozen=True)
class WorkloadSpec:
    """What is asked: how many requests, how long, with which prompts, and when."""

    queue_size: int | None = setting(
        None,
        "Number of requests; of a trace, how many of its first rows.",
        _PANEL,
        min=1,
        max=10**8,
        default_text="32; of a trace all rows",
    )
    long_every: int | None = setting(
        None,
        "One long request at every position divisible by this.",
        _PANEL,
        min=1,
        max=10**9,
        default_text="the batch size",
    )
    long_tokens: int | None = setting(
        None, "Output tokens of a long request.", _PANEL, min=1, max=10**9, default_text="100"
    )
    short_tokens: int | None = setting(
        None,
        "Output tokens of every other request.",
        _PANEL,
        min=1,
        max=10**9,
        default_text="10",
    )
    output_tokens: str | None = setting(
        None,
        f"Lengths of outputs: {LENGTHS}.",
        _PANEL,
        metavar="LENGTHS",
        default_text="the classic cycle of long and short",
        excludes=(*_CLASSIC, "trace"),
        resets=_OF_TRACE,
    )
    prompt_tokens: str | None = setting(
        None,
        "Prompts of random tokens, with lengths as for --output-tokens.",
        _PANEL,
        metavar="LENGTHS",
        default_text="the same 7-token prompt for all",
        excludes=("trace",),
        resets=_OF_TRACE,
    )
    prompts: Path | None = setting(
        None,
        "Your own prompts, a line a prompt, used in turn until the queue is full.",
        _PANEL,
        metavar="FILE",
        excludes=("prompt_tokens", "trace", "shared_prefix_tokens"),
        resets=_OF_TRACE,
    )
    shared_prefix_tokens: int = setting(
        0,
        "Random prompts begin with the same tokens, this many; lengths stay as asked.",
        _PANEL,
        min=0,
        max=10**9,
    )
    overlong: str = setting(
        "error",
        "Requests longer than the model's context: error; clip (outputs first); scale (all "
        "lengths by one factor, so that the longest fits); skip.",
        _PANEL,
        choices=("error", "clip", "scale", "skip"),
    )
    stop_at_eos: bool = setting(
        False,
        "A request ends early when the model ends its text; step counts then depend on the model.",
        _PANEL,
    )
    seed: int = setting(
        0,
        "Seed of lengths, prompts, arrivals (each has a stream of its own) and dummy weights.",
        _PANEL,
        min=0,
        max=2**63 - 1,
    )
    request_rate: float | None = setting(
        None,
        "Requests a second; alone it means Poisson arrivals.",
        _ARRIVALS,
        min=1e-6,
        max=1e9,
        default_text="all at once; of a trace, its own times",
        excludes=("speed",),
    )
    burstiness: float = setting(
        1.0,
        "Shape of gamma-distributed gaps: 1 is Poisson, below 1 burstier, above 1 more even.",
        _ARRIVALS,
        min=0.01,
        max=1000.0,
    )
    arrivals: str | None = setting(
        None,
        f"{arrival_times.GRAMMAR}.",
        _ARRIVALS,
        metavar="PROCESS",
        default_text="as rate and trace say",
        resets=("request_rate", "burstiness", "speed"),
    )
    max_concurrency: int | None = setting(
        None,
        "Closed loop: at most this many requests are in the system, whenever they are due.",
        _ARRIVALS,
        min=1,
        max=10**8,
    )
    trace: Path | None = setting(
        None,
        "Replay a trace: ShareGPT, Azure, BurstGPT, Mooncake, or what workload save wrote.",
        _TRACE,
        metavar="FILE",
        excludes=_CLASSIC,
    )
    trace_format: str | None = setting(
        None,
        "Format of the trace.",
        _TRACE,
        choices=TRACE_FORMATS,
        metavar="FORMAT",
        default_text="told by its content",
    )
    trace_block_size: int | None = setting(
        None,
        "Tokens of a block that a Mooncake trace names in hash_ids.",
        _TRACE,
        min=1,
        max=10**9,
        default_text="inferred from its rows; 512 if that fits",
    )
    trace_time_unit: str | None = setting(
        None,
        "Unit of the times of a Mooncake trace.",
        _TRACE,
        choices=tuple(TIME_UNITS),
        metavar="UNIT",
        default_text="inferred from its rows; ms if that is plausible",
    )
    speed: float = setting(
        1.0,
        "A trace's own times run this many times faster.",
        _TRACE,
        min=1e-6,
        max=1e9,
        resets=("arrivals", "burstiness"),
    )
    on_bad_row: str | None = setting(
        None,
        "Rows of a trace that are wrong: error, or skip and say how many.",
        _TRACE,
        choices=("error", "skip"),
        metavar="WHAT",
        default_text="error",
    )

    def __post_init__(self) -> None:
        settings.check(self)
        self._check_trace()
        _ = self.process
        for option, text in (
            ("--prompt-tokens", self.prompt_tokens),
            ("--output-tokens", self.output_tokens),
        ):
            if text is not None:
                lengths = parse_lengths(text, option)
                if file := getattr(lengths, "file", None):
                    check_there(file, f"{option} {text}")
        for option, file in (("--prompts", self.prompts), ("--trace", self.trace)):
            if file is not None:
                check_there(file, f"{option} {file}")
        if self.shared_prefix_tokens and self.prompt_tokens is None and self.trace is None:
            raise UsageError(
                f"--shared-prefix-tokens {self.shared_prefix_tokens}: needs random prompts; "
                "give --prompt-tokens"
            )

    def _check_trace(self) -> None:
        if self.trace is None:
            for name in _OF_TRACE:
                if (value := getattr(self, name)) != (1.0 if name == "speed" else None):
                    raise UsageError(
                        f"{settings.option_name(name)} {value}: there is no trace; "
                        "give --trace FILE"
                    )
        elif self.speed != 1.0 and self.process.kind != "trace":
            raise UsageError(
                f"--speed {self.speed:g}: is of the trace's own times; drop --arrivals"
            )

    @property
    def process(self) -> ArrivalProcess:
        """How requests come in."""
        return arrival_process(
            self.arrivals, self.request_rate, self.burstiness, trace=self.trace is not None
        )

    def output_lengths(self, batch_size: int) -> Lengths:
        """Lengths of outputs; the classic cycle has a long request a batch."""
        if self.output_tokens is not None:
            return parse_lengths(self.output_tokens, "--output-tokens")
        return Cycle(
            self.long_every or batch_size, self.long_tokens or 100, self.short_tokens or 10
        )


LIMIT = 2**16
"""Largest size of a workload file, which has about twenty keys."""

_MOST_DOTS = 100
"""Most dots of a line: the parser's time grows with the square of a dotted key's parts."""

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def read_workload_file(file: Path) -> dict[str, Any]:
    """The settings that a TOML file gives, by field of :class:`WorkloadSpec`.

    Files that it names are sought beside it.

    Raises:
        UsageError: it is no TOML, has an unknown key, or a value that is not of its key.
    """
    where = f"--workload {file}"
    try:
        text = read_binary(file, where, LIMIT).decode("utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            if line.count(".") > _MOST_DOTS and not line.lstrip().startswith("#"):
                raise UsageError(f"{where}: line {number}: has more than {_MOST_DOTS} dots")
        table = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: is not UTF-8 text; save it as UTF-8") from error
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        raise UsageError(f"{where}: is not TOML: {shown(error, 200)}") from error
    hints = hints_of(WorkloadSpec)
    known = {field.name: field for field in dataclasses.fields(WorkloadSpec)}
    found = {}
    for key, value in table.items():
        if key not in known:
            raise UsageError(f"{where}: unknown key {shown(key)}; it takes {', '.join(known)}")
        place = f"{where}: {key} = {_spelled(value)}"
        found[key] = _value(place, hints[key], value, file.parent)
        check_value(known[key], found[key], place)
    return found


def _spelled(value: object) -> str:
    """Return a value for a message, as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{shown(value)}'" if isinstance(value, str) else shown(value)


def _value(where: str, hint: Any, value: Any, folder: Path) -> Any:
    """A TOML value as a field of this type holds it."""
    kind: Any = kind_of(hint)
    if kind is Path:
        if isinstance(value, str) and value:
            return folder / value
        raise UsageError(f"{where}: must be the name of a file, in quotes")
    if kind is str and type(value) is int:  # output_tokens = 7
        value = str(value)
    if kind is int and type(value) is float and value.is_integer():  # queue_size = 1e2
        value = int(value)
    if kind is float and type(value) is int and abs(value) < 10**300:
        value = float(value)
    if type(value) is not kind:
        raise UsageError(f"{where}: must be {_KINDS[kind]}")
    family, _, rest = value.partition(":") if kind is str else ("", "", "")
    if family.strip() == "empirical" and rest:
        return f"empirical:{folder / rest}"
    return value
