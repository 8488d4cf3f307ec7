"""Several clients that load one server together: their requests, clocks, delays and deaths."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.laws import law
from support.schedules import MS, Schedule
from support.servers import Manner, serving
from support.wired import URL, experiment

from batchbench.batching.experiment import Experiment
from batchbench.batching.progress import Watch
from batchbench.batching.remote.clients import Clients, _taken, processes
from batchbench.batching.remote.outcome import TrialFailed
from batchbench.batching.session import Outcome, StopReason, conduct
from batchbench.errors import IncompleteError, UsageError
from batchbench.reports.result import make_result
from batchbench.reports.served import doubts_of_client, server_lines
from batchbench.reports.time_budget import rate_of
from batchbench.workloads import Workload

COUNT = 24

FAST = Schedule(slots=32, step_ns=2 * MS)

Join = Callable[[], None]


@pytest.fixture(autouse=True)
def on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clients find the driver without the machine's network."""
    monkeypatch.setattr("batchbench.batching.remote.clients._own_hosts", lambda: ("127.0.0.1",))


def starting(*codes: str) -> Callable[[Join, int], AbstractContextManager[Join]]:
    """Return what starts a client with each of these codes, which run first in its process."""

    @contextmanager
    def start(join: Join, count: int) -> Iterator[Join]:
        assert count == len(codes)
        with ExitStack() as stack:
            looks = [stack.enter_context(processes(join, 1, code)) for code in codes]
            yield lambda: [look() for look in looks] and None

    return start


def asked(url: str, count: int, **options: object) -> Experiment:
    given = {"strategy": "continuous", "request_rate": 100.0, "queue_size": COUNT, "trials": 1}
    own = {"target": url, "clients": count, "output_tokens": "4", "verify": "none"}
    return Experiment.of({**given, **own, **options})


def together(clients: int, *codes: str, **options: object) -> tuple[Outcome, Sequence[Any]]:
    """Serve a workload with several clients; return the outcome and the bodies of its trials."""
    with serving(FAST, Manner("vllm")) as server:
        start = starting(*codes) if codes else None
        outcome = conduct(asked(server.url, clients, **options), Watch(), start=start)
        count = len(outcome.workload) * outcome.experiment.trials.trials
        return outcome, server.bodies[-count:]


def about(outcome: Outcome) -> Sequence[Any]:
    clients: Sequence[Any] = outcome.recordings["continuous"][-1].header.about["clients"]
    return clients


# The workload


@settings(law, max_examples=30)
@given(st.integers(1, 5), st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=5))
def test_clients_together_have_the_workload(count: int, rows: list[tuple[int, int]]) -> None:
    due = list(range(len(rows)))
    prompts = [[10 * i + k for k in range(length)] for i, (length, _) in enumerate(rows)]
    whole = Workload.of("w", prompts, [tokens for _, tokens in rows], due_ns=due)
    seen = []
    for client in range(count):
        own = np.arange(client, len(rows), count)
        part = _taken(whole, own)
        for row, request in zip(own.tolist(), part, strict=True):
            assert part.prompt(request.index).tolist() == prompts[row]
            assert (request.output_tokens, request.due_ns) == (rows[row][1], due[row])
            seen.append(row)
    assert sorted(seen) == due


def test_the_requests_of_all_clients_arrive_as_those_of_one() -> None:
    outcome, bodies = together(3)
    alone, bodies_alone = together(1)
    (recording,), (single,) = outcome.recordings["continuous"], alone.recordings["continuous"]
    assert outcome.workload.digest == alone.workload.digest
    assert recording.requests.due_ns.tolist() == single.requests.due_ns.tolist()
    assert recording.tokens is not None
    assert single.tokens is not None
    assert recording.tokens.tolist() == single.tokens.tolist()
    prompts = [sorted(map(str, (body["prompt"] for body in all))) for all in (bodies, bodies_alone)]
    assert prompts[0] == prompts[1]
    assert (recording.admitted_ns >= recording.requests.due_ns).all()
    assert (recording.first_token_ns > recording.admitted_ns).all()
    assert [client["requests"] for client in about(outcome)] == [8, 8, 8]
    assert "clients" not in single.header.about
    # The result says who sent what, how fast, and how well the clocks agree.
    data = make_result(outcome).data
    clients = data["server"]["clients"]  # type: ignore[index]
    assert clients is not None
    sent = recording.admitted_ns
    assert clients["rate"] == rate_of(sent)
    assert [c["rate"] for c in clients["each"]] == [rate_of(sent[i::3]) for i in range(3)]
    assert all(abs(c["clock_offset_ms"]) <= c["clock_within_ms"] for c in clients["each"])
    (line,) = server_lines(data)
    assert "; 3 clients (3 on " in line
    assert " together, their clocks within " in line
    assert make_result(alone).data["server"]["clients"] is None  # type: ignore[index]


def test_strategies_that_are_compared_have_the_same_client() -> None:
    # A sweep starts clients for all of its cells, and one of them may have a single client.
    def never(join: Join, count: int) -> AbstractContextManager[Join]:
        raise AssertionError

    with serving(FAST, Manner("vllm")) as server:
        both = asked(server.url, 1, strategy="static,continuous")
        outcome = conduct(both, Watch(), start=never)
        alone = conduct(asked(server.url, 1), Watch(), start=starting(""))
    assert all("clients" not in r[0].header.about for r in outcome.recordings.values())
    assert len(about(alone)) == 1


def test_a_rate_needs_a_time() -> None:
    assert rate_of(np.array([5])) is None
    assert rate_of(np.array([0, 500_000_000, 1_000_000_000])) == 2.0


# Clocks

SKEWED = "import time; _real = time.perf_counter_ns\n"
SKEWED += "time.perf_counter_ns = lambda: _real() + 7 * 10**9\n"


def test_a_clock_that_is_seconds_ahead_is_corrected() -> None:
    outcome, _ = together(2, "", SKEWED)
    (recording,) = outcome.recordings["continuous"]
    right, ahead = sorted(about(outcome), key=lambda client: abs(client["offset_ns"]))
    assert abs(right["offset_ns"]) <= right["within_ns"]
    assert abs(ahead["offset_ns"] - 7 * 10**9) <= ahead["within_ns"]
    late = recording.admitted_ns - recording.requests.due_ns
    assert late.min() >= 0
    assert late.max() < 5 * 10**9  # not seven seconds
    assert recording.duration_ns < 5 * 10**9


def test_clocks_that_do_not_agree_make_a_trial_suspect() -> None:
    # Its clock runs on by half a second from one reading to the next.
    drifting = (
        "import time; _real, _n = time.perf_counter_ns, [0]\n"
        "from batchbench.batching.remote import wire; _exchange = wire.exchange\n"
        "def _late(*a, **k):\n    done = _exchange(*a, **k)\n"
        "    time.perf_counter_ns = lambda: _real() + 5 * 10**8\n    return done\n"
        "wire.exchange = _late\n"
    )
    outcome, _ = together(2, "", drifting)
    right, wrong = sorted(client["within_ns"] for client in about(outcome))
    assert wrong >= 5 * 10**8 - right
    doubts = doubts_of_client(outcome.recordings)
    (clocks,) = [doubt for doubt in doubts if "the clocks of the clients agree only" in doubt]
    assert clocks.startswith("continuous: the clocks of the clients agree only within 5")


# Clients in trouble

WIRE = "import os, time\nfrom batchbench.batching.remote import wire\n_exchange = wire.exchange\n"

DIES = "_trials = []\ndef _dies(*a, **k):\n    _trials.append(1)\n    if len(_trials) > {}:\n"
DIES = f"{WIRE}{DIES}        os._exit(3)\n    return _exchange(*a, **k)\nwire.exchange = _dies\n"


def test_a_client_that_dies_fails_its_requests_and_the_trial() -> None:
    with pytest.raises(TrialFailed) as found:
        together(2, "", DIES.format(0), trials=3)
    assert found.value.exit_code == 1
    requests = [request["request"] for request in found.value.failed["failed"]]
    first = requests[0]
    assert requests == list(range(first, COUNT, 2))
    assert f"12 of {COUNT} requests failed in trial 1 of continuous" in str(found.value)
    assert f"(request {first} with its client: client {first + 1} of 2" in str(found.value)
    assert str(found.value).endswith("was lost: its process or its connection has ended)")


def test_trials_before_a_client_died_are_kept() -> None:
    outcome, _ = together(2, "", DIES.format(1), trials=4)
    assert len(outcome.recordings["continuous"]) == 1
    assert outcome.stopped is not None
    assert outcome.stopped.reason is StopReason.FAILED
    assert len(outcome.failures) == 2
    assert {one["kind"] for one in outcome.failures[0]["failed"]} == {"client_lost"}


def test_a_client_that_hangs_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchbench.batching.remote.clients.SILENCE_S", 5.0)
    with pytest.raises(TrialFailed, match=r"client . of 2 on .* was lost: ") as found:
        together(2, "", f"{WIRE}wire.exchange = lambda *a, **k: time.sleep(99)\n", timeout=0.5)
    assert len(found.value.failed["failed"]) == COUNT / 2


def test_a_client_that_falls_behind_is_named() -> None:
    late = f"{WIRE}wire.exchange = lambda *a, **k: (time.sleep(1), _exchange(*a, **k))[1]\n"
    outcome, _ = together(2, "", late)
    delays = [client["late_p99_ns"] for client in about(outcome)]
    assert max(delays) > 4 * 10**8  # a second, less the time before the start
    doubts = doubts_of_client(outcome.recordings)
    (doubt,) = [doubt for doubt in doubts if "requests were sent up to" in doubt]
    assert doubt.startswith(f"continuous: client {delays.index(max(delays)) + 1} of 2 on ")


def test_a_failed_request_keeps_its_number() -> None:
    fails = (
        f"{WIRE}from batchbench.batching.remote.exchange import Failure, FailureKind\n"
        "def _fails(*a, **k):\n    done = _exchange(*a, **k)\n"
        "    done[2].failure = Failure(FailureKind.RESET, 'it broke')\n    return done\n"
        "wire.exchange = _fails\n"
    )
    with pytest.raises(TrialFailed) as found:
        together(3, "", fails, "")
    (failed,) = found.value.failed["failed"]
    assert failed["text"] == "it broke"
    assert failed["request"] in (6, 7, 8)  # the third of its client, whichever came first
    assert not found.value.is_usage


def test_a_bug_in_a_client_is_raised_here() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        together(2, "", f"{WIRE}wire.exchange = lambda *a, **k: 1 / 0\n")


def test_a_client_that_never_comes_is_an_error_and_the_others_end() -> None:
    with pytest.raises(IncompleteError, match="--clients: process 1 ended with 4"):
        together(2, "", "import os; os._exit(4)\n")


def test_strangers_and_other_versions_are_not_let_in() -> None:
    @contextmanager
    def start(join: Any, count: int) -> Iterator[Join]:
        meeting = join.args[0]
        with socket.create_connection((meeting.hosts[0], meeting.port)) as stranger:
            stranger.sendall(bytes(32))
            with processes(join, count) as look:
                yield look

    Clients(1, start, Watch()).close()
    with pytest.raises(UsageError, match=r"has batchbench 0\.0, not "):
        Clients(
            1, starting("from batchbench import version; version.__version__ = '0.0'\n"), Watch()
        )


# Refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strategy": "static,continuous"}, "only a single client knows when a wave has ended"),
        ({"max_concurrency": 3}, "drop --max-concurrency"),
        ({"request_rate": None}, "there is no rate to share; give --request-rate"),
        ({"queue_size": 2, "clients": 3}, "more than requests; raise --queue-size"),
    ],
)
def test_what_clients_cannot_share_is_refused(options: dict[str, Any], said: str) -> None:
    with serving(FAST, Manner()) as server, pytest.raises(UsageError) as found:
        conduct(asked(server.url, 2, **options), Watch())
    assert str(found.value).startswith("--clients ")
    assert said in str(found.value)
    assert not server.bodies


def test_clients_are_for_a_server() -> None:
    with pytest.raises(UsageError, match="--clients: is for a server; add --target URL"):
        Experiment.of({"clients": 2})
    assert experiment(clients=2, strategy="continuous").command().count("--clients 2") == 1
    assert partial(experiment, target=URL)().target.clients == 1
