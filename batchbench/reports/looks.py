"""Colours and dashes of strategies, the same in every picture and on the terminal."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

LOOKS: dict[str, tuple[str, Any]] = {
    "static": ("#D55E00", "solid"),
    "continuous": ("#0072B2", (0, (4, 1.4))),
    "static-fixed": ("#009E73", (0, (1.2, 1.2))),
    "static-bucketed": ("#CC79A7", (0, (6, 1.5, 1.2, 1.5))),
    "static-oracle": ("#E69F00", (0, (8, 2))),
}
"""Colour and dashes of our own strategies."""

_OTHER_LOOKS: tuple[tuple[str, Any], ...] = (
    ("#56B4E9", (0, (3, 1, 1, 1, 1, 1))),
    ("#6b6b6b", (0, (2.5, 2.5))),
)
"""Of the others, after those of ours that are free. Okabe and Ito's colours, which
colour-blind people can tell apart; then grey."""


def looks_of(names: Collection[str]) -> dict[str, tuple[str, Any]]:
    """Static is always vermillion and continuous blue; others get what is left, in order."""
    left = [look for name, look in LOOKS.items() if name not in names]
    left += _OTHER_LOOKS
    others = [name for name in names if name not in LOOKS]
    return LOOKS | {name: left[i % len(left)] for i, name in enumerate(others)}
