"""Colours of strategies, the same in every picture and on the terminal."""

from __future__ import annotations

from collections.abc import Iterable

VERMILLION, BLUE = "#D55E00", "#0072B2"
_OKABE_ITO = (VERMILLION, BLUE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b6b6b")
"""Okabe and Ito's colours, which colour-blind people can tell apart; then grey."""


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """Static is always vermillion and continuous blue; others get what is left, in order."""
    names = list(names)
    fixed = {"static": VERMILLION, "continuous": BLUE}
    taken = {fixed[name] for name in names if name in fixed}
    left = [colour for colour in _OKABE_ITO if colour not in taken]
    others = [name for name in names if name not in fixed]
    return fixed | {name: left[i % len(left)] for i, name in enumerate(others)}
