"""Gates of each answer, and random gates."""

from __future__ import annotations

from hypothesis import strategies as st

from batchbench.batching.machine import Difference
from batchbench.reports.statistics import Verdict
from batchbench.studies.gate.evidence import Evidence, Gate, Kind, Side

TYPED = "batchbench duet --base-ref main --preset ci"
BASE = Side("main", {"commit": "8faaed2", "python": "3.12.4"})
NEW = Side("here", {"commit": "1234567+", "python": "3.12.4"})
DIGESTS = ("3f" * 32, "a7" * 32)


def count(metric: str, base: int, new: int, *, fails: bool | None = None) -> Evidence:
    """A count of work, gated."""
    same = base == new
    return Evidence(
        Kind.WORK,
        metric,
        "continuous",
        base,
        new,
        Verdict.SAME if same else Verdict.CHANGED,
        fails=not same if fails is None else fails,
        gated=True,
        change=new / base - 1,
    )


def throughput(verdict: Verdict, *, gated: bool = True) -> Evidence:
    """A throughput that lost 5 %, or seems to have."""
    return Evidence(
        Kind.TIME,
        "output_throughput",
        "continuous",
        1234.5,
        1172.8,
        verdict,
        fails=gated and verdict is Verdict.SLOWER,
        gated=gated,
        unit="tok/s",
        higher_is_better=True,
        change=-0.05,
        low=-0.061,
        high=-0.043,
        smallest=0.021,
        needed="23 pairs" if verdict is Verdict.UNKNOWN else None,
        samples=(8, 8),
    )


SAME = [count(name, 400, 400) for name in ("forward_passes", "slot_steps")]
DIGEST = Evidence(
    Kind.WORK, "output_digest", "static", *DIGESTS, Verdict.CHANGED, fails=True, gated=True
)


def gate(*evidence: Evidence, unsure: str | None = None) -> Gate:
    """A gate of this evidence, with all else that a gate may have."""
    return Gate(
        "duet",
        TYPED,
        BASE,
        NEW,
        evidence,
        settings=[Difference("batch size", 8, 16)],
        environment=[Difference("torch", "2.13.0", "2.12.1")],
        notes=["a note"],
        unsure=unsure,
        seconds=74.0,
    )


PASSED = gate(*SAME, throughput(Verdict.SAME))
FAILED = gate(*SAME, count("decode_passes", 396, 399), DIGEST, throughput(Verdict.SLOWER))
UNKNOWN = gate(*SAME, throughput(Verdict.UNKNOWN))
UNSURE = gate(*SAME, unsure="only 3 process pairs")
UNGATED = gate(*SAME, throughput(Verdict.SLOWER, gated=False))
EMPTY = Gate("compare", "batchbench compare a b", Side("a"), Side("b"), [])

nasty = st.text(max_size=12) | st.sampled_from(
    [
        "::error::",
        "a|b`c`<b>",
        "%0A",
        "x\r\ny",
        "\x00\x1b[2J",
        "\ud800",
        "]]>",
        "[red]",
        "- `$(id)`",
    ]
)
"""Text that means something to one format or another."""

numbers = st.none() | st.floats(allow_nan=True, allow_infinity=True) | st.integers(0, 10**6)


@st.composite
def pieces(draw: st.DrawFn) -> Evidence:
    """Any evidence, nonsense too."""
    text, number = draw(nasty), draw(numbers)
    verdict = draw(st.sampled_from(Verdict))
    gated = draw(st.booleans())
    return Evidence(
        draw(st.sampled_from(Kind)),
        draw(nasty),
        draw(st.none() | nasty),
        draw(numbers | nasty),
        draw(numbers | nasty),
        verdict,
        fails=gated and draw(st.booleans()),
        gated=gated,
        unit=draw(st.none() | nasty),
        change=draw(st.none() | st.floats(allow_nan=True, allow_infinity=True)),
        low=number,
        high=draw(numbers),
        smallest=draw(numbers),
        needed=draw(st.none() | nasty),
        why=draw(st.none() | st.just(text)),
    )


@st.composite
def gates(draw: st.DrawFn) -> Gate:
    """Any gate."""
    varying = st.builds(Difference, nasty, nasty | numbers, nasty | st.lists(nasty, max_size=2))
    sides = st.builds(Side, nasty, st.dictionaries(nasty, st.none() | nasty, max_size=2))
    return Gate(
        draw(st.sampled_from(["duet", "check", "compare"])),
        draw(nasty),
        draw(sides),
        draw(sides),
        draw(st.lists(pieces(), max_size=4)),
        settings=draw(st.lists(varying, max_size=2)),
        notes=draw(st.lists(nasty, max_size=2)),
        unsure=draw(st.none() | nasty),
        seconds=draw(st.none() | st.floats(0, 1e6)),
    )
