"""How much of a trial passes within the model's forward pass, and how much outside of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from batchbench.batching.engines.torch.attention import Layout
from batchbench.batching.engines.torch.forward import Forward, TransformersForward


class ModelClock:
    """Adds up the time within a model's forward pass: ids in, logits out.

    On a device that computes while the host goes on, the host's clock tells only what launching
    takes; there it is of no use.
    """

    def __init__(self) -> None:
        self.ns = 0

    def timed(self, forward: Forward) -> Forward:
        """The same forward pass, timed; one that calls the module is timed there already."""
        return forward if isinstance(forward, TransformersForward) else _Timed(forward, self)

    @contextmanager
    def on(self, module: torch.nn.Module) -> Iterator[ModelClock]:
        """Time every call of the module, from 0, whoever makes it and in whichever thread."""
        self.ns = 0
        began: list[int] = []

        def begins(*_: Any) -> None:
            began.append(time.perf_counter_ns())

        def ends(*_: Any) -> None:
            self.ns += time.perf_counter_ns() - began.pop()

        hooks = (module.register_forward_pre_hook(begins), module.register_forward_hook(ends))
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()


class _Timed:
    """A forward pass that is not made by calling the module."""

    def __init__(self, forward: Forward, clock: ModelClock) -> None:
        self._forward, self._clock = forward, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._forward, name)

    def __call__(
        self, ids: torch.Tensor, layout: Layout, keep: torch.Tensor | None
    ) -> torch.Tensor:
        began = time.perf_counter_ns()
        logits = self._forward(ids, layout, keep)
        self._clock.ns += time.perf_counter_ns() - began
        return logits
