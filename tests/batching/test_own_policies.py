"""A policy of the user's: what is refused, and the whole line that says why."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from support.laws import workload_of

from batchbench.batching.plan import Plan
from batchbench.batching.policies import Continuous, make_policy
from batchbench.batching.scheduler import Scheduler
from batchbench.errors import UsageError
from batchbench.workloads import Arrivals

NUMBERS = count()
"""Each test has a module of its own, lest one find another's in Python's cache."""

METHODS = "    def admit(self, view): ...\n    def release(self, view): ...\n"
ABSTRACT = """
from abc import ABC, abstractmethod
class Mine(ABC):
    @abstractmethod
    def admit(self, view): ...
    def release(self, view): ...
"""
PROTOCOL = f"from typing import Protocol\nclass Mine(Protocol):\n{METHODS}"
IS = "; a policy is a class with admit(view) and release(view), made without arguments, of an "
IS += "installed module or of a file in this folder"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty file of Python in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / f"own_policy_{next(NUMBERS)}.py"
    file.touch()
    yield file
    sys.modules.pop(file.stem, None)


def refusal(name: str) -> str:
    """Why a policy is refused, without the option and the name."""
    with pytest.raises(UsageError) as error:
        make_policy(name)
    head, message = f"--strategy {name}: ", str(error.value)
    assert message.startswith(head)
    return message.removeprefix(head)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("class Mine:\n    def release(self, view): ...", "has no method admit(view)"),
        ("class Mine:\n    def admit(self, view): ...", "has no method release(view)"),
        (f"class Mine:\n{METHODS}    admit = 3", "has no method admit(view)"),
        (ABSTRACT, "cannot be made: TypeError: Can't instantiate abstract class Mine "),
        (PROTOCOL, "cannot be made: TypeError: Protocols cannot be instantiated"),
        (
            f"class Mine:\n    def __init__(self, n): ...\n{METHODS}",
            "cannot be made: TypeError: Mine.__init__() missing 1 required positional argument",
        ),
        (
            f"class Mine:\n    def __init__(self): raise ValueError('no\\n  luck')\n{METHODS}",
            "cannot be made: ValueError: no luck (own_policy_",
        ),
        (
            f"class Mine:\n    def __init__(self): raise SystemExit\n{METHODS}",
            "cannot be made: SystemExit: no reason given (own_policy_",
        ),
        (
            f"class Mine:\n    def __init__(self): raise ValueError('x' * 500)\n{METHODS}",
            f"cannot be made: ValueError: {'x' * 127}…",
        ),
        ("def Mine(): ...", "is not a class"),
        ("Mine = 7", "is not a class"),
        ("1 / 0", "cannot be made: ZeroDivisionError: division by zero (own_policy_"),
        ("import no_such_thing", "cannot be made: ModuleNotFoundError: No module named 'no_such"),
        ("def broken(:", "cannot be made: SyntaxError: invalid syntax"),
        ("raise ModuleNotFoundError('lost')", "cannot be made: ModuleNotFoundError: lost"),
        ("", "cannot be made: AttributeError: module 'own_policy_"),
    ],
)
def test_what_is_no_policy_is_refused_with_the_reason(own: Path, source: str, reason: str) -> None:
    own.write_text(source)
    told = refusal(f"{own.stem}:Mine")
    assert told.startswith(reason)
    assert told.endswith(IS)


def test_an_order_that_there_is_not_is_answered_with_those_there_are(own: Path) -> None:
    own.write_text(f"class Mine:\n    order = 'up'\n{METHODS}")
    orders = "fifo, longest-first, shortest-first, longest-prompt-first"
    assert refusal(f"{own.stem}:Mine") == f"its order is 'up'; it must be one of {orders}"


def test_a_module_that_is_not_there_is_named() -> None:
    for module, missing in (("no_such_folder.part", "no_such_folder"), ("json.part", "json.part")):
        assert refusal(f"{module}:Mine") == f"there is no module {missing}{IS}"


@pytest.mark.parametrize("name", [":Mine", "here:", "a b:Mine", "here:Mine:Mine", "a..b:Mine"])
def test_what_is_no_name_of_a_class_is_answered_with_one(name: str) -> None:
    assert refusal(name) == "must be package.module:Class, such as my_policies:Mine"


def test_a_policy_may_say_its_order_and_take_more_than_it_must(own: Path) -> None:
    own.write_text(
        "class Mine:\n    order = 'longest-first'\n    def __init__(self, n=3): self.n = n\n"
        "    def admit(self, view, *more): ...\n    release = max\n"
    )
    assert vars(make_policy(f"{own.stem}:Mine")) == {"n": 3}


def fails(*unused: object) -> None:
    deeper()


def deeper() -> None:
    raise ValueError("out\nof luck")


def finish(scheduler: Scheduler) -> None:
    while isinstance(plan := scheduler.plan(0), Plan):
        scheduler.apply(plan, 1)


@pytest.mark.parametrize("method", ["admit", "release"])
def test_an_error_in_a_policy_is_told_with_its_line(method: str) -> None:
    policy = type("Mine", (Continuous,), {method: fails})()
    scheduler = Scheduler(Arrivals(workload_of([(3, 1, 0), (3, 1, 0)])), policy, 1)
    with pytest.raises(UsageError) as error:
        finish(scheduler)
    line = deeper.__code__.co_firstlineno + 1
    place = f"test_own_policies.py, line {line}"
    expected = f"the policy Mine fails in {method}: ValueError: out of luck ({place})"
    assert str(error.value) == expected
