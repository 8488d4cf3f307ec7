"""Policies: who may join at this step, and when a finished request gives up its slot.

These two decisions are all in which static and continuous batching differ. A policy holds no
loop and no queue: it is asked, and answers from what it is shown.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from batchbench.batching.queue import ORDERS
from batchbench.errors import UsageError, shown

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
    def oldest(self) -> Request:
        """Of ``waiting`` the one that has waited longest.

        Raises:
            IndexError: nobody waits.
        """

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
        """Whether requests will come that are not due yet, also if nobody is admitted."""


class Policy(Protocol):
    """The two decisions.

    A policy may have an attribute ``order``, a key of :data:`batchbench.batching.queue.ORDERS`: the
    queue is then sorted so, whatever ``--order`` says.
    """

    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        """The waiting requests that join now, at most ``view.free``; and a time (ns) at which to
        ask again though nothing else has happened, or None."""

    def release(self, view: View) -> Iterable[int]:
        """Which of ``view.finished`` become free now."""


class Static:
    """Requests are served in batches; a batch runs until its longest request is done.

    A finished request holds its slot, and goes on being computed, until the whole batch is done.
    A batch closes when it is full, or else ``max_wait_ns`` after its oldest request was due (as in
    Triton's dynamic batcher): 0 takes what is there. None waits for a full batch for as long as
    more requests will come.
    """

    def __init__(self, max_wait_ns: int | None = 0) -> None:
        self._max_wait_ns = max_wait_ns

    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        """A new batch when no request is running."""
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
        """The whole batch at once."""
        return () if view.running else view.finished

    def _batch(self, view: View) -> Sequence[Request]:
        return view.waiting[: view.free]


class _Sorted(Static):
    """The queue is sorted and cut into batches; the one that holds the oldest request is served.

    So batches hold requests that are alike, and nobody waits for ever.
    """

    def _batch(self, view: View) -> Sequence[Request]:
        begin = view.waiting.index(view.oldest) // view.free * view.free
        return view.waiting[begin : begin + view.free]


class Bucketed(_Sorted):
    """Static batches of prompts of like length, so that little is computed for padding."""

    order = "longest-prompt-first"


class Oracle(_Sorted):
    """Static batches of outputs of like length, known beforehand: the best that static can do.

    Of all ways to cut a queue into batches this one has the fewest steps.
    """

    order = "longest-first"


class Continuous:
    """At every step finished requests make room for waiting ones (Orca's iteration-level
    scheduling: Yu et al., OSDI 2022)."""

    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        """As many as there are free slots."""
        return view.waiting[: view.free], None

    def release(self, view: View) -> Iterable[int]:
        """At once."""
        return view.finished


POLICIES: dict[str, Callable[[int], Policy]] = {
    "static": Static,
    "static-fixed": lambda max_wait_ns: Static(None),
    "static-bucketed": Bucketed,
    "static-oracle": Oracle,
    "continuous": lambda max_wait_ns: Continuous(),
}
"""Each made with the time in ns that it may wait for a batch to fill."""

WAITING = ("static", "static-bucketed", "static-oracle")
"""Those that wait as long as they are told."""


def make_policy(name: str, *, max_wait_ns: int = 0) -> Policy:
    """Make a policy by its name, or by ``package.module:Class`` for one of yours.

    Raises:
        UsageError: there is no such policy, or it cannot be imported or made.
    """
    if ":" in name:
        return _make_own(name)
    if name not in POLICIES:
        raise UsageError(
            f"--strategy {shown(name)}: must be one of {', '.join(POLICIES)}, generate_batch, "
            "or a class of yours as package.module:Class"
        )
    return POLICIES[name](max_wait_ns)


def _make_own(name: str) -> Policy:
    """Make the user's policy; only a class with a policy's methods is called."""
    place = f"--strategy {shown(name)}"
    kind = _class_of(name, place)
    for method in ("admit", "release"):
        if not callable(getattr(kind, method, None)):
            raise UsageError(f"{place}: has no method {method}(view); a policy has {_METHODS}")
    if inspect.isabstract(kind) or getattr(kind, "_is_protocol", False):
        raise UsageError(f"{place}: is abstract; give a class that can be made")
    if not _takes(kind):
        raise UsageError(f"{place}: is made without arguments; give its constructor defaults")
    try:
        policy: Policy = kind()
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UsageError(f"{place}: cannot be made: {_spell(error)}") from error
    if not (_takes(policy.admit, "view") and _takes(policy.release, "view")):
        raise UsageError(f"{place}: its methods must be admit(view) and release(view)")
    order = getattr(policy, "order", None)
    if order is not None and order not in ORDERS:
        raise UsageError(
            f"{place}: its order is '{shown(order)}'; it must be one of {', '.join(ORDERS)}"
        )
    return policy


def _class_of(name: str, place: str) -> type:
    """Return the class that ``package.module:Class`` names.

    Raises:
        UsageError: it cannot be imported, or is not a class.
    """
    module_name, _, class_name = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), class_name]):
        raise UsageError(f"{place}: must be package.module:Class, such as my_policies:Mine")
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` does, so that a file beside you can be named
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise UsageError(
                f"{place}: there is no module {shown(error.name)}; give one that is installed, or "
                "run this in the folder of its file"
            ) from error
        raise UsageError(f"{place}: cannot be imported: {_spell(error)}") from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"{place}: cannot be imported: {_spell(error)}") from error
    try:
        found = getattr(module, class_name)
    except Exception as error:  # a module may define __getattr__
        classes = [each for each, value in vars(module).items() if isinstance(value, type)]
        near = difflib.get_close_matches(class_name, classes, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(
            f"{place}: the module {module_name} has no class {class_name}{hint}"
        ) from error
    if not isinstance(found, type):
        what = "a function" if inspect.isroutine(found) else f"of type {type(found).__name__}"
        raise UsageError(f"{place}: is not a class but {what}; a policy is a class with {_METHODS}")
    return found


_METHODS = "admit(view) and release(view)"


def _takes(function: Callable[..., object], *arguments: str) -> bool:
    """Return True if a function takes this many arguments, as far as its signature is known."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # a function in C without a signature
        return True
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def fault_of(policy: Policy, method: str, error: BaseException) -> UsageError:
    """Return the error to raise after a method of a policy raised one; it names the line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}, line {place.lineno}"
    return UsageError(
        f"the policy {type(policy).__name__} fails in {method}: {_spell(error)} ({where})"
    )


def _spell(error: BaseException) -> str:
    """Return the text of an exception of the user's code, on one line."""
    text = shown(" ".join(str(error).split()), 200)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
