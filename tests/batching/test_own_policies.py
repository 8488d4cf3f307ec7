"""A policy of the user's: what is refused, and the whole line that says why."""

from __future__ import annotations

import re
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
HAS = "a policy has admit(view) and release(view)"
IS = "a policy is a class with admit(view) and release(view)"
TAKES = "its methods must be admit(view) and release(view)"


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
        ("class Mine:\n    def release(self, view): ...", f"has no method admit(view); {HAS}"),
        ("class Mine:\n    def admit(self, view): ...", f"has no method release(view); {HAS}"),
        (f"class Mine:\n{METHODS}    admit = 3", f"has no method admit(view); {HAS}"),
        (ABSTRACT, "is abstract; give a class that can be made"),
        (PROTOCOL, "is abstract; give a class that can be made"),
        (
            f"class Mine:\n    def __init__(self, n): ...\n{METHODS}",
            "is made without arguments; give its constructor defaults",
        ),
        (
            f"class Mine:\n    def __init__(self): raise ValueError('no\\n  luck')\n{METHODS}",
            "cannot be made: ValueError: no luck",
        ),
        (
            f"class Mine:\n    def __init__(self): raise SystemExit\n{METHODS}",
            "cannot be made: SystemExit",
        ),
        (
            f"class Mine:\n    def __init__(self): raise ValueError('x' * 500)\n{METHODS}",
            f"cannot be made: ValueError: {'x' * 199}…",
        ),
        ("class Mine:\n    def admit(self): ...\n    def release(self, view): ...", TAKES),
        ("class Mine:\n    def admit(self, view): ...\n    def release(self): ...", TAKES),
        (
            f"class Mine:\n    order = 'up'\n{METHODS}",
            "its order is 'up'; it must be one of fifo, longest-first, shortest-first, "
            "longest-prompt-first",
        ),
        ("def Mine(): ...", f"is not a class but a function; {IS}"),
        ("Mine = 7", f"is not a class but of type int; {IS}"),
        ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
        ("import no_such_thing", "cannot be imported: ModuleNotFoundError: No module named 'no"),
        ("raise ModuleNotFoundError('lost')", "cannot be imported: ModuleNotFoundError: lost"),
    ],
)
def test_what_is_no_policy_is_refused_with_the_reason(own: Path, source: str, reason: str) -> None:
    own.write_text(source)
    told = refusal(f"{own.stem}:Mine")
    assert told.startswith(reason) if "no_such" in source else told == reason


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("", ""),
        ("Main = 3", ""),
        ("class Else: ...", ""),
        ("class Mines: ...\nclass Miner: ...\nclass Mina: ...", "; did you mean Miner?"),
    ],
)
def test_a_class_that_is_not_there_is_answered_with_one_that_is(
    own: Path, source: str, hint: str
) -> None:
    own.write_text(source)
    told = refusal(f"{own.stem}:Mine")
    assert re.sub("Mines|Mina", "Miner", told) == f"the module {own.stem} has no class Mine{hint}"


def test_a_module_that_is_not_there_is_named() -> None:
    tail = "; give one that is installed, or run this in the folder of its file"
    assert refusal("no_such_folder.part:Mine") == f"there is no module no_such_folder{tail}"
    assert refusal("json.part:Mine") == f"there is no module json.part{tail}"


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
