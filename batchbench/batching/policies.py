"""Policies: who may join at this step, and when a finished request gives up its slot.

These two decisions are all in which static and continuous batching differ. A policy holds no
loop and no queue: it is asked, and answers from what it is shown.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from batchbench.errors import UsageError

if TYPE_CHECKING:
    from batchbench.workloads import Request


class View(Protocol):
    """What a policy may see when it is asked."""

    @property
    def now(self) -> int:
        """Time in ns since the start of the trial."""

    @property
    def waiting(self) -> Sequence[Request]:
        """Requests that are due and not admitted, in the order of the queue."""

    @property
    def free(self) -> int:
        """Number of slots that nobody holds."""

    @property
    def running(self) -> int:
        """Number of requests that hold a slot and are not done."""

    @property
    def finished(self) -> Collection[int]:
        """Slots held by requests that are done."""

    @property
    def more_to_come(self) -> bool:
        """Whether requests may come that are not due yet."""


class Policy(Protocol):
    """The two decisions."""

    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        """The waiting requests that join now, at most ``view.free``; and a time (ns) at which to
        ask again though nothing else has happened, or None."""

    def release(self, view: View) -> Iterable[int]:
        """Which of ``view.finished`` become free now."""


class Static:
    """Requests are served in batches; a batch runs until its longest request is done.

    A finished request holds its slot, and goes on being computed, until the whole batch is done.
    """

    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        """A new batch when no request is running."""
        return ((), None) if view.running else (view.waiting[: view.free], None)

    def release(self, view: View) -> Iterable[int]:
        """The whole batch at once."""
        return () if view.running else view.finished


class Continuous:
    """At every step finished requests make room for waiting ones (Orca's iteration-level
    scheduling: Yu et al., OSDI 2022)."""

    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        """As many as there are free slots."""
        return view.waiting[: view.free], None

    def release(self, view: View) -> Iterable[int]:
        """At once."""
        return view.finished


POLICIES: dict[str, Callable[[], Policy]] = {"static": Static, "continuous": Continuous}


def make_policy(name: str) -> Policy:
    """A policy by name, or one of yours as ``package.module:Class``.

    Raises:
        UsageError: no such policy, or it cannot be imported or made, or lacks a method.
    """
    if ":" not in name:
        if name not in POLICIES:
            raise UsageError(
                f"--strategy {name}: must be one of {', '.join(POLICIES)}, generate_batch, "
                "or a class of yours as package.module:Class"
            )
        return POLICIES[name]()
    module_name, _, class_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` does, so that a file beside you can be named
        sys.path.insert(0, here)
    try:
        policy = getattr(importlib.import_module(module_name), class_name)()
    except (Exception, SystemExit) as error:  # the user's code: whatever it raises is an answer
        raise UsageError(f"--strategy {name}: {type(error).__name__}: {error}") from error
    for method in ("admit", "release"):
        if not callable(getattr(policy, method, None)):
            raise UsageError(f"--strategy {name}: the class needs a method {method}(view)")
    found: Policy = policy
    return found
