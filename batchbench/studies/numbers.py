"""The small grammar of swept numbers: ``1,2,4``, ``1:16``, ``1:16:2``, and all mixed."""

from __future__ import annotations

from decimal import Decimal

from batchbench.errors import UsageError, shown
from batchbench.values import parse_number

GRAMMAR = (
    "a number (8), a list (1,2,4), start:stop (1:3 is 1, 2, 3) or start:stop:step (1:16:5 is 1, 6, "
    "11, 16)"
)

MOST = 10_000
"""Values of one option; a longer range is a slip of the pen."""


def parse_numbers(text: str, kind: type[int] | type[float], option: str) -> list[int | float]:
    """The numbers that ``text`` names, in its order; a stop that is hit is one of them.

    Raises:
        UsageError: the text is not of the grammar, or names too many numbers; names ``option``.
    """
    found: list[int | float] = []
    place = f"{option} {shown(text)}"
    for part in text.split(","):
        for number in _range(part, place):
            value = kind(number)
            if value != number and kind is int:
                raise UsageError(f"{place}: {shown(number)} must be a whole number")
            found.append(value)
        if len(found) > MOST:
            raise UsageError(f"{place}: more than {MOST:,} values; give fewer")
    return found


def _range(part: str, asked: str) -> list[Decimal]:
    """One number, or those of a range; decimals, since 0.1 + 0.2 must be 0.3."""
    numbers = [parse_number(piece, asked, f"must be {GRAMMAR}") for piece in part.split(":")]
    if len(numbers) == 1:
        return numbers
    if len(numbers) > 3:
        raise UsageError(f"{asked}: must be {GRAMMAR}")
    start, stop, step = numbers if len(numbers) == 3 else (*numbers, Decimal(1))
    if step == 0 or (stop - start) / step < 0:
        raise UsageError(
            f"{asked}: a step of {shown(step)} does not lead from {shown(start)} to {shown(stop)}"
        )
    if (stop - start) / step >= MOST:
        raise UsageError(f"{asked}: more than {MOST:,} values; take a larger step")
    return [start + i * step for i in range(int((stop - start) / step) + 1)]
