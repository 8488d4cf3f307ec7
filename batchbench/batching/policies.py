"""Policies decide which requests join at a step, and when a finished request gives up its slot.

Static and continuous batching differ in these two decisions only. A policy has no loop and no
queue: it decides from the view that it gets.
"""

from __future__ import annotations

import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from batchbench.errors import UsageError, reason_in_short, shown

if TYPE_CHECKING:
    from batchbench.workloads import Request


ORDERS: dict[str, Callable[[Request], tuple[int, int]]] = {
    "fifo": lambda request: (0, request.index),
    "longest-first": lambda request: (-request.output_tokens, request.index),
    "shortest-first": lambda request: (request.output_tokens, request.index),
    "longest-prompt-first": lambda request: (-request.prompt_tokens, request.index),
}
"""The sort key of each ``--order``; requests of equal length keep the order of arrival."""


class View(Protocol):
    """The state that a policy sees."""

    @property
    def now(self) -> int:
        """Time in ns since the start of the trial."""

    @property
    def waiting(self) -> Sequence[Request]:
        """Requests that are due and not admitted, in the order of the queue."""

    @property
    def oldest(self) -> Request:
        """The request of ``waiting`` that has waited longest; raises IndexError if none waits."""

    @property
    def free(self) -> int:
        """Number of free slots."""

    @property
    def running(self) -> int:
        """Number of requests that hold a slot and are not finished."""

    @property
    def finished(self) -> Collection[int]:
        """Slots held by finished requests."""

    @property
    def more_to_come(self) -> bool:
        """True if more requests will come even if none is admitted now."""


class Policy(Protocol):
    """The two decisions.

    A policy may have an attribute ``order``, a key of :data:`ORDERS`; it replaces ``--order``.
    """

    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        """Return the waiting requests that join now, at most ``view.free``; and the time (ns) at
        which to ask again even if nothing else happens, or None."""

    def release(self, view: View) -> Iterable[int]:
        """Return the slots of ``view.finished`` that become free now."""


class Static:
    """Serves fixed batches; a batch runs until its longest request is done.

    A finished request holds its slot, and is still computed, until the whole batch is done. A batch
    closes when it is full, or ``max_wait_ns`` after its oldest request was due, as in Triton's
    dynamic batcher: 0 takes the requests that are waiting. None waits for a full batch as long as
    more requests will come.
    """

    def __init__(self, max_wait_ns: int | None = 0) -> None:
        self._max_wait_ns = max_wait_ns

    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        if view.running:
            return (), None
        if len(view.waiting) < view.free:
            if self._max_wait_ns is None:
                if view.more_to_come:
                    return (), None
            elif view.now < (closes := view.oldest.due_ns + self._max_wait_ns):
                return (), closes
        return self._batch(view), None

    def release(self, view: View) -> Iterable[int]:
        return () if view.running else view.finished

    def _batch(self, view: View) -> Sequence[Request]:
        return view.waiting[: view.free]


class _Sorted(Static):
    """Serves batches of similar requests: the part of the sorted queue with the oldest one."""

    def _batch(self, view: View) -> Sequence[Request]:
        begin = view.waiting.index(view.oldest) // view.free * view.free
        return view.waiting[begin : begin + view.free]


class Bucketed(_Sorted):
    """Static batches of prompts of similar length, so that little padding is computed."""

    order = "longest-prompt-first"


class Oracle(_Sorted):
    """Static batches of outputs of similar, known length: the best case of static batching.

    No other way to cut a queue into batches takes fewer steps.
    """

    order = "longest-first"


class Continuous:
    """Replaces finished requests by waiting ones at every step (iteration-level scheduling, Orca:
    Yu et al., OSDI 2022)."""

    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        return view.waiting[: view.free], None

    def release(self, view: View) -> Iterable[int]:
        return view.finished


POLICIES: dict[str, Callable[[int], Policy]] = {
    "static": Static,
    "static-fixed": lambda max_wait_ns: Static(None),
    "static-bucketed": Bucketed,
    "static-oracle": Oracle,
    "continuous": lambda max_wait_ns: Continuous(),
}
"""Constructors by name; each takes the time in ns that it may wait for a batch to fill."""

WAITING = ("static", "static-bucketed", "static-oracle")
"""Policies that use ``--max-wait``."""


def make_policy(name: str, *, max_wait_ns: int = 0) -> Policy:
    """Return the policy of a name in POLICIES, or of ``package.module:Class``, if there is one."""
    if ":" not in name:
        return POLICIES[name](max_wait_ns)
    place = f"--strategy {shown(name)}"
    parts = re.split(r"[.:]", name)
    if name.count(":") != 1 or not all(map(str.isidentifier, parts)):
        raise UsageError(f"{place}: must be package.module:Class, such as my_policies:Mine")
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` does, so that a file of this folder can be named
        sys.path.insert(0, here)
    try:
        policy_class = pkgutil.resolve_name(name)
        if not isinstance(policy_class, type):  # a function would be called, os:abort among them
            raise UsageError(f"{place}: is not a class; {_POLICY}")
        policy: Policy = policy_class()
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        why = f"cannot be made: {spell_error(error)}"
        modules = list(accumulate(parts[:-1], "{}.{}".format))
        if isinstance(error, ModuleNotFoundError) and (error.name or "") in modules:
            why = f"there is no module {error.name}"
        raise UsageError(f"{place}: {why}; {_POLICY}") from error
    for method in ("admit", "release"):
        if not callable(getattr(policy, method, None)):
            raise UsageError(f"{place}: has no method {method}(view); {_POLICY}")
    own_order(policy, place)
    return policy


_POLICY = (
    "a policy is a class with admit(view) and release(view), made without arguments, of an "
    "installed module or of a file in this folder"
)


def own_order(policy: Policy, place: str) -> str | None:
    """Return the policy's own order of the queue, if any; ``place`` begins an error's message."""
    order: str | None = getattr(policy, "order", None)
    if order is not None and order not in ORDERS:
        must = f"must be one of {', '.join(ORDERS)}"
        raise UsageError(f"{place}: its order is '{shown(order)}'; it {must}")
    return order


def fault_of(policy: Policy, method: str, error: BaseException) -> UsageError:
    """Return the error to raise after a policy's method failed; it names the line of code."""
    return UsageError(f"the policy {type(policy).__name__} fails in {method}: {spell_error(error)}")


def spell_error(error: BaseException) -> str:
    """Return an error of code that is not ours: its type, its message, and its line of code."""
    text = f"{type(error).__name__}: {reason_in_short(error) or 'no reason given'}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    file, ours = Path(last.filename), Path(__file__).parent
    if last.filename.startswith("<") or file.is_relative_to(ours):  # Python's or ours
        return text
    return f"{text} ({file.name}, line {last.lineno})"
