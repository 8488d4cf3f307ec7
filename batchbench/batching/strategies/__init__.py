"""Strategies that schedule by themselves: other engines in this process, as plug-ins.

A package adds one under the entry point group ``batchbench.strategies``: a factory that takes a
:class:`Context` and returns a :class:`~batchbench.batching.batcher.Strategy`. It is imported only
when ``--strategy`` names it. docs/bring-your-own-engine.md shows a complete one.
"""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from batchbench.batching.policies import POLICIES, spell_error
from batchbench.errors import BatchbenchError, UsageError, shown

if TYPE_CHECKING:
    from batchbench.batching.batcher import Strategy
    from batchbench.batching.models.loading import LoadedModel
    from batchbench.batching.models.source import ModelSpec, Source
    from batchbench.batching.recording import Header
    from batchbench.workloads import Workload

GROUP = "batchbench.strategies"

_ABOUT: Mapping[str, str] = {
    "static": "batches of the waiting requests",
    "static-fixed": "static, and each batch waits until it is full",
    "static-bucketed": "static, sorted by prompt length",
    "static-oracle": "static, sorted by output length as if known: the best case",
    "continuous": "a finished request is replaced at the next step",
    "generate_batch": "transformers' own continuous batching",
    "vllm": "vLLM's own continuous batching, in this process",
    "vllm-static": "vLLM's engine, one batch after another",
}

GENERATE_BATCH_SAMPLES = (
    "--strategy generate_batch: transformers draws all tokens of a batch from one random stream, "
    "so they depend on the batch; remove it, or give --temperature 0"
)


def listing() -> list[str]:
    """Return the lines of ``--strategy help``; no plug-in is imported."""
    rows = list(_ABOUT.items())
    rows += [(plug_in.name, f"from the package {plug_in.package}") for plug_in in registered()]
    rows.append(("package.module:Class", "your own policy, in a file in this folder or installed"))
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {about}" for name, about in rows]


@dataclass(frozen=True)
class Context:
    """The experiment, as far as an engine needs it.

    ``max_len`` is the length in tokens, prompt and output, of the longest request that will be
    served. ``spec`` has the number format, device and threads as asked, and ``source`` the files.
    """

    name: str  # of the strategy
    slots: int  # requests computed together
    max_len: int
    order: str  # of the queue, a key of batchbench.batching.policies.ORDERS
    max_batched_tokens: int  # of one pass
    source: Source
    spec: ModelSpec
    load: Callable[[], LoadedModel] = field(repr=False)
    """Return the model as a torch module; it is loaded once for all strategies."""

    def header(self, workload: Workload, trial: int, **about: Any) -> Header:
        """Return the header of a trial's recording; ``about`` has facts for the result."""
        from batchbench.batching.recording import Header

        return Header.of(self.name, trial, self.slots, workload, about)


@dataclass(frozen=True)
class PlugIn:
    """A registered factory; ``package`` is the name and version of what registered it."""

    name: str
    target: str  # module:attribute
    package: str

    @property
    def is_ours(self) -> bool:
        """True if an error in it is a bug of batchbench."""
        return self.package == _US

    def make(self, context: Context) -> Strategy:
        """Import the factory and call it; raise UsageError if it returns no strategy."""
        try:
            strategy: Strategy = pkgutil.resolve_name(self.target)(context)
        except (BatchbenchError, KeyboardInterrupt, MemoryError):
            raise
        except BaseException as error:  # the code of others may raise anything
            if self.is_ours:
                raise
            raise self.fault("cannot be made", error) from error
        if not callable(getattr(strategy, "serve", None)):
            kind = type(strategy).__name__
            raise self.fault(f"made a {kind}", "a strategy has a method serve(workload, watch)")
        return strategy

    def fault(self, what: str, error: BaseException | str) -> UsageError:
        """Return the error to raise, which names the package."""
        why = error if isinstance(error, str) else spell_error(error)
        place = f"--strategy {shown(self.name)}: the package {shown(self.package)}"
        return UsageError(f"{place} {what}: {why}")


_US = "batchbench"
_VLLM = "batchbench.batching.strategies.vllm:make"

OURS: Mapping[str, PlugIn] = {
    plug_in.name: plug_in
    for plug_in in (
        PlugIn("generate_batch", "batchbench.batching.engines.generate_batch:make", _US),
        PlugIn("vllm", _VLLM, "vllm"),
        PlugIn("vllm-static", _VLLM, "vllm"),
    )
}
"""Plug-ins of this package, which are found without reading entry points."""


def find(name: str) -> PlugIn:
    """Return the one plug-in of this name, without importing it; else raise UsageError."""
    if name in OURS:
        return OURS[name]
    found = [plug_in for plug_in in registered() if plug_in.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        both = " and ".join(plug_in.package for plug_in in found)
        why = f"{both} both have a strategy of this name; uninstall one"
    else:
        near = difflib.get_close_matches(name, [*POLICIES, *OURS], 1)
        hint = f"did you mean {near[0]}? " if near else ""
        why = f"no such strategy; {hint}--strategy help lists all; name your own class as "
        why += "package.module:Class"
    raise UsageError(f"--strategy {shown(name)}: {why}")


def registered() -> list[PlugIn]:
    """Return the plug-ins of other packages, by name; none is imported."""
    from importlib import metadata

    found = {
        PlugIn(entry.name, entry.value, f"{entry.dist.name} {entry.dist.version}")
        for entry in metadata.entry_points(group=GROUP)
        if entry.dist is not None and entry.name not in OURS and entry.name not in POLICIES
    }
    return sorted(found, key=lambda plug_in: (plug_in.name, plug_in.package))
