"""Policies, each asked about one moment: who joins, when it wants to be asked again, who leaves."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from batchbench.batching.policies import (
    POLICIES,
    WAITING,
    Static,
    make_policy,
)
from batchbench.workloads import Request


@dataclass
class Moment:
    """A moment at which a policy is asked: the view that it gets."""

    waiting: Sequence[Request]
    now: int = 5
    free: int = 2
    running: int = 0
    finished: Sequence[int] = ()
    more_to_come: bool = True

    @property
    def oldest(self) -> Request:
        return min(self.waiting, key=lambda request: request.index)


LONE = Moment([Request(0, 3, 4, 5)])
"""One request waits, since now, and two slots are free."""


@pytest.mark.parametrize("name", POLICIES)
def test_policies_that_wait_are_those_that_ask_again_after_the_wait(name: str) -> None:
    admitted, again = make_policy(name, max_wait_ns=7).admit(LONE)
    assert (again == 12) is (name in WAITING)
    assert (not admitted) is (name in WAITING or name == "static-fixed")


@pytest.mark.parametrize("policy", [Static(), *map(make_policy, WAITING)])
def test_unless_told_to_wait_static_batching_takes_what_is_there(policy: Static) -> None:
    assert policy.admit(LONE) == (LONE.waiting, None)


@pytest.mark.parametrize("name", POLICIES)
def test_static_batching_gives_up_no_slot_while_a_request_runs(name: str) -> None:
    policy = make_policy(name)
    assert list(policy.release(Moment([], finished=[0, 2]))) == [0, 2]
    while_one_runs = list(policy.release(Moment([], running=1, finished=[0, 2])))
    assert while_one_runs == ([0, 2] if name == "continuous" else [])


def test_the_working_directory_comes_before_all_else_that_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, free in (("elsewhere", 1), ("here", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my_own_policy.py").write_text(
            f"class Mine:\n    free = {free}\n"
            "    def admit(self, view): ...\n    def release(self, view): ...\n"
        )
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere"), *sys.path])
    monkeypatch.chdir(tmp_path / "here")
    assert vars(type(make_policy("my_own_policy:Mine")))["free"] == 2
    monkeypatch.delitem(sys.modules, "my_own_policy")
